// Rows of a warpgroup's products on their way to global memory.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

// Each of four neighbouring lanes holds a row of a 4x4 matrix and receives a column of it.
__device__ __forceinline__ void transpose(uint32_t (&w)[4]) {
  const int lane = threadIdx.x;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &a = w[i], &b = w[i | step];
      const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? a : b, step);
      (upper ? a : b) = other;
    }
  }
}

// Where a warp's rows go: `base` is element 0 of the head in the sample, `pitch` the elements
// from token to token. A lane gets what concerns its two rows.
struct RowTargets {
  int32_t token[2];  // -1: none
  bool in_grid[2];

  __device__ __forceinline__ explicit RowTargets(const RowView& view) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      token[h] = __shfl_sync(kFullWarp, view.token, lane / 4 + 8 * h);
      in_grid[h] = __shfl_sync(kFullWarp, view.in_grid, lane / 4 + 8 * h);
    }
  }
};

// Writes the first `dim` channels of the rows of a product, multiplied by `factor`; rows outside
// the grid become zeros. Four lanes put together 64 bytes of a row.
template <typename T, int kCount>
__device__ __forceinline__ void store_rows(const float (&d)[kCount], const float (&factor)[2],
                                           const RowTargets& rows, T* base, int64_t pitch,
                                           int32_t dim) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    T* row = base + max(rows.token[h], 0) * pitch;
#pragma unroll
    for (int i = 0; i < kCount / 16; ++i) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * i + j) + 2 * h;
        w[j] = pack<T>(d[at] * factor[h], d[at + 1] * factor[h]);
      }
      transpose(w);
      const int channel = 8 * (4 * i + threadIdx.x % 4);
      if (rows.token[h] < 0 || channel >= dim) continue;
      const bool in = rows.in_grid[h];
      *reinterpret_cast<uint4*>(row + channel) =
          make_uint4(in ? w[0] : 0, in ? w[1] : 0, in ? w[2] : 0, in ? w[3] : 0);
    }
  }
}

}  // namespace jax_na::cuda::sm90
