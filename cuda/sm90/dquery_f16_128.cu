#include "dquery.cuh"

namespace jax_na::cuda::sm90 {

template cudaError_t launch_dquery<__half, 128>(
    const BackwardPlan&, const HopperTiling&, cudaStream_t);

}  // namespace jax_na::cuda::sm90
