// The relative positional bias: the index in a head's table is linear in the coordinates of row and
// column, so that it is a sum of a part of the row, one of the column and one of the box.
#pragma once

#include <cstdint>

#include "../fused/bias.cuh"
#include "softmax.cuh"

namespace jax_na::cuda::sm90 {

using fused::bias_index;

// The part of every column of a box.
template <int kColumns>
struct BiasColumns {
  int32_t index[kColumns];

  __device__ __forceinline__ void fill(const Problem& p, const BoxOrder& box, int threads) {
    for (int column = threadIdx.x; column < kColumns; column += threads) {
      int32_t at[kMaxRank];
      box.point(column, at);
      index[column] = bias_index(p, at);
    }
  }
};

// Adds the bias to scaled scores; what a row does not see becomes -inf. kSign is that of the
// rows' side (fused::Sides).
template <int kSign, int kColumns>
__device__ __forceinline__ void add_bias(float (&scores)[kColumns / 2],
                                         const LaneMask<kColumns>& mask, const float* table,
                                         const BiasColumns<kColumns>& columns, const Problem& p,
                                         const RowView& view, const int32_t (&box_at)[kMaxRank]) {
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t box = bias_index(p, box_at);
  const int32_t row[2] = {box - bias_index(p, view.point[0]), box - bias_index(p, view.point[1])};
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const int2 column = *reinterpret_cast<const int2*>(&columns.index[8 * n + lane % 4 * 2]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& score = scores[4 * n + e];
      const int32_t distance = row[e / 2] + (e % 2 == 0 ? column.x : column.y);
      score = mask.test(n, e / 2, e % 2) ? score + table[kSign * distance] : -kInfinity;
    }
  }
}

}  // namespace jax_na::cuda::sm90
