// The relative positional bias: the index in a head's table is linear in the coordinates of row
// and column, so that it is a sum of a part of the row, one of the column and one of the box.
#pragma once

#include <cstdint>

#include "../fused/bias.cuh"
#include "softmax.cuh"

namespace jax_na::cuda::sm90 {

using fused::bias_index;

// The part of every column of a box, in bytes; kSign is that of the rows' side (fused::Sides).
template <int kSign, int kColumns>
struct BiasColumns {
  int32_t offset[kColumns];

  __device__ __forceinline__ void fill(const Problem& p, const BoxOrder& box, int threads) {
    for (int column = threadIdx.x; column < kColumns; column += threads) {
      int32_t at[kMaxRank];
      box.point(column, at);
      offset[column] = kSign * bias_index(p, at) * int{sizeof(float)};
    }
  }
};

// Scales scores and adds the bias; what a row does not see becomes -inf. `table` is that of the
// head, in shared memory; `box_at` is where the box begins, in relative class indices.
template <int kSign, int kColumns>
__device__ __forceinline__ void add_bias(float (&scores)[kColumns / 2], float scale,
                                         const LaneMask<kColumns>& mask, const float* table,
                                         const BiasColumns<kSign, kColumns>& columns,
                                         const Problem& p, const RowView& view,
                                         const int32_t (&box_at)[kMaxRank]) {
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t box = bias_index(p, box_at);
  uint32_t row[2];  // address of the entry of a row and column 0
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row[h] = ptx::shared_address(table) +
             kSign * (box - bias_index(p, view.point[h])) * int{sizeof(float)};
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const int2 column = *reinterpret_cast<const int2*>(&columns.offset[8 * n + lane % 4 * 2]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t address = row[e / 2] + (e % 2 == 0 ? column.x : column.y);
      float& score = scores[4 * n + e];
      score = mask.test(n, e / 2, e % 2)
                  ? score * scale + __uint_as_float(ptx::load_shared_32(address))
                  : -kInfinity;
    }
  }
}

}  // namespace jax_na::cuda::sm90
