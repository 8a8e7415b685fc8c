// Rows of head_dim or value_dim elements in shared memory, and their copies from global
// memory.
#pragma once

#include <cstdint>

#include "../ptx.cuh"
#include "geometry.cuh"

namespace jax_na::cuda::fused {

constexpr int kChunkBytes = 16;  // of one asynchronous copy, and of a row of an 8x8 matrix

// A block of rows without gaps. The 16-byte chunks of a row are permuted within groups of
// kGroup, so that eight consecutive rows have equal chunks in different banks.
template <int kRowBytes_>
struct RowLayout {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kGroup = kRowBytes % 128 == 0 ? 8 : 4;
  static_assert(kRowBytes % 64 == 0);

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int swizzle = kGroup == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + (chunk ^ swizzle) * kChunkBytes;
  }
};

// The addresses that a lane hands to ldmatrix, step by step of two chunks along the row. The
// block is aligned to a group of chunks, so that the permutation is an exclusive or.
template <class Layout>
struct LanePointer {
  uint32_t address;

  __device__ __forceinline__ LanePointer(uint32_t block, int row, int chunk)
      : address(block + Layout::offset(row, chunk)) {}

  __device__ __forceinline__ uint32_t at(int row, int step) const {
    constexpr int kSteps = Layout::kGroup / 2;
    return (address ^ (step % kSteps * 2 * kChunkBytes)) +
           step / kSteps * Layout::kGroup * kChunkBytes + row * Layout::kRowBytes;
  }
};

// Where rows come from: those of one head, `row_bytes` apart for neighbouring tokens.
struct RowSource {
  const uint8_t* rows;
  int32_t row_bytes;
  int32_t chunks;  // in a row; the padding up to the layout's is not touched
};

__device__ __forceinline__ RowSource row_source(const void* array, int64_t first_row,
                                                int32_t head, int32_t heads, int32_t dim,
                                                int32_t element_bytes) {
  return {static_cast<const uint8_t*>(array) +
              (first_row * heads + head) * dim * element_bytes,
          heads * dim * element_bytes, dim * element_bytes / kChunkBytes};
}

// Which threads copy what: a group of neighbouring threads the chunks of a row.
template <class Layout, int kThreads>
struct CopyShare {
  static constexpr int kRowsPerPass = kThreads / Layout::kGroup;
  static_assert(kRowsPerPass % 8 == 0);  // so that a thread's swizzle is the same in all rows
  static constexpr int kGroups = Layout::kChunks / Layout::kGroup;
  int row = threadIdx.x / Layout::kGroup;
  int chunk = threadIdx.x % Layout::kGroup;
};

// Starts to copy one row's share of a thread.
template <class Layout, int kThreads>
__device__ __forceinline__ void copy_row(uint32_t to, const RowSource& source, int32_t token,
                                         int chunk, bool valid) {
  using Share = CopyShare<Layout, kThreads>;
  const uint8_t* from =
      source.rows + int64_t{token} * source.row_bytes + chunk * kChunkBytes;
#pragma unroll
  for (int g = 0; g < Share::kGroups; ++g) {
    constexpr int kGroupBytes = Layout::kGroup * kChunkBytes;
    if (chunk + g * Layout::kGroup < source.chunks) {
      ptx::copy_async_16(to + g * kGroupBytes, from + g * kGroupBytes, valid);
    }
  }
}

// Starts to copy the columns of the box at hand from one array or from two of the same tokens;
// columns that do not exist become zeros.
template <class Layout, int kColumns, int kThreads>
__device__ __forceinline__ void copy_columns(const ColumnEntries& entries, int32_t token,
                                             uint32_t guarded_limits, uint32_t block,
                                             const RowSource& source, uint32_t other_block = 0,
                                             const RowSource& other = {nullptr, 0, 0}) {
  using Share = CopyShare<Layout, kThreads>;
  const Share share;
  const uint32_t to = Layout::offset(share.row, share.chunk);
#pragma unroll
  for (int pass = 0; pass < kColumns / Share::kRowsPerPass; ++pass) {
    const int row = pass * Share::kRowsPerPass;
    const ColumnEntry entry = entries[share.row + row];
    const bool exists = within(entry.coordinates, guarded_limits);
    const uint32_t at = to + row * Layout::kRowBytes;
    copy_row<Layout, kThreads>(block + at, source, token + entry.token, share.chunk, exists);
    if (other.rows == nullptr) continue;
    copy_row<Layout, kThreads>(other_block + at, other, token + entry.token, share.chunk,
                               exists);
  }
}

// The copy of the columns of a box from two arrays of the same tokens, in kParts parts without
// branches, which the compiler spreads among the products that they are started between.
template <class Layout, int kColumns, int kThreads>
struct ColumnCopy {
  using Share = CopyShare<Layout, kThreads>;
  static constexpr int kParts = kColumns / Share::kRowsPerPass;
  static constexpr int kSteps = Layout::kRowBytes / 32;  // of a product along these rows

  ColumnEntries entries;
  int32_t token;
  uint32_t guarded_limits;
  uint32_t block[2];
  RowSource source[2];
  bool wanted;

  // What belongs after one of the kSteps.
  __device__ __forceinline__ void start_after(int step) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part * kSteps / kParts == step) start(part);
    }
  }

  __device__ __forceinline__ void start_all() const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) start(part);
  }

 private:
  __device__ __forceinline__ void start(int part) const {
    constexpr int kGroupBytes = Layout::kGroup * kChunkBytes;
    const Share share;
    const int row = part * Share::kRowsPerPass;
    const ColumnEntry entry = entries[share.row + row];
    const bool exists = within(entry.coordinates, guarded_limits);
    const uint32_t at = Layout::offset(share.row, share.chunk) + row * Layout::kRowBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* from = source[i].rows +
                            int64_t{token + entry.token} * source[i].row_bytes +
                            share.chunk * kChunkBytes;
#pragma unroll
      for (int g = 0; g < Share::kGroups; ++g) {
        const bool in_row = share.chunk + g * Layout::kGroup < source[i].chunks;
        ptx::copy_async_16_if(wanted && in_row, block[i] + at + g * kGroupBytes,
                              from + g * kGroupBytes, exists ? kChunkBytes : 0);
      }
    }
  }
};

// Starts to copy the rows of a tile; rows without a token in the grid become zeros.
template <class Layout, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t block, const RowSource& source,
                                          const int32_t* tokens) {
  using Share = CopyShare<Layout, kThreads>;
  const Share share;
  const uint32_t to = block + Layout::offset(share.row, share.chunk);
#pragma unroll
  for (int pass = 0; pass < kRows / Share::kRowsPerPass; ++pass) {
    const int row = pass * Share::kRowsPerPass;
    const int32_t token = tokens[share.row + row];
    copy_row<Layout, kThreads>(to + row * Layout::kRowBytes, source, token, share.chunk,
                               token >= 0);
  }
}

// Zeros for the padding of narrow rows, which no copy touches.
template <int kBytes, int kThreads>
__device__ __forceinline__ void clear_block(uint8_t* block) {
  for (int i = threadIdx.x; i < kBytes / kChunkBytes; i += kThreads) {
    reinterpret_cast<uint4*>(block)[i] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace jax_na::cuda::fused
