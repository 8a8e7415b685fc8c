#include "gather.cuh"

namespace jax_na::cuda::gemm {
template cudaError_t launch_gather<__nv_bfloat16, 32, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_gather<__nv_bfloat16, 64, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_gather<__nv_bfloat16, 128, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_gather<__nv_bfloat16, 256, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
}  // namespace jax_na::cuda::gemm
