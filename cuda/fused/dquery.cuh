// Gradient of the queries: a CTA owns a tile of queries of one head and visits the keys that
// they see, as in the forward pass.
//
//   P = exp(scale Q K^T + bias - lse),  dS = P (dO V^T - delta),  dQ = scale dS K
#pragma once

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

template <typename T_, int kDim_, int kRows_, Precision kPrecision_>
struct DQueryShape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr Precision kPrecision = kPrecision_;

  using Layout = RowLayout<kDim * sizeof(T)>;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = dquery_columns(kDim, sizeof(T), kRows);
  static constexpr int kWarps = warps_of(kDim, sizeof(T));
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = kRows / kWarps;
  static constexpr int kMTiles = kWarpRows / 16;
  static constexpr int kStages = Layout::kRowBytes <= 256 ? 2 : 1;
  // Copies are spread among the steps of a product where its loop is unrolled.
  static constexpr bool kSpread = kStages == 2 && sizeof(T) == 2;
  static constexpr bool kRowsHeld = kMTiles * Layout::kRowBytes <= 128;
  static constexpr int kResident = kMTiles == 2               ? 2
                                   : Layout::kRowBytes <= 128 ? 3
                                   : Layout::kRowBytes <= 256 ? 2
                                                              : 1;

  struct Shared {
    alignas(128) uint8_t query[kRows * Layout::kRowBytes];  // dQ in the end
    alignas(128) uint8_t dout[kRows * Layout::kRowBytes];
    alignas(128) uint8_t key[kStages][kColumns * Layout::kRowBytes];
    alignas(128) uint8_t value[kStages][kColumns * Layout::kRowBytes];
    TileTables<kRows, kColumns> tables;
  };
  struct SharedWithBias : Shared {
    BiasTables<kRows, kColumns> bias;
    float bias_table[1];  // as long as shared_bias_bytes says
  };
  static constexpr int64_t kBiasRoom = bias_room<SharedWithBias>();
};

template <class S, bool kHasBias>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    dquery_kernel(const __grid_constant__ BackwardPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  using Shared = std::conditional_t<kHasBias, typename S::SharedWithBias, typename S::Shared>;
  constexpr int kThreads = S::kThreads, kMTiles = S::kMTiles, kStages = S::kStages;
  constexpr int kColumns = S::kColumns;
  constexpr Precision kPrecision = S::kPrecision;
  constexpr Side kQueries = Side::kQueries;
  const Problem& p = plan.call.problem;
  const Inputs& in = plan.call.in;
  auto& shared = shared_memory<Shared>();
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one
  const float scale = static_cast<float>(p.scale);
  const float log2_scale = kHasBias ? kLog2E : scale * kLog2E;

  if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
    clear_block<sizeof(shared.query) + sizeof(shared.dout) + sizeof(shared.key) +
                    sizeof(shared.value),
                kThreads>(shared.query);
  }
  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.group, plan.key_heads);
  if (!place.exists(p.query_grid)) return;
  const int64_t first_query = place.batch * p.query_tokens();

  // ---- Tables and rows ---------------------------------------------------------------
  fill_tables<kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns,
                                            place.batch, place.first);
  const float* bias = nullptr;
  if constexpr (kHasBias) {
    fill_bias_tables<kThreads>(&shared.bias, p, plan.rows, plan.columns);
    bias = bring_bias<kThreads, S::kBiasRoom>(p, in.bias, place.batch, place.head,
                                              shared.bias_table);
  }
  __syncthreads();
  copy_rows<Layout, S::kRows, kThreads>(
      ptx::shared_address(shared.query),
      row_source(in.query, first_query, place.head, p.heads, p.head_dim, sizeof(T)),
      shared.tables.row_token);
  copy_rows<Layout, S::kRows, kThreads>(
      ptx::shared_address(shared.dout),
      row_source(plan.call.dout, first_query, place.head, p.heads, p.value_dim, sizeof(T)),
      shared.tables.row_token);
  Walk walk;
  walk.start<kQueries>(shared.tables, p, plan.rows, p.additional, kColumns);
  RowView view;
  view.start(shared.tables, plan.rows, warp_row + threadIdx.x % S::kWarpRows);
  RowStatistics<kMTiles> statistics;
  statistics.load(plan.call.lse, plan.call.delta, first_query * p.heads + place.head, p.heads,
                  shared.tables.row_token, warp_row);

  // ---- Walk over the keys ------------------------------------------------------------
  KeyStream<Layout, kColumns, kThreads, sizeof(T)> stream(p, in, place, shared.tables);
  stream.follow(walk, p, in, place);
  if (kStages == 2 && walk.more()) stream.copy_both(shared.key[0], shared.value[0], walk);
  ptx::copy_async_commit();
  RowOperand<Layout, kMTiles, S::kRowsHeld> query(ptx::shared_address(shared.query), warp_row);
  RowOperand<Layout, kMTiles, S::kRowsHeld> dout(ptx::shared_address(shared.dout), warp_row);
  if constexpr (S::kRowsHeld) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    query.hold();
    dout.hold();
  }
  Accumulator sums[kMTiles][S::kDim / 8];
  clear(sums);
  statistics.finish();

  for (int current = 0; walk.more(); current = (current + 1) % kStages) {
    // All that does not touch the blocks is done before the barrier, where warps wait anyway.
    Walk next = walk;
    next.advance(plan.columns.order.extent);
    const uint64_t columns = view.columns(shared.tables, walk, plan.columns);
    if constexpr (kStages == 1) {
      __syncthreads();
      stream.follow(walk, p, in, place);
      stream.copy_both(shared.key[0], shared.value[0], walk);
      ptx::copy_async_commit();
    } else {
      stream.follow(next, p, in, place);
    }
    const auto copy = stream.copy_of_both(shared.key[kStages - 1 - current],
                                          shared.value[kStages - 1 - current], next);
    // The box at hand has arrived, and all warps are done with what the copies overwrite.
    ptx::copy_async_wait<0>();
    __syncthreads();
    if constexpr (kStages == 2 && !S::kSpread) copy.start_all();
    const uint32_t key_block = ptx::shared_address(shared.key[current]);
    const uint32_t value_block = ptx::shared_address(shared.value[current]);

    const bool with_bias = kHasBias && !walk.in_list;
    if (__any_sync(kFullWarp, columns != 0)) {
      Accumulator scores[kMTiles][kColumns / 8], dscores[kMTiles][kColumns / 8];
      clear(scores);
      multiply_rows<T, kPrecision>(scores, query, key_block, [&](int step) {
        if constexpr (S::kSpread) copy.start_after(step);
      });
      if constexpr (kHasBias) {
        if (with_bias) {
          add_bias<Sides<kQueries>::kSign>(scores, scale, LaneMask<kMTiles>(columns), bias,
                                           shared.bias, p, walk, warp_row);
        } else {
          for_each_element(scores, [&](float& score, auto...) { score *= scale; });
        }
      }
      for_each_element(scores, [&](float& score, int m, int half, int, int) {
        score = score * log2_scale - statistics.lse[m][half];
      });
      if (!with_bias && !__all_sync(kFullWarp, all_columns<kColumns>(columns))) {
        const LaneMask<kMTiles> mask(columns);
        for_each_element(scores, [&](float& score, int m, int half, int n, int i) {
          if (!mask.test(m, half, n, i)) score = -kInfinity;
        });
      }
      // From here on without a branch, so that products hide the rest of the arithmetic.
      clear(dscores);
      multiply_rows<T, kPrecision>(dscores, dout, value_block);
      for_each_element(scores, [&](float& score, auto...) { score = ptx::exp2(score); });
      for_each_element(scores, [&](float& weight, int m, int half, int n, int i) {
        weight *= dscores[m][n][2 * half + i] - statistics.delta[m][half];
      });
      multiply_columns<T, kPrecision, Layout>(sums, scores, key_block);
    } else if constexpr (S::kSpread) {
      copy.start_all();
    }
    ptx::copy_async_commit();
    walk = next;
  }
  ptx::copy_async_wait<0>();

  // ---- Output ------------------------------------------------------------------------
  float factor[kMTiles][2];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) factor[m][0] = factor[m][1] = scale;
  __syncwarp();
  put_rows<T, Layout>(shared.query, warp_row, sums, factor);
  store_rows<Layout, S::kWarpRows>(
      shared.query, warp_row, shared.tables.row_token,
      row_source(plan.call.dquery, first_query, place.head, p.heads, p.head_dim, sizeof(T)));
}

template <class S>
cudaError_t launch_dquery_shape(const BackwardPlan& plan, cudaStream_t stream) {
  const Problem& p = plan.call.problem;
  const int64_t tiles = p.batch * p.heads * plan.rows.order.size;
  if (plan.call.in.bias == nullptr) {
    return launch(&dquery_kernel<S, false>, tiles, S::kThreads, sizeof(typename S::Shared), plan,
                  stream);
  }
  return launch(&dquery_kernel<S, true>, tiles, S::kThreads,
                sizeof(typename S::SharedWithBias) + shared_bias_bytes<S::kBiasRoom>(p), plan,
                stream);
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_dquery(const BackwardPlan& plan, cudaStream_t stream) {
  constexpr int kFew = backward_rows(kDim, sizeof(T)), kMany = dquery_rows(kDim, sizeof(T));
  if constexpr (kMany > kFew) {
    if (plan.rows.tile.size > kFew) {
      return launch_dquery_shape<DQueryShape<T, kDim, kMany, kPrecision>>(plan, stream);
    }
  }
  return launch_dquery_shape<DQueryShape<T, kDim, kFew, kPrecision>>(plan, stream);
}

}  // namespace jax_na::cuda::fused
