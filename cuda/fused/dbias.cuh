// Gradient of the bias: the sum of dS over all pairs of a query and a key at one distance.
//
//   P = exp(scale Q K^T + bias - lse),  dS = P (dO V^T - delta)
//
// A CTA owns a share of the *visits* of one table: a visit is a tile of queries, a box of keys
// that they see, and one of the samples that read the table. Samples come last, since they
// have tile and box in common: then dS of one pair of rows and columns belongs to one entry, and
// visits are added up in registers. Only when the box lies elsewhere relative to the tile goes
// the sum to the table, by way of shared memory: every thread adds up the pairs of some
// distances, so that no two threads add to one entry. So the order of all sums is fixed, and
// there are no atomics; a second kernel adds the shares.
//
// The additional keys have no bias.
#pragma once

#include <cstdint>

#include "bias.cuh"
#include "gemm.cuh"
#include "geometry.cuh"
#include "launch.cuh"
#include "plans.cuh"
#include "row_statistics.cuh"
#include "softmax.cuh"
#include "staging.cuh"
#include "stream.cuh"
#include "variants.h"

namespace jax_na::cuda::fused {

// A sum of dS in shared memory.
template <int kRows, int kColumns>
struct ScoreTile {
  static constexpr int kPitch = kColumns + 2;
  alignas(8) float at[kRows][kPitch];

  // The rows of one warp.
  __device__ __forceinline__ void put(int warp_row, const Accumulator (&sums)[1][kColumns / 8]) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* row = at[warp_row + 8 * half + lane / 4] + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        *reinterpret_cast<float2*>(row + 8 * n) =
            make_float2(sums[0][n][2 * half], sums[0][n][2 * half + 1]);
      }
    }
  }
};

// The gradient of one table, as far as the share of a CTA goes.
template <int kThreads, int64_t kRoom>
struct TableGradient {
  float* partial;  // where the result goes
  float* table;    // where it is added up: there, or in shared memory
  int32_t size;

  // `shared` has room for a table if shared_bias_bytes says so.
  __device__ __forceinline__ TableGradient(const BackwardPlan& plan, int64_t number,
                                           int64_t share, float* shared)
      : size(static_cast<int32_t>(plan.call.problem.bias_size())) {
    partial = plan.bias_partials + (share * plan.tables + number) * size;
    table = shared_bias_bytes<kRoom>(plan.call.problem) == 0 ? partial : shared;
    for (int i = threadIdx.x; i < size; i += kThreads) table[i] = 0;
  }

  // Adds a tile of which the column box begins at `box_at`, in relative class indices. The caller
  // synchronises before and after.
  template <class Tile>
  __device__ __forceinline__ void add(const Tile& dscores, const BackwardPlan& plan,
                                      const int32_t (&box_at)[kMaxRank]) {
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
        entry[a] = box_at[a] + distance[a];
        exists = exists && entry[a] >= 0 && entry[a] < p.bias_extent(a);
      }
      if (!exists) continue;
      float sum = 0;
      for (int z = begin[0]; z < end[0]; ++z) {
        for (int y = begin[1]; y < end[1]; ++y) {
          const int row = (z * tile[1] + y) * tile[2];
          const int column =
              ((z + distance[0]) * box[1] + y + distance[1]) * box[2] + distance[2];
          for (int x = begin[2]; x < end[2]; ++x) sum += dscores.at[row + x][column + x];
        }
      }
      table[bias_index(p, entry)] += sum;
    }
  }

  __device__ __forceinline__ void finish() {
    if (table == partial) return;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) partial[i] = table[i];
  }
};

// The visits of one tile that a CTA makes, in order.
struct TileVisits {
  int64_t left;            // visits, some of boxes that the tile has not
  int32_t box, sample;     // at hand
  int32_t samples;         // of a box
  Walk walk;               // at the box

  // From visit `first` of the tile on.
  template <int kRows>
  __device__ __forceinline__ TileVisits(const BackwardPlan& plan,
                                        const RowTables<kRows>& tables, int32_t samples,
                                        int64_t first, int64_t count)
      : left(count),
        box(static_cast<int32_t>(first / samples)),
        sample(static_cast<int32_t>(first - int64_t{box} * samples)),
        samples(samples) {
    walk.start<Side::kQueries>(tables, plan.call.problem, plan.rows, 0, 0);
    find(plan);
  }

  __device__ __forceinline__ bool more() const { return left > 0; }

  __device__ __forceinline__ void advance(const BackwardPlan& plan) {
    --left;
    if (++sample < samples) return;
    sample = 0;
    ++box;
    find(plan);
  }

  // Where the box begins, in relative class indices.
  __device__ __forceinline__ void box_at(int32_t (&at)[kMaxRank]) const {
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) at[a] = walk.lo[a] + walk.at[a];
  }

 private:
  // Passes by the boxes that the tile has not.
  __device__ __forceinline__ void find(const BackwardPlan& plan) {
    while (left > 0 && !move_walk(plan)) {
      left -= samples - sample;
      sample = 0;
      ++box;
    }
  }
  __device__ __forceinline__ bool move_walk(const BackwardPlan& plan) {
    plan.boxes.point(box, walk.at);
    bool exists = walk.length[0] > 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      walk.at[a] *= plan.columns.order.extent[a];
      exists = exists && walk.at[a] < walk.length[a];
    }
    return exists;
  }
};

template <typename T_, int kDim_, Precision kPrecision_>
struct DBiasShape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr Precision kPrecision = kPrecision_;

  using Layout = RowLayout<kDim * sizeof(T)>;
  static constexpr int kRows = dbias_rows(kDim, sizeof(T));
  static constexpr int kColumns = dbias_columns(kDim, sizeof(T));
  static constexpr int kWarpRows = 16;
  static constexpr int kThreads = kRows / kWarpRows * kWarpLanes;
  static constexpr int kStages = Layout::kRowBytes <= 64 ? 2 : 1;
  static constexpr int kResident = kRows < 64 ? 4 : Layout::kRowBytes <= 128 ? 3 : 2;

  // The tokens of one visit.
  struct Tokens {
    alignas(128) uint8_t query[kRows * Layout::kRowBytes];
    alignas(128) uint8_t dout[kRows * Layout::kRowBytes];
    alignas(128) uint8_t key[kColumns * Layout::kRowBytes];
    alignas(128) uint8_t value[kColumns * Layout::kRowBytes];
  };
  struct Shared {
    Tokens tokens[kStages];
    TileTables<kRows, kColumns> tables;
    BiasTables<kRows, kColumns> bias;
    ScoreTile<kRows, kColumns> dscores;
    float bias_table[1];  // as long as shared_bias_bytes says; the gradient follows
  };
  static constexpr int64_t kBiasRoom = bias_room<Shared, 2>();
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    dbias_kernel(const __grid_constant__ BackwardPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns, kStages = S::kStages;
  constexpr Side kQueries = Side::kQueries;
  const Problem& p = plan.call.problem;
  const Inputs& in = plan.call.in;
  auto& shared = shared_memory<typename S::Shared>();
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one
  const float scale = static_cast<float>(p.scale);

  // ---- The share -------------------------------------------------------------------------
  const int32_t number = blockIdx.x / plan.bias_splits;  // of the table
  const int32_t share = blockIdx.x - number * plan.bias_splits;
  const int32_t head = number % p.heads, key_head = plan.group.quotient(head);
  const bool one_for_all = p.bias_batch_stride == 0;
  const int64_t first_batch = one_for_all ? 0 : number / p.heads;
  const auto all_samples = static_cast<int32_t>(one_for_all ? p.batch : 1);
  // Frames may differ, and with them what a tile sees: then every sample has its own tiles.
  const int32_t samples = p.frame == nullptr ? all_samples : 1;
  const int64_t of_tile = int64_t{plan.boxes.size} * samples;
  const int64_t count = int64_t{all_samples / samples} * plan.rows.order.size * of_tile;
  const int64_t end = (share + int64_t{1}) * count / plan.bias_splits;
  int64_t at = share * count / plan.bias_splits;

  if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
    clear_block<sizeof(shared.tokens), kThreads>(shared.tokens[0].query);
  }
  fill_bias_tables<kThreads>(&shared.bias, p, plan.rows, plan.columns);
  const float* bias =
      bring_bias<kThreads, S::kBiasRoom>(p, in.bias, first_batch, head, shared.bias_table);
  TableGradient<kThreads, S::kBiasRoom> gradient(
      plan, number, share,
      shared.bias_table + shared_bias_bytes<S::kBiasRoom>(p) / sizeof(float));
  Accumulator sums[1][kColumns / 8];
  clear(sums);
  int32_t sums_at[kMaxRank] = {0, 0, 0};  // where the box of the sums begins
  const auto add_sums = [&] {
    shared.dscores.put(warp_row, sums);
    __syncthreads();
    gradient.add(shared.dscores, plan, sums_at);
    clear(sums);
  };

  while (at < end) {
    // ---- Tables of the next tile -----------------------------------------------------------
    const int64_t number_of_tile = at / of_tile;
    const int64_t first_visit = at - number_of_tile * of_tile;
    const int64_t visits_here = min(of_tile, end - number_of_tile * of_tile) - first_visit;
    at += visits_here;
    const int64_t turn = number_of_tile / plan.rows.order.size;
    const int64_t batch = first_batch + turn;
    int32_t first[kMaxRank];
    plan.rows.first_token(static_cast<int32_t>(number_of_tile - turn * plan.rows.order.size),
                          p.window, first);
    if (first[0] >= p.query_grid[0] || first[1] >= p.query_grid[1] ||
        first[2] >= p.query_grid[2]) {
      continue;  // some classes are shorter than others
    }
    __syncthreads();  // all warps are done with the tile before
    fill_tables<kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns, batch,
                                              first);
    __syncthreads();
    TileVisits visits(plan, shared.tables, samples, first_visit, visits_here);
    RowView view;
    view.start(shared.tables, plan.rows, warp_row + threadIdx.x % S::kWarpRows);

    // ---- Its visits ------------------------------------------------------------------------
    RowStatistics<1> next_statistics;
    const auto bring = [&](int stage) {  // what is to be visited next
      if (visits.more()) {
        auto& to = shared.tokens[stage];
        const int64_t sample = batch + visits.sample;
        const int64_t first_query = sample * p.query_tokens();
        const int64_t first_key = sample * p.key_tokens();
        copy_rows<Layout, S::kRows, kThreads>(
            ptx::shared_address(to.query),
            row_source(in.query, first_query, head, p.heads, p.head_dim, sizeof(T)),
            shared.tables.row_token);
        copy_rows<Layout, S::kRows, kThreads>(
            ptx::shared_address(to.dout),
            row_source(plan.call.dout, first_query, head, p.heads, p.value_dim, sizeof(T)),
            shared.tables.row_token);
        copy_columns<Layout, kColumns, kThreads>(
            ColumnEntries{shared.tables.column}, visits.walk.token(), visits.walk.guarded_limits(),
            ptx::shared_address(to.key),
            row_source(in.key, first_key, key_head, p.key_heads, p.head_dim, sizeof(T)),
            ptx::shared_address(to.value),
            row_source(in.value, first_key, key_head, p.key_heads, p.value_dim, sizeof(T)));
        next_statistics.load(plan.call.lse, plan.call.delta, first_query * p.heads + head,
                             p.heads, shared.tables.row_token, warp_row);
      }
      ptx::copy_async_commit();
    };
    bring(0);

    for (int current = 0; visits.more(); current = (current + 1) % kStages) {
      const Walk walk = visits.walk;
      RowStatistics<1> statistics = next_statistics;
      int32_t box_at[kMaxRank];
      visits.box_at(box_at);
      visits.advance(plan);
      if (box_at[0] != sums_at[0] || box_at[1] != sums_at[1] || box_at[2] != sums_at[2]) {
        add_sums();
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) sums_at[a] = box_at[a];
      }
      // The tokens have arrived, and all warps are done with what the copies overwrite.
      ptx::copy_async_wait<0>();
      __syncthreads();
      statistics.finish();
      if constexpr (kStages == 2) bring(1 - current);
      const uint64_t columns = view.columns(shared.tables, walk, plan.columns);
      if (__any_sync(kFullWarp, columns != 0)) {
        const auto& tokens = shared.tokens[current];
        const RowOperand<Layout, 1, false> query(ptx::shared_address(tokens.query), warp_row);
        const RowOperand<Layout, 1, false> dout(ptx::shared_address(tokens.dout), warp_row);
        Accumulator scores[1][kColumns / 8], dscores[1][kColumns / 8];
        clear(scores);
        clear(dscores);
        multiply_rows<T, S::kPrecision>(scores, query, ptx::shared_address(tokens.key));
        add_bias<Sides<kQueries>::kSign>(scores, scale, LaneMask<1>(columns), bias, shared.bias, p,
                                         walk, warp_row);
        multiply_rows<T, S::kPrecision>(dscores, dout, ptx::shared_address(tokens.value));
        for_each_element(scores, [&](float& score, int m, int half, int n, int i) {
          const float weight = ptx::exp2(score * kLog2E - statistics.lse[m][half]);
          const float dweight = dscores[m][n][2 * half + i] - statistics.delta[m][half];
          sums[m][n][2 * half + i] += weight * dweight;
        });
      }
      if constexpr (kStages == 1) {
        __syncthreads();
        bring(0);
      }
    }
    ptx::copy_async_wait<0>();
  }
  add_sums();
  gradient.finish();
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_dbias(const BackwardPlan& plan, cudaStream_t stream) {
  using S = DBiasShape<T, kDim, kPrecision>;
  return launch(&dbias_kernel<S>, plan.tables * plan.bias_splits, S::kThreads,
                sizeof(typename S::Shared) +
                    2 * shared_bias_bytes<S::kBiasRoom>(plan.call.problem),
                plan, stream);
}

}  // namespace jax_na::cuda::fused
