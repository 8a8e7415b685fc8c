// The online softmax of a warpgroup's rows: two per lane, as products leave them.
#pragma once

#include <cstdint>

#include "../fused/softmax.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

using fused::kInfinity;
using fused::kLn2;
using fused::kLog2E;

// Weights are powers of two relative to a reference that follows the largest score only when
// that has grown by more than kSlack: weights stay below 2^kSlack, and sums seldom need
// rescaling.
struct OnlineSoftmax {
  static constexpr float kSlack = 8;
  static constexpr float kLowest = std::numeric_limits<float>::lowest();

  float reference[2];  // in log2 units; finite: no -inf is subtracted
  float total[2] = {0, 0};                  // of this lane's columns
  float factor[2] = {1, 1};                 // what sums so far are to be multiplied by

  __device__ __forceinline__ explicit OnlineSoftmax(float lowest)
      : reference{lowest, lowest} {}

  // Turns scores into weights; `log2_scale` > 0 takes them to log2 units. Returns whether the
  // warp has to apply `factor` to its sums. `total` is left alone where not kTotals.
  template <bool kTotals = true, int kCount>
  __device__ __forceinline__ bool weigh(float (&scores)[kCount], float log2_scale) {
    float largest[2];
    bool grown = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = scores[2 * h], odd = scores[2 * h + 1];  // two chains have half the latency
#pragma unroll
      for (int n = 1; n < kCount / 4; ++n) {
        even = fmaxf(even, scores[4 * n + 2 * h]);
        odd = fmaxf(odd, scores[4 * n + 2 * h + 1]);
      }
      largest[h] = fmaxf(even, odd) * log2_scale;
      grown = grown || largest[h] > reference[h] + kSlack;
    }
    grown = __any_sync(fused::kFullWarp, grown);
    if (grown) raise(largest);
    float odd[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& score = scores[4 * n + e];
        score = ptx::exp2(score * log2_scale - reference[e / 2]);
        if constexpr (kTotals) (e % 2 == 0 ? total : odd)[e / 2] += score;
      }
    }
    if constexpr (kTotals) {
      total[0] += odd[0];
      total[1] += odd[1];
    }
    return grown;
  }

  template <int kCount>
  __device__ __forceinline__ void rescale(float (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] *= factor[i / 2 % 2];
  }

  // Over the lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += __shfl_xor_sync(fused::kFullWarp, total[h], 1);
      total[h] += __shfl_xor_sync(fused::kFullWarp, total[h], 2);
    }
  }

  __device__ __forceinline__ float lse(int h) const {
    return total[h] == 0 ? -kInfinity : (reference[h] + ptx::log2(total[h])) * kLn2;
  }

 private:
  __device__ __forceinline__ void raise(float (&largest)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = largest[h];
      x = fmaxf(x, __shfl_xor_sync(fused::kFullWarp, x, 1));
      x = fmaxf(x, __shfl_xor_sync(fused::kFullWarp, x, 2));
      x = fmaxf(x, reference[h]);
      factor[h] = ptx::exp2(reference[h] - x);
      reference[h] = x;
      total[h] *= factor[h];
    }
  }
};

template <int kColumns>
__device__ __forceinline__ void hide(float (&scores)[kColumns / 2],
                                     const LaneMask<kColumns>& mask) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!mask.test(n, e / 2, e % 2)) scores[4 * n + e] = -kInfinity;
    }
  }
}

// Zeros for the elements of unseen columns, whatever they were.
template <int kColumns>
__device__ __forceinline__ void select(float (&d)[kColumns / 2],
                                       const LaneMask<kColumns>& mask) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!mask.test(n, e / 2, e % 2)) d[4 * n + e] = 0;
    }
  }
}

}  // namespace jax_na::cuda::sm90
