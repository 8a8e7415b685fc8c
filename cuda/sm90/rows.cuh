// Rows of a warpgroup's products on their way to other warpgroups or to global memory.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

// Puts a row operand, as pack_all makes it, into a block of 16-bit elements, the warpgroup's
// first row into row `first`. Only the rows of the warp are touched.
template <class Block, int kCount>
__device__ __forceinline__ void put_operand(uint32_t block, int first,
                                            const uint32_t (&operand)[kCount]) {
  static_assert(kCount == Block::kDim / 4);
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
  const int row = first + warp_row + lane % 16;
#pragma unroll
  for (int m = 0; m < kCount / 2; m += 2) {
    const uint32_t* own = operand + 2 * m;
    ptx::store_matrices(block + Block::offset(row, m + lane / 16), own[0], own[1], own[2],
                        own[3]);
  }
}

// The tokens of the two rows that a lane has of its warpgroup's products (see TileTable).
__device__ __forceinline__ void read_tokens(int32_t (&own)[2], const int32_t* tokens) {
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) own[h] = tokens[warp_row + threadIdx.x % kWarpLanes / 4 + 8 * h];
}

// Which of the two are in the grid.
__device__ __forceinline__ void find_rows(bool (&exists)[2], const int32_t* tokens) {
  int32_t own[2];
  read_tokens(own, tokens);
#pragma unroll
  for (int h = 0; h < 2; ++h) exists[h] = own[h] >= 0;
}

// Word j of lane l of a quad becomes word l of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool high = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if ((j & bit) != 0) continue;
      const uint32_t given = high ? word[j] : word[j + bit];
      const uint32_t taken = __shfl_xor_sync(kFullWarp, given, bit);
      word[j] = high ? taken : word[j];
      word[j + bit] = high ? word[j + bit] : taken;
    }
  }
}

// Writes the rows of a product, multiplied by `factor`, to their tokens in global memory, the
// first `dim` channels of kDim as T, and zeros where a token is outside of the grid. `base` is
// element 0 of the head in the sample, `pitch` the elements from token to token. Straight from
// registers: by way of shared memory a warp waits for others, and twice for its own words.
template <typename T, int kDim, int kCount>
__device__ __forceinline__ void store_rows(const float (&d)[kCount], const float (&factor)[2],
                                           const int32_t (&tokens)[2], T* base, int64_t pitch,
                                           int32_t dim) {
  static_assert(kCount >= kDim / 2);
  const int own_channel = threadIdx.x % 4 * 8;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto at = static_cast<uint32_t>(max(tokens[h], ~tokens[h]));
    T* row = base + uint64_t{at} * static_cast<uint32_t>(pitch) + own_channel;
#pragma unroll
    for (int channel = 0; channel < kDim; channel += 32) {
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = d + channel / 2 + 4 * j + 2 * h;
        word[j] = tokens[h] < 0 ? 0 : pack<T>(pair[0] * factor[h], pair[1] * factor[h]);
      }
      transpose_quad(word);
      if (tokens[h] == kNoToken || channel + own_channel >= dim) continue;
      ptx::store_global(row + channel, word);
    }
  }
}

}  // namespace jax_na::cuda::sm90
