#include "forward.cuh"

namespace jax_na::cuda::fused {
template cudaError_t launch_forward<__half, 256, 64, Precision::kDefault>(const ForwardPlan&,
                                                                    cudaStream_t);
}  // namespace jax_na::cuda::fused
