#include "gather.cuh"

namespace jax_na::cuda::gemm {
template cudaError_t launch_gather<__half, 32, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_gather<__half, 64, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_gather<__half, 128, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_gather<__half, 256, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
}  // namespace jax_na::cuda::gemm
