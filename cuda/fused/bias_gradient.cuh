// The gradient of the bias: the sum of dS over all pairs of a query and a key at one distance.
//
// dS of a box lies in shared memory, and every thread adds up the pairs of some distances, so
// that no two threads add to one entry: the order of all sums is fixed, and there are no
// atomics. A CTA does so for a share of the tiles that read one table, in shared memory where
// that fits; a second kernel adds the shares.
#pragma once

#include <cstdint>

#include "bias.cuh"
#include "gemm.cuh"
#include "plans.cuh"

namespace jax_na::cuda::fused {

// dS of one box.
template <int kRows, int kColumns>
struct BiasGradientTile {
  static constexpr int kPitch = kColumns + 2;
  alignas(8) float at[kRows][kPitch];

  template <int kMTiles, int kNTiles>
  __device__ __forceinline__ void put(int warp_row,
                                      const Accumulator (&dscores)[kMTiles][kNTiles]) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* row = at[warp_row + 16 * m + 8 * half + lane / 4] + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          *reinterpret_cast<float2*>(row + 8 * n) =
              make_float2(dscores[m][n][2 * half], dscores[m][n][2 * half + 1]);
        }
      }
    }
  }

  template <int kMTiles>
  __device__ __forceinline__ void put_zeros(int warp_row) {
    Accumulator zeros[kMTiles][kColumns / 8];
    clear(zeros);
    put(warp_row, zeros);
  }
};

// The tiles of one CTA of the dQ kernel: one, or a share of those that read one table.
struct TileSequence {
  const BackwardPlan& plan;
  int32_t table, share;
  int64_t at, end;

  __device__ __forceinline__ TileSequence(const BackwardPlan& plan, bool has_bias)
      : plan(plan), table(0), share(0), at(blockIdx.x), end(at + 1) {
    if (!has_bias || plan.call.dbias == nullptr) return;
    table = blockIdx.x / plan.bias_splits;
    share = blockIdx.x - table * plan.bias_splits;
    const int64_t samples = shared_by_batch() ? plan.call.problem.batch : 1;
    const int64_t count = samples * plan.rows.order.size;
    at = share * count / plan.bias_splits;
    end = (share + 1) * count / plan.bias_splits;
  }

  __device__ __forceinline__ bool more() const { return at < end; }
  __device__ __forceinline__ void advance() { ++at; }

  // As TilePlace takes it.
  __device__ __forceinline__ int32_t index(bool has_bias) const {
    if (!has_bias || plan.call.dbias == nullptr) return static_cast<int32_t>(at);
    const int32_t tiles = plan.rows.order.size, heads = plan.call.problem.heads;
    const int32_t sample = static_cast<int32_t>(at / tiles);
    const int32_t tile = static_cast<int32_t>(at - int64_t{sample} * tiles);
    const int32_t batch = shared_by_batch() ? sample : table / heads;
    int32_t member = table % heads;
    const int32_t key_head = plan.group.split(&member);
    return ((batch * plan.key_heads.value + key_head) * tiles + tile) * plan.group.value + member;
  }

 private:
  __device__ __forceinline__ bool shared_by_batch() const {
    return plan.call.problem.bias_batch_stride == 0;
  }
};

// The gradient of one table, as far as this CTA's share goes.
struct BiasGradient {
  float* partial = nullptr;  // where the result goes
  float* table = nullptr;    // where it is added up: there, or in shared memory
  int32_t size = 0;

  __device__ __forceinline__ bool wanted() const { return partial != nullptr; }

  // `shared` has room for a table if shared_bias_bytes says so.
  template <int kThreads>
  __device__ __forceinline__ void start(const BackwardPlan& plan, const TileSequence& tiles,
                                        float* shared) {
    if (plan.call.dbias == nullptr) return;
    size = static_cast<int32_t>(plan.call.problem.bias_size());
    partial = plan.bias_partials + (tiles.share * plan.tables + tiles.table) * size;
    table = size * int64_t{sizeof(float)} > kLargestSharedBias ? partial : shared;
    for (int i = threadIdx.x; i < size; i += kThreads) table[i] = 0;
  }

  // The caller has synchronised after dS was put, and does so before the next is.
  template <int kThreads, class Tile>
  __device__ __forceinline__ void add(const Tile& dscore,
                                      const BackwardPlan& plan, const Walk& walk) {
    const Problem& p = plan.call.problem;
    const int32_t(&tile)[kMaxRank] = plan.rows.tile.extent;
    const int32_t(&box)[kMaxRank] = plan.columns.order.extent;
    for (int bin = threadIdx.x; bin < plan.distances.size; bin += kThreads) {
      int32_t distance[kMaxRank], entry[kMaxRank], begin[kMaxRank], end[kMaxRank];
      plan.distances.point(bin, distance);
      bool exists = true;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        distance[a] -= tile[a] - 1;  // of the column in its box from the row in its tile
        begin[a] = max(0, -distance[a]);
        end[a] = min(tile[a], box[a] - distance[a]);
        entry[a] = walk.lo[a] + walk.at[a] + distance[a];
        exists = exists && entry[a] >= 0 && entry[a] < p.bias_extent(a);
      }
      if (!exists) continue;
      float sum = 0;
      for (int z = begin[0]; z < end[0]; ++z) {
        for (int y = begin[1]; y < end[1]; ++y) {
          const int row = (z * tile[1] + y) * tile[2];
          const int column =
              ((z + distance[0]) * box[1] + y + distance[1]) * box[2] + distance[2];
          for (int x = begin[2]; x < end[2]; ++x) sum += dscore.at[row + x][column + x];
        }
      }
      table[bias_index(p, entry)] += sum;
    }
  }

  template <int kThreads>
  __device__ __forceinline__ void finish() {
    if (table == partial) return;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) partial[i] = table[i];
  }
};

}  // namespace jax_na::cuda::fused
