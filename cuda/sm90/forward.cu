// Which Hopper kernel runs a forward pass.
#include "sm90.h"
#include "streams.h"

namespace jax_na::cuda {

using namespace sm90;

cudaError_t forward_sm90(const ForwardCall& call, const HopperTiling& tiling,
                         cudaStream_t stream) {
  const Problem& p = call.problem;
  if (p.batch == 0 || p.query_tokens() == 0 || p.heads == 0) return cudaSuccess;
  if (!supported(p)) return cudaErrorInvalidValue;
  ForwardPlan plan{};
  plan.call = call;
  const cudaError_t status =
      make_query_streams(p, tiling, {call.in.query, nullptr}, call.in, &plan.streams);
  if (status != cudaSuccess) return status;
  return with_type_and_dim<32, 64, 96, 128, 192, 256>(p, [&](auto variant) {
    using V = decltype(variant);
    return launch_forward<typename V::Type, V::kDim>(plan, tiling, stream);
  });
}

}  // namespace jax_na::cuda
