#include "forward.cuh"

namespace jax_na::cuda::fused {
template cudaError_t launch_forward<float, 96, 64, Precision::kDefault>(const ForwardPlan&,
                                                                       cudaStream_t);
template cudaError_t launch_forward<float, 96, 64, Precision::kHighest>(const ForwardPlan&,
                                                                       cudaStream_t);
}  // namespace jax_na::cuda::fused
