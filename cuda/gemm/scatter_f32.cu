#include "scatter.cuh"

namespace jax_na::cuda::gemm {
template cudaError_t launch_scatter<float, 32, Precision::kHighest>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_scatter<float, 64, Precision::kHighest>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_scatter<float, 128, Precision::kHighest>(const UnfusedPlan&, cudaStream_t);
template cudaError_t launch_scatter<float, 256, Precision::kHighest>(const UnfusedPlan&, cudaStream_t);
}  // namespace jax_na::cuda::gemm
