#include "dbias.cuh"
#include "dkey_dvalue.cuh"
#include "dquery.cuh"

namespace jax_na::cuda::fused {
template cudaError_t launch_dbias<float, 256, Precision::kDefault>(const BackwardPlan&, cudaStream_t);
template cudaError_t launch_dquery<float, 256, Precision::kDefault>(const BackwardPlan&, cudaStream_t);
template cudaError_t launch_dkey_dvalue<float, 256, Precision::kDefault>(const BackwardPlan&, Side,
                                                                  cudaStream_t);
}  // namespace jax_na::cuda::fused
