#include "dkey_dvalue.cuh"

namespace jax_na::cuda::sm90 {

template cudaError_t launch_dkey_dvalue<__half, 64>(
    const BackwardPlan&, const HopperTiling&, cudaStream_t);

}  // namespace jax_na::cuda::sm90
