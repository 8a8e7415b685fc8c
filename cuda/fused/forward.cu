// Which forward kernel runs a call.
#include "plans.cuh"
#include "variants.h"

namespace jax_na::cuda {
namespace {

using namespace fused;

template <typename T, Precision kPrecision>
cudaError_t with_type(const ForwardPlan& plan, cudaStream_t stream) {
  return with_padded_dim(plan.call.problem, [&](auto dim) {
    constexpr int kDim = dim.value;
    constexpr int kFew = backward_rows(kDim, sizeof(T)), kMany = forward_rows(kDim, sizeof(T));
    return plan.rows.tile.size <= kFew
               ? launch_forward<T, kDim, kFew, kPrecision>(plan, stream)
               : launch_forward<T, kDim, kMany, kPrecision>(plan, stream);
  });
}

}  // namespace

cudaError_t forward_fused(const ForwardCall& call, const Tiling& tiling, bool highest_precision,
                          cudaStream_t stream) {
  const Problem& p = call.problem;
  if (p.batch == 0 || p.query_tokens() == 0 || p.heads == 0) return cudaSuccess;
  const int dim = padded_dim(p), bytes = element_bytes(p);
  if (!supported(p) || !fits(tiling.query_tile, forward_rows(dim, bytes), tiling.key_tile,
                             forward_columns(dim, bytes))) {
    return cudaErrorInvalidValue;
  }
  const ForwardPlan plan{call, TileGrid(p.query_grid, p.window, tiling.query_tile),
                         ColumnBox(tiling.key_tile), Divisor(p.heads / p.key_heads),
                         Divisor(p.key_heads)};
  switch (p.element_type) {
    case ElementType::kF16:
      return with_type<__half, Precision::kDefault>(plan, stream);
    case ElementType::kBF16:
      return with_type<__nv_bfloat16, Precision::kDefault>(plan, stream);
    case ElementType::kF32:
      return highest_precision ? with_type<float, Precision::kHighest>(plan, stream)
                               : with_type<float, Precision::kDefault>(plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_na::cuda
