#include "dbias.cuh"
#include "dkey_dvalue.cuh"
#include "dquery.cuh"

namespace jax_na::cuda::fused {
template cudaError_t launch_dbias<__half, 192, Precision::kDefault>(const BackwardPlan&, cudaStream_t);
template cudaError_t launch_dquery<__half, 192, Precision::kDefault>(const BackwardPlan&, cudaStream_t);
template cudaError_t launch_dkey_dvalue<__half, 192, Precision::kDefault>(const BackwardPlan&, Side,
                                                                     cudaStream_t);
}  // namespace jax_na::cuda::fused
