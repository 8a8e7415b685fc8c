// Rows of a warpgroup's products on their way to other warpgroups or to global memory.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

// Puts the rows of a product, multiplied by `factor`, into a block of the warpgroup's own, as
// T. Only the rows of the warp are touched. What follows the block's columns in d is passed by.
template <typename T, class Block, int kCount>
__device__ __forceinline__ void put_rows(uint8_t* block, const float (&d)[kCount],
                                         const float (&factor)[2]) {
  static_assert(kCount >= Block::kDim / 2);
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
  const int row = warp_row + lane % 8 + lane / 8 % 2 * 8;
  const uint32_t first = ptx::shared_address(block) + Block::offset(row, lane / 16);
#pragma unroll
  for (int n = 0; n < Block::kDim / 8; n += 2) {
    uint32_t w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 4 * (n + j / 2) + 2 * (j % 2);
      w[j] = pack<T>(d[at] * factor[j % 2], d[at + 1] * factor[j % 2]);
    }
    ptx::store_matrices(Block::add_units(first, n), w[0], w[1], w[2], w[3]);
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

// The warp's rows on their way from a block of shared memory to global memory.
template <class Block>
struct RowCopy {
  static constexpr int kUnits = Block::kDim / 8;  // of 16 bytes, in a row
  static constexpr int kOwn = kWarpRows * kUnits / kWarpLanes;

  uint4 value[kOwn];
  int32_t token[kOwn];

  static __device__ __forceinline__ int index(int i) {
    return i * kWarpLanes + threadIdx.x % kWarpLanes;
  }

  // `tokens` are those of the warpgroup's rows (see TileTable), of which the ones outside of the
  // grid become zeros.
  __device__ __forceinline__ void read(const uint8_t* block, const int32_t* tokens) {
    const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
    const int row = warp_row + index(0) / kUnits, unit = index(0) % kUnits;
    const uint32_t first = ptx::shared_address(block) + Block::offset(row, unit);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if constexpr (kWarpLanes % kUnits == 0) {  // all units are the same
        constexpr int kStep = kWarpLanes / kUnits;
        token[i] = tokens[row + i * kStep];
        value[i] = ptx::load_shared_128(Block::add_rows(first, i * kStep));
      } else {
        const int row = warp_row + index(i) / kUnits, unit = index(i) % kUnits;
        token[i] = tokens[row];
        value[i] = ptx::load_shared_128(ptx::shared_address(block) + Block::offset(row, unit));
      }
      if (token[i] < 0) value[i] = make_uint4(0, 0, 0, 0);
    }
  }

  // The first `dim` channels. `base` is element 0 of the head in the sample, `pitch` the
  // elements from token to token.
  template <typename T>
  __device__ __forceinline__ void write(T* base, int64_t pitch, int32_t dim) const {
    const auto pitch_bytes = static_cast<uint32_t>(pitch * sizeof(T));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int unit = index(i) % kUnits;
      if (token[i] == kNoToken || 8 * unit >= dim) continue;
      const auto at = static_cast<uint32_t>(max(token[i], ~token[i]));
      uint8_t* row = reinterpret_cast<uint8_t*>(base) + 16 * unit + uint64_t{at} * pitch_bytes;
      *reinterpret_cast<uint4*>(row) = value[i];
    }
  }
};

// Both: `block` is the warpgroup's own.
template <typename T, class Block, int kCount>
__device__ __forceinline__ void store_product(const float (&d)[kCount],
                                              const float (&factor)[2], uint8_t* block,
                                              const int32_t* tokens, T* base, int64_t pitch,
                                              int32_t dim) {
  put_rows<T, Block>(block, d, factor);
  __syncwarp();
  RowCopy<Block> rows;
  rows.read(block, tokens);
  rows.write(base, pitch, dim);
}

}  // namespace jax_na::cuda::sm90
