// Masked scores and the online softmax of one warp's rows.
#pragma once

#include <cstdint>
#include <limits>

#include "gemm.cuh"

namespace jax_na::cuda::fused {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls fn(element, m, half, n, i) for the elements of a product: element i of row
// 16 m + 8 half + l / 4 in 8-column tile n, which is column 8 n + 2 (l % 4) + i.
template <int kMTiles, int kNTiles, class Fn>
__device__ __forceinline__ void for_each_element(Accumulator (&d)[kMTiles][kNTiles],
                                                 const Fn& fn) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) fn(d[m][n][2 * half + i], m, half, n, i);
      }
    }
  }
}

// For each of this lane's rows the columns it sees, shifted so that bits 8 n and 8 n + 1 of
// the halves are those of this lane.
template <int kMTiles>
struct LaneMask {
  uint32_t bits[kMTiles][2][2];

  // `columns` is the set of row (l % (16 kMTiles)) of the warp.
  __device__ __forceinline__ explicit LaneMask(uint64_t columns) {
    const int lane = threadIdx.x % kWarpLanes;
    const uint32_t low = static_cast<uint32_t>(columns);
    const uint32_t high = static_cast<uint32_t>(columns >> 32);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + lane / 4;
        bits[m][half][0] = __shfl_sync(kFullWarp, low, row) >> lane % 4 * 2;
        bits[m][half][1] = __shfl_sync(kFullWarp, high, row) >> lane % 4 * 2;
      }
    }
  }

  __device__ __forceinline__ bool test(int m, int half, int n, int i) const {
    return (bits[m][half][n / 4] >> (n % 4 * 8 + i) & 1) != 0;
  }
};

// Whether a set holds all columns of a score tile.
template <int kColumns>
__device__ __forceinline__ bool all_columns(uint64_t columns) {
  constexpr uint64_t kAll = ~uint64_t{0} >> (kMaxColumns - kColumns);
  return (columns & kAll) == kAll;
}

// The running softmax of 16 kMTiles rows. Weights are powers of two relative to a reference
// that follows the largest score only when that has grown by more than kSlack: weights stay
// below 2^kSlack, and the sums seldom need rescaling.
template <int kMTiles>
struct OnlineSoftmax {
  static constexpr float kSlack = 8;
  static constexpr float kLowest = std::numeric_limits<float>::lowest();

  float reference[kMTiles][2];  // in log2 units; finite, so that no -inf is ever subtracted
  float total[kMTiles][2];      // of this lane's columns

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reference[m][half] = kLowest;
        total[m][half] = 0;
      }
    }
  }

  // Turns scores into weights. `log2_scale` > 0 takes them to log2 units.
  template <int kNTiles, int kOutTiles>
  __device__ __forceinline__ void weigh(Accumulator (&scores)[kMTiles][kNTiles],
                                        float log2_scale,
                                        Accumulator (&sums)[kMTiles][kOutTiles]) {
    float largest[kMTiles][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          x = fmaxf(x, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        largest[m][half] = x * log2_scale;
        grown = grown || largest[m][half] > reference[m][half] + kSlack;
      }
    }
    if (__any_sync(kFullWarp, grown)) rescale(largest, sums);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[m][n][i] = ptx::exp2(scores[m][n][i] * log2_scale - reference[m][half]);
            total[m][half] += scores[m][n][i];
          }
        }
      }
    }
  }

  // Over the lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[m][half] += __shfl_xor_sync(kFullWarp, total[m][half], 1);
        total[m][half] += __shfl_xor_sync(kFullWarp, total[m][half], 2);
      }
    }
  }

  __device__ __forceinline__ bool empty(int m, int half) const { return total[m][half] == 0; }
  __device__ __forceinline__ float lse(int m, int half) const {
    return empty(m, half) ? -kInfinity
                          : (reference[m][half] + ptx::log2(total[m][half])) * kLn2;
  }

 private:
  template <int kOutTiles>
  __device__ __forceinline__ void rescale(float (&largest)[kMTiles][2],
                                          Accumulator (&sums)[kMTiles][kOutTiles]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = largest[m][half];
        x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
        x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
        x = fmaxf(x, reference[m][half]);
        const float factor = ptx::exp2(reference[m][half] - x);
        reference[m][half] = x;
        total[m][half] *= factor;
#pragma unroll
        for (int e = 0; e < kOutTiles; ++e) {
          sums[m][e][2 * half] *= factor;
          sums[m][e][2 * half + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace jax_na::cuda::fused
