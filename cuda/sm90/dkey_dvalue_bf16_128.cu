#include "dkey_dvalue.cuh"

namespace jax_na::cuda::sm90 {

template cudaError_t launch_dkey_dvalue<__nv_bfloat16, 128>(
    const BackwardPlan&, const HopperTiling&, cudaStream_t);

}  // namespace jax_na::cuda::sm90
