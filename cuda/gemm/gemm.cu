// Which kernel runs a product.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "plans.cuh"

namespace jax_na::cuda {
namespace {

using namespace gemm;

// Calls fn(Shape{}), which launches, with the smallest padded head_dim.
template <typename T, Precision kPrecision, class Fn>
cudaError_t with_dim(int32_t head_dim, const Fn& fn) {
  if (head_dim <= 32) return fn(Shape<T, 32, kPrecision>{});
  if (head_dim <= 64) return fn(Shape<T, 64, kPrecision>{});
  if (head_dim <= 128) return fn(Shape<T, 128, kPrecision>{});
  return fn(Shape<T, 256, kPrecision>{});
}

template <class Fn>
cudaError_t with_shape(const Problem& p, bool highest_precision, const Fn& fn) {
  switch (p.element_type) {
    case ElementType::kF16:
      return with_dim<__half, Precision::kDefault>(p.head_dim, fn);
    case ElementType::kBF16:
      return with_dim<__nv_bfloat16, Precision::kDefault>(p.head_dim, fn);
    case ElementType::kF32:
      return highest_precision ? with_dim<float, Precision::kHighest>(p.head_dim, fn)
                               : with_dim<float, Precision::kDefault>(p.head_dim, fn);
    default:
      return cudaErrorInvalidValue;
  }
}

// A CTA takes more heads than one where they see few columns each: what it has to know about
// its tile is the same for all of them. But CTAs stay many.
int32_t heads_of_cta(const Problem& p, int32_t heads, const TileGrid& rows) {
  constexpr int64_t kEnoughColumns = 1024, kManyCtas = 1024;
  int64_t columns = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    columns *= rows.tile.extent[a] + p.window[a].kernel_size - 1;
  }
  const int64_t tiles = p.batch * heads * rows.order.size;
  int32_t count = 1;
  while (heads % (2 * count) == 0 && 2 * count * columns <= kEnoughColumns &&
         2 * count * kManyCtas <= tiles) {
    count *= 2;
  }
  return count;
}

// Calls launch(Shape{}, plan) with the plan of a product whose rows are the tokens of `grid`,
// with so many heads.
template <class Launch>
cudaError_t run(const UnfusedCall& call, const int32_t (&grid)[kMaxRank], int32_t heads,
                const UnfusedTiling& tiling, bool highest_precision, const Launch& launch) {
  constexpr int64_t kMostSlots = int64_t{1} << 24;
  const Problem& p = call.problem;
  if (!supported(p) || call.window_size() >= kMostSlots) return cudaErrorInvalidValue;
  return with_shape(p, highest_precision, [&](auto shape) {
    const int64_t rows = box_size(tiling.row_tile);
    if (rows < 1 || rows > shape.kRows) return cudaErrorInvalidValue;
    const AxisWindow* w = p.window;
    const int32_t window[kMaxRank] = {w[0].kernel_size, w[1].kernel_size, w[2].kernel_size};
    const TileGrid tiles(grid, p.window, tiling.row_tile);
    const int32_t cta_heads = heads_of_cta(p, heads, tiles);
    const UnfusedPlan plan{call,
                           tiles,
                           Divisor(1),
                           Divisor(p.heads / p.key_heads),
                           cta_heads,
                           Divisor(heads / cta_heads),
                           BoxOrder(window),
                           {window[1] * window[2], window[2], 1}};
    return launch(shape, plan);
  });
}

// See most_spanned.
int64_t spanned(const AxisWindow (&window)[kMaxRank], const int32_t (&tile)[kMaxRank]) {
  int64_t last = 0;  // slot, where the first one is 0
  for (int a = 0; a < kMaxRank; ++a) {
    const int32_t k = window[a].kernel_size;
    last = last * k + min_i32(tile[a], k) - 1;
  }
  return last + 1;
}

}  // namespace

cudaError_t pair_gemm(const UnfusedCall& call, const UnfusedTiling& tiling,
                      bool highest_precision, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (p.batch * p.query_tokens() * p.heads == 0) return cudaSuccess;
  return run(call, p.query_grid, p.heads, tiling, highest_precision,
             [&](auto shape, const auto& plan) {
               using S = decltype(shape);
               return launch_pair<typename S::T, S::kDim, S::kPrecision>(plan, stream);
             });
}

cudaError_t gather_gemm(const UnfusedCall& call, const UnfusedTiling& tiling,
                        bool highest_precision, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (p.batch * p.query_tokens() * p.heads == 0) return cudaSuccess;
  return run(call, p.query_grid, p.heads, tiling, highest_precision,
             [&](auto shape, const auto& plan) {
               using S = decltype(shape);
               return launch_gather<typename S::T, S::kDim, S::kPrecision>(plan, stream);
             });
}

cudaError_t scatter_gemm(const UnfusedCall& call, const UnfusedTiling& tiling,
                         bool highest_precision, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (p.batch * p.key_tokens() * p.key_heads == 0) return cudaSuccess;
  return run(call, p.key_grid, p.key_heads, tiling, highest_precision,
             [&](auto shape, const auto& plan) {
               using S = decltype(shape);
               if (spanned(p.window, tiling.row_tile) > most_spanned(sizeof(typename S::T))) {
                 return cudaErrorInvalidValue;
               }
               return launch_scatter<typename S::T, S::kDim, S::kPrecision>(plan, stream);
             });
}

}  // namespace jax_na::cuda
