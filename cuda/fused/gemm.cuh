// Products of small matrices by one warp: kMTiles x 16 rows, any number of 8-column tiles.
//
// Lane l holds, of a 16 x 8 tile of a product, elements 2 (l % 4) and 2 (l % 4) + 1 of rows
// l / 4 and l / 4 + 8, in this order. A step along the summed dimension is 32 bytes: 16
// elements of half precision, 8 of float32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx.cuh"
#include "plans.cuh"
#include "staging.cuh"

namespace jax_na::cuda::fused {

using Accumulator = float[4];
using Fragment = uint32_t[4];  // of a 16-row operand

// Tensor cores truncate what they add to, an error that grows with the steps along the summed
// dimension and can exceed that of float32 many times. So highest precision leaves only the
// sum of one step to them.
template <typename T, Precision kPrecision>
__device__ __forceinline__ void multiply_add(Accumulator& d, const Fragment& a, uint32_t b0,
                                             uint32_t b1) {
  if constexpr (!std::is_same_v<T, float>) {
    ptx::multiply_add(d, a, b0, b1, T{});
  } else {
    Fragment high;
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = ptx::round_to_tf32(a[i]);
    const uint32_t high0 = ptx::round_to_tf32(b0), high1 = ptx::round_to_tf32(b1);
    if constexpr (kPrecision == Precision::kHighest) {
      const auto rest = [](uint32_t whole, uint32_t part) {
        return ptx::round_to_tf32(
            __float_as_uint(__uint_as_float(whole) - __uint_as_float(part)));
      };
      Fragment low;
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = rest(a[i], high[i]);
      Accumulator step = {0, 0, 0, 0};
      ptx::multiply_add(step, low, high0, high1, T{});
      ptx::multiply_add(step, high, rest(b0, high0), rest(b1, high1), T{});
      ptx::multiply_add(step, high, high0, high1, T{});
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += step[i];
    } else {
      ptx::multiply_add(d, high, high0, high1, T{});
    }
  }
}

template <int kMTiles, int kNTiles>
__device__ __forceinline__ void clear(Accumulator (&d)[kMTiles][kNTiles]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = 0;
    }
  }
}

// The 16-row operand, from a block of rows in shared memory: read once and held in registers,
// or, where those are too few, anew in every product.
template <class Layout, int kMTiles, bool kHeld>
struct RowOperand {
  static constexpr int kSteps = Layout::kRowBytes / 32;
  LanePointer<Layout> pointer;
  Fragment held[kHeld ? kMTiles : 1][kHeld ? kSteps : 1];

  // `row` is the warp's first one.
  __device__ __forceinline__ RowOperand(uint32_t block, int row)
      : pointer(block, row + threadIdx.x % 16, threadIdx.x % kWarpLanes / 16) {}

  __device__ __forceinline__ void hold() {
    if constexpr (kHeld) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          ptx::load_matrices(held[m][step], pointer.at(16 * m, step));
        }
      }
    }
  }

  __device__ __forceinline__ void get(Fragment (&to)[kMTiles], int step) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[m][i] = held[m][step][i];
      } else {
        ptx::load_matrices(to[m], pointer.at(16 * m, step));
      }
    }
  }
};

// d[r][c] += sum_e a[r][e] * b[c][e]: the columns of the product are rows of the block `b`.
// Calls after(step) when a step along the rows is done.
template <typename T, Precision kPrecision, class Layout, int kMTiles, int kNTiles, bool kHeld,
          class After>
__device__ __forceinline__ void multiply_rows(Accumulator (&d)[kMTiles][kNTiles],
                                              const RowOperand<Layout, kMTiles, kHeld>& a,
                                              uint32_t b, const After& after) {
  const int lane = threadIdx.x % kWarpLanes;
  const LanePointer<Layout> pointer(b, lane % 8 + lane / 16 * 8, lane / 8 % 2);
  // Held operands need constant indices; others need not grow the code of float32 so much.
  constexpr int kUnroll = kHeld || !std::is_same_v<T, float> ? Layout::kRowBytes / 32 : 2;
#pragma unroll kUnroll
  for (int step = 0; step < Layout::kRowBytes / 32; ++step) {
    Fragment rows[kMTiles];
    a.get(rows, step);
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      Fragment columns;
      ptx::load_matrices(columns, pointer.at(8 * n, step));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        multiply_add<T, kPrecision>(d[m][n], rows[m], columns[0], columns[1]);
        multiply_add<T, kPrecision>(d[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
    after(step);
  }
}

template <typename T, Precision kPrecision, class Layout, int kMTiles, int kNTiles, bool kHeld>
__device__ __forceinline__ void multiply_rows(Accumulator (&d)[kMTiles][kNTiles],
                                              const RowOperand<Layout, kMTiles, kHeld>& a,
                                              uint32_t b) {
  multiply_rows<T, kPrecision>(d, a, b, [](int) {});
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// d[r][e] += sum_c weight[r][c] * b[c][e]: a product of two 8-column tiles by another one is a
// row operand already. For float32 lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 where the
// operand wants l % 4 and l % 4 + 4, so the rows of `b` are taken in that order.
template <typename T, Precision kPrecision, class Layout, int kMTiles, int kNTiles,
          int kOutTiles>
__device__ __forceinline__ void multiply_columns(Accumulator (&d)[kMTiles][kOutTiles],
                                                 Accumulator (&weight)[kMTiles][kNTiles],
                                                 uint32_t b) {
  const int lane = threadIdx.x % kWarpLanes;
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t word = lane / 4 % 4 * 4;
    const LanePointer<Layout> even(b + word, lane % 4 * 2, lane / 16);
    const LanePointer<Layout> odd(b + word, lane % 4 * 2 + 1, lane / 16);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < kOutTiles; ++e) {
        const uint32_t b0 = ptx::load_shared_32(even.at(8 * n, e));
        const uint32_t b1 = ptx::load_shared_32(odd.at(8 * n, e));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          const Accumulator& w = weight[m][n];
          const Fragment rows = {__float_as_uint(w[0]), __float_as_uint(w[2]),
                                 __float_as_uint(w[1]), __float_as_uint(w[3])};
          multiply_add<T, kPrecision>(d[m][e], rows, b0, b1);
        }
      }
    }
  } else {
    const LanePointer<Layout> pointer(b, lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      Fragment rows[kMTiles];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const Accumulator &left = weight[m][n], &right = weight[m][n + 1];
        rows[m][0] = pack<T>(left[0], left[1]);
        rows[m][1] = pack<T>(left[2], left[3]);
        rows[m][2] = pack<T>(right[0], right[1]);
        rows[m][3] = pack<T>(right[2], right[3]);
      }
#pragma unroll
      for (int e = 0; e < kOutTiles; e += 2) {
        Fragment columns;
        ptx::load_matrices_transposed(columns, pointer.at(8 * n, e / 2));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          multiply_add<T, kPrecision>(d[m][e], rows[m], columns[0], columns[1]);
          multiply_add<T, kPrecision>(d[m][e + 1], rows[m], columns[2], columns[3]);
        }
      }
    }
  }
}

// Puts the rows of a product, each times its factor, in a block of shared memory, from where
// whole rows can be stored. `row` is the warp's first one.
template <typename T, class Layout, int kMTiles, int kNTiles>
__device__ __forceinline__ void put_rows(uint8_t* block, int row,
                                         Accumulator (&d)[kMTiles][kNTiles],
                                         const float (&factor)[kMTiles][2]) {
  const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half + lane / 4;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const float low = d[m][n][2 * half] * factor[m][half];
        const float high = d[m][n][2 * half + 1] * factor[m][half];
        const int byte = (8 * n + lane % 4 * 2) * int{sizeof(T)};
        uint8_t* to = block + Layout::offset(r, byte / kChunkBytes) + byte % kChunkBytes;
        if constexpr (std::is_same_v<T, float>) {
          *reinterpret_cast<float2*>(to) = make_float2(low, high);
        } else {
          *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
        }
      }
    }
  }
}

// Stores kCount rows of a block that this warp has put there, in whole chunks.
template <class Layout, int kCount>
__device__ __forceinline__ void store_rows(const uint8_t* block, int row, const int32_t* tokens,
                                           const RowSource& target) {
  constexpr int kRowsPerPass = kWarpLanes / Layout::kGroup;
  const int lane = threadIdx.x % kWarpLanes;
  const int chunk = lane % Layout::kGroup;
  __syncwarp();
#pragma unroll 1
  for (int pass = 0; pass < kCount / kRowsPerPass; ++pass) {
    const int r = row + pass * kRowsPerPass + lane / Layout::kGroup;
    if (tokens[r] == kNoToken) continue;
    const int32_t token = max(tokens[r], ~tokens[r]);
    uint8_t* to = const_cast<uint8_t*>(target.rows) + int64_t{token} * target.row_bytes;
#pragma unroll
    for (int c = chunk; c < Layout::kChunks; c += Layout::kGroup) {
      if (c < target.chunks) {
        reinterpret_cast<uint4*>(to)[c] =
            *reinterpret_cast<const uint4*>(block + Layout::offset(r, c));
      }
    }
  }
}

// Stores the first `dim` elements of the rows of a product times a factor, as they are, in an
// array whose tokens are `pitch` elements apart.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void store_partials(float* array, int row, const int32_t* tokens,
                                               const Accumulator (&d)[kMTiles][kNTiles],
                                               float factor, int32_t pitch, int32_t dim) {
  const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t token = tokens[row + 16 * m + 8 * half + lane / 4];
      if (token == kNoToken) continue;
      float* to = array + int64_t{max(token, ~token)} * pitch + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        if (8 * n >= dim) break;
        *reinterpret_cast<float2*>(to + 8 * n) =
            make_float2(d[m][n][2 * half] * factor, d[m][n][2 * half + 1] * factor);
      }
    }
  }
}

}  // namespace jax_na::cuda::fused
