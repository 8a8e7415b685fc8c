// The backward pass: a launch for each kind of gradient that is wanted.
#include "backward.cuh"

#include "../kernels.h"

namespace jax_na::cuda {

cudaError_t backward_naive(const BackwardCall& call, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  const auto launch = [&](bool wanted, auto* kernel) {
    if (wanted && status == cudaSuccess) status = kernel(call, stream);
  };
  launch(call.dquery != nullptr, backward_naive_query);
  launch(call.dkey != nullptr || call.dvalue != nullptr, backward_naive_key);
  launch(call.dadditional_key != nullptr || call.dadditional_value != nullptr,
         backward_naive_additional);
  launch(call.dbias != nullptr, backward_naive_bias);
  return status;
}

}  // namespace jax_na::cuda
