// lse and delta of the queries of a box, which the gradients of keys and values need per
// column.
#pragma once

#include <cstdint>

#include "softmax.cuh"

namespace jax_na::cuda::sm90 {

// Of one box, in shared memory: lse in log2 units, and +inf, so that weights are 0, where it is
// -inf or where there is no query.
template <int kColumns>
struct ColumnStatistics {
  alignas(8) float lse[kColumns];
  alignas(8) float delta[kColumns];

  // Turns scores, a product with these columns, into weights; `log2_scale` takes them to log2
  // units.
  __device__ __forceinline__ void weigh(float (&scores)[kColumns / 2], float log2_scale) const {
    const auto* own = reinterpret_cast<const float2*>(lse) + threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float2 pair = own[4 * n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& score = scores[4 * n + e];
        score = ptx::exp2(score * log2_scale - (e % 2 == 0 ? pair.x : pair.y));
      }
    }
  }
};

// The producer's side: a lane brings every 32nd column.
template <int kColumns>
struct StatisticsReader {
  static constexpr int kOwn = (kColumns + kWarpLanes - 1) / kWarpLanes;

  const BackwardCall& call;
  ColumnStatistics<kColumns>* slots;
  int32_t offset[kOwn][kMaxRank];  // of the columns from the first of a box
  float lse[kOwn], delta[kOwn];

  __device__ __forceinline__ StatisticsReader(const BackwardCall& call, const BoxOrder& box,
                                              ColumnStatistics<kColumns>* slots)
      : call(call), slots(slots) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int column = threadIdx.x % kWarpLanes + i * kWarpLanes;
      box.point(column, offset[i]);
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) offset[i][a] *= call.problem.window[a].dilation;
      if (column >= box.size) offset[i][0] = call.problem.query_grid[0];  // nowhere
    }
  }

  // Starts to read those of the box whose first column is local query `at`.
  __device__ __forceinline__ void read(int32_t batch, int32_t head,
                                       const int32_t (&at)[kMaxRank]) {
    const Problem& p = call.problem;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      bool exists = true;
      int32_t index = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int32_t own = at[a] + offset[i][a];
        exists = exists && own >= 0 && own < p.query_grid[a];
        index = index * p.query_grid[a] + own;
      }
      lse[i] = -kInfinity;
      delta[i] = 0;
      if (!exists) continue;
      const int64_t row = (batch * p.query_tokens() + index) * p.heads + head;
      lse[i] = static_cast<const float*>(call.lse)[row];
      delta[i] = static_cast<const float*>(call.delta)[row];
    }
  }

  // Puts them into the slot of the box.
  __device__ __forceinline__ void put(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int column = threadIdx.x % kWarpLanes + i * kWarpLanes;
      if (column >= kColumns) continue;
      const bool empty = lse[i] == -kInfinity;
      slots[slot].lse[column] = empty ? kInfinity : lse[i] * kLog2E;
      slots[slot].delta[column] = empty ? 0 : delta[i];
    }
  }
};

}  // namespace jax_na::cuda::sm90
