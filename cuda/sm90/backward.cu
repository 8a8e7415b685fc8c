// Which Hopper kernels run a backward pass.
#include "sm90.h"
#include "streams.h"

namespace jax_na::cuda {

using namespace sm90;

cudaError_t backward_sm90(const BackwardCall& call, const HopperBackwardTiling& tiling,
                          cudaStream_t stream) {
  const Problem& p = call.problem;
  if (!supported(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.heads == 0) return cudaSuccess;
  const TokenPair queries{call.in.query, call.dout};
  BackwardPlan plan{};
  plan.call = call;
  cudaError_t status = cudaSuccess;
  if (call.dquery != nullptr && p.query_tokens() > 0) {
    status = make_query_streams(p, tiling.dquery, queries, call.in, &plan.streams);
    if (status != cudaSuccess) return status;
    status = with_type_and_dim<128>(p, [&](auto variant) {
      using V = decltype(variant);
      return launch_dquery<typename V::Type, V::kDim>(plan, tiling.dquery, stream);
    });
    if (status != cudaSuccess) return status;
  }
  if ((call.dkey != nullptr || call.dvalue != nullptr) && p.key_tokens() > 0) {
    status = make_key_streams(p, tiling.dkey_dvalue, call.in, queries, &plan.streams);
    if (status != cudaSuccess) return status;
    status = with_type_and_dim<128>(p, [&](auto variant) {
      using V = decltype(variant);
      return launch_dkey_dvalue<typename V::Type, V::kDim>(plan, tiling.dkey_dvalue, stream);
    });
  }
  return status;
}

}  // namespace jax_na::cuda
