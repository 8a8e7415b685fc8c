#include "forward.cuh"

namespace jax_na::cuda::fused {
template cudaError_t launch_forward<__nv_bfloat16, 96, 64, Precision::kDefault>(const ForwardPlan&,
                                                                    cudaStream_t);
template cudaError_t launch_forward<__nv_bfloat16, 96, 128, Precision::kDefault>(const ForwardPlan&,
                                                                    cudaStream_t);
}  // namespace jax_na::cuda::fused
