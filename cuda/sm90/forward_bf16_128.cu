#include "forward.cuh"

namespace jax_na::cuda::sm90 {

template cudaError_t launch_forward<__nv_bfloat16, 128>(
    const ForwardPlan&, const HopperTiling&, cudaStream_t);

}  // namespace jax_na::cuda::sm90
