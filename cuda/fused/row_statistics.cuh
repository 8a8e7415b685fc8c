// lse and delta of the queries that a warp owns, which gradients of the scores need per row.
#pragma once

#include <cstdint>

#include "softmax.cuh"

namespace jax_na::cuda::fused {

// What a lane needs of its rows. load() starts to read, and nothing waits before finish().
template <int kMTiles>
struct RowStatistics {
  float lse[kMTiles][2];  // in log2 units; +inf, so that weights are 0, where it is -inf
  float delta[kMTiles][2];

  // `first_row` is that of token 0, in rows of `heads`.
  __device__ __forceinline__ void load(const void* lse_array, const void* delta_array,
                                       int64_t first_row, int32_t heads, const int32_t* tokens,
                                       int warp_row) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + 8 * half + threadIdx.x % kWarpLanes / 4;
        lse[m][half] = -kInfinity;
        delta[m][half] = 0;
        if (tokens[row] < 0) continue;
        const int64_t at = first_row + int64_t{tokens[row]} * heads;
        lse[m][half] = static_cast<const float*>(lse_array)[at];
        delta[m][half] = static_cast<const float*>(delta_array)[at];
      }
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool empty = lse[m][half] == -kInfinity;
        lse[m][half] = empty ? kInfinity : lse[m][half] * kLog2E;
        if (empty) delta[m][half] = 0;
      }
    }
  }
};

}  // namespace jax_na::cuda::fused
