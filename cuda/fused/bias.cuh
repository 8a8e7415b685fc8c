// The relative positional bias: one table per head, indexed by the distance of a row and a
// column in class steps. Its index is linear in both, so that it is a sum of three: one of the
// row in its tile, one of the column in its box, one of the box.
#pragma once

#include <cstdint>

#include "geometry.cuh"
#include "softmax.cuh"
#include "variants.h"

namespace jax_na::cuda::fused {

// Shared memory that a table may take beside a structure that ends with kCount of them; larger
// ones are read through the first-level cache.
template <class Shared, int kCount = 1>
constexpr int64_t bias_room() {
  static_assert(sizeof(Shared) <= kSharedBytes);
  constexpr int64_t kLeft = (kSharedBytes - int64_t{sizeof(Shared)}) / kCount;
  constexpr int64_t kMost = 16 * 1024;
  return kLeft < kMost ? kLeft : kMost;
}

template <int kRows, int kColumns>
struct BiasTables {
  int32_t row[kRows];
  int32_t column[kColumns];
};

__device__ __forceinline__ int32_t bias_index(const Problem& p, const int32_t (&at)[kMaxRank]) {
  return (at[0] * p.bias_extent(1) + at[1]) * p.bias_extent(2) + at[2];
}

template <int kThreads, int kRows, int kColumns>
__device__ __forceinline__ void fill_bias_tables(BiasTables<kRows, kColumns>* tables,
                                                 const Problem& p, const TileGrid& grid,
                                                 const ColumnBox& box) {
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    int32_t at[kMaxRank];
    grid.tile.point(i, at);
    tables->row[i] = bias_index(p, at);
  }
  for (int i = threadIdx.x; i < kColumns; i += kThreads) {
    int32_t at[kMaxRank];
    box.order.point(i, at);
    tables->column[i] = bias_index(p, at);
  }
}

template <int64_t kRoom>
JAX_NA_INLINE int64_t shared_bias_bytes(const Problem& p) {
  const int64_t bytes = p.bias_size() * int64_t{sizeof(float)};
  return bytes > kRoom ? 0 : bytes;
}

// Copies the table of a head where it is read often, if there is room. Returns where it is then.
template <int kThreads, int64_t kRoom>
__device__ __forceinline__ const float* bring_bias(const Problem& p, const void* bias,
                                                   int64_t batch, int32_t head,
                                                   float* shared) {
  const float* table =
      static_cast<const float*>(bias) + batch * p.bias_batch_stride + head * p.bias_size();
  if (shared_bias_bytes<kRoom>(p) == 0) return table;
  for (int i = threadIdx.x; i < p.bias_size(); i += kThreads) shared[i] = table[i];
  return shared;
}

// Scales the scores of the box at hand and adds the bias; what a row does not see becomes
// -inf. `row` is the warp's first one.
template <int kSign, int kMTiles, int kNTiles, int kRows>
__device__ __forceinline__ void add_bias(Accumulator (&scores)[kMTiles][kNTiles], float scale,
                                         const LaneMask<kMTiles>& mask, const float* table,
                                         const BiasTables<kRows, 8 * kNTiles>& tables,
                                         const Problem& p, const Walk& walk, int row) {
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t at[kMaxRank] = {walk.lo[0] + walk.at[0], walk.lo[1] + walk.at[1],
                                walk.lo[2] + walk.at[2]};
  const int32_t box = bias_index(p, at);
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t column = box + tables.column[8 * n + lane % 4 * 2 + i];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t distance = column - tables.row[row + 16 * m + 8 * half + lane / 4];
          float& score = scores[m][n][2 * half + i];
          score = mask.test(m, half, n, i) ? score * scale + table[kSign * distance] : -kInfinity;
        }
      }
    }
  }
}

}  // namespace jax_na::cuda::fused
