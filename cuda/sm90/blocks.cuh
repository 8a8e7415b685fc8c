// Blocks of tokens in shared memory: how they come there, and repairs of what came.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

// All threads of warpgroup `group`.
__device__ __forceinline__ void group_barrier(int group) {
  ptx::named_barrier(1 + group, kGroupThreads);
}

// What the copies of a box of so many tokens bring.
template <class Block>
__device__ __forceinline__ uint32_t box_bytes(int32_t tokens) {
  return tokens * Block::kRowBytes * Block::kCount;
}

// Starts the copies of a box from local token `at`; one thread.
template <class Block>
__device__ __forceinline__ void copy_block(uint8_t* to, const CUtensorMap* map, uint64_t* full,
                                           int32_t channel, const int32_t (&at)[kMaxRank],
                                           int32_t batch) {
#pragma unroll
  for (int i = 0; i < Block::kCount; ++i) {
    ptx::copy_box(to + i * Block::kBytes, map, full, channel + i * Block::kChannels, at, batch);
  }
}

// Zeros for rows [used, kRows) of `count` blocks, which no copy touches.
template <class Block, int kThreads>
__device__ __forceinline__ void clear_rest(uint8_t* blocks, int count, int32_t used) {
  const int units = (Block::kRows - used) * Block::kRowBytes / 16;
  for (int i = threadIdx.x; i < count * Block::kCount * units; i += kThreads) {
    const int block = i / units, unit = i % units;
    uint8_t* row = blocks + block * Block::kBytes + used * Block::kRowBytes;
    reinterpret_cast<uint4*>(row)[unit] = make_uint4(0, 0, 0, 0);
  }
}

// Zeros for channels [dim, kDim) of a warpgroup's 64 rows, which hold those of the next head.
// All threads of the warpgroup call it, and synchronise before they multiply.
template <class Block>
__device__ __forceinline__ void clear_padding(uint8_t* block, int32_t dim) {
  const int thread = threadIdx.x % kGroupThreads;
  const int units = Block::kDim / 8 - dim / 8;
  for (int i = thread; i < Block::kRows * units; i += kGroupThreads) {
    const int offset = Block::offset(i / units, dim / 8 + i % units);
    *reinterpret_cast<uint4*>(block + offset) = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async_proxy();
}

// Zeros for the rows of a warpgroup that have no token in the grid (see TileTable). As above.
template <class Block>
__device__ __forceinline__ void clear_absent(uint8_t* block, const int32_t* tokens) {
  constexpr int kUnits = Block::kDim / 8;
  for (int i = threadIdx.x % kGroupThreads; i < Block::kRows * kUnits; i += kGroupThreads) {
    if (tokens[i / kUnits] >= 0) continue;
    const int offset = Block::offset(i / kUnits, i % kUnits);
    *reinterpret_cast<uint4*>(block + offset) = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async_proxy();
}

// Zeros for the columns of the box at hand that hang over the end of the union: where a frame
// ends there, the array may hold anything beyond, and a weight of 0 does not silence NaN. As
// above.
template <class Block>
__device__ __forceinline__ void clear_overhang(uint8_t* block, const BoxWalk& walk,
                                               const BoxOrder& box) {
  const int thread = threadIdx.x % kGroupThreads;
  const int32_t limit[kMaxRank] = {walk.length[0] - walk.at[0], walk.length[1] - walk.at[1],
                                   walk.length[2] - walk.at[2]};
  for (int column = thread; column < box.size; column += kGroupThreads) {
    int32_t at[kMaxRank];
    box.point(column, at);
    if (at[0] < limit[0] && at[1] < limit[1] && at[2] < limit[2]) continue;
    for (int unit = 0; unit < Block::kDim / 8; ++unit) {
      *reinterpret_cast<uint4*>(block + Block::offset(column, unit)) = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::fence_async_proxy();
}

}  // namespace jax_na::cuda::sm90
