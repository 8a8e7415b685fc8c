#include "scatter.cuh"

namespace jax_na::cuda::gemm {
template cudaError_t launch_scatter<float, 32, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_scatter<float, 64, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_scatter<float, 128, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_scatter<float, 256, Precision::kDefault>(const UnfusedPlan&, cudaStream_t);
}  // namespace jax_na::cuda::gemm
