// Rows of a warpgroup's products on their way to other warpgroups or to global memory.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

// Puts the rows of a product, multiplied by `factor`, into a block of the warpgroup's own, as
// T. Only the rows of the warp are touched.
template <typename T, class Block, int kCount>
__device__ __forceinline__ void put_rows(uint8_t* block, const float (&d)[kCount],
                                         const float (&factor)[2]) {
  static_assert(kCount == Block::kDim / 2);
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
  const int row = warp_row + lane % 8 + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < kCount / 4; n += 2) {
    uint32_t w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * (n + j / 2) + 2 * (j % 2);
      w[j] = pack<T>(d[at] * factor[j % 2], d[at + 1] * factor[j % 2]);
    }
    ptx::store_matrices(ptx::shared_address(block) + Block::offset(row, n + lane / 16), w[0],
                        w[1], w[2], w[3]);
  }
}

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

// Copies the first `dim` channels of the warp's rows from a block; `tokens` are those of the
// warpgroup's rows (see TileTable), of which the ones outside of the grid become zeros. `base`
// is element 0 of the head in the sample, `pitch` the elements from token to token.
template <typename T, class Block>
__device__ __forceinline__ void store_rows(const uint8_t* block, const int32_t* tokens, T* base,
                                           int64_t pitch, int32_t dim) {
  constexpr int kUnits = Block::kDim / 8;  // of 16 bytes, in a row
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
#pragma unroll
  for (int i = 0; i < kWarpRows * kUnits / kWarpLanes; ++i) {
    const int index = i * kWarpLanes + lane;
    const int row = warp_row + index / kUnits, unit = index % kUnits;
    const int32_t token = tokens[row];
    if (token == kNoToken || 8 * unit >= dim) continue;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (token >= 0) value = *reinterpret_cast<const uint4*>(block + Block::offset(row, unit));
    *reinterpret_cast<uint4*>(base + max(token, ~token) * pitch + 8 * unit) = value;
  }
}

// Both: `block` is the warpgroup's own.
template <typename T, class Block, int kCount>
__device__ __forceinline__ void store_product(const float (&d)[kCount],
                                              const float (&factor)[2], uint8_t* block,
                                              const int32_t* tokens, T* base, int64_t pitch,
                                              int32_t dim) {
  put_rows<T, Block>(block, d, factor);
  __syncwarp();
  store_rows<T, Block>(block, tokens, base, pitch, dim);
}

}  // namespace jax_na::cuda::sm90
