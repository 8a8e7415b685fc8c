// Forward: a CTA owns a tile of queries of one head and visits the keys that they see.
#pragma once

#include "bias.cuh"
#include "gemm.cuh"
#include "geometry.cuh"
#include "launch.cuh"
#include "plans.cuh"
#include "softmax.cuh"
#include "staging.cuh"
#include "stream.cuh"
#include "variants.h"

namespace jax_na::cuda::fused {

template <typename T_, int kDim_, int kRows_, Precision kPrecision_>
struct ForwardShape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr int kRows = kRows_;
  static constexpr Precision kPrecision = kPrecision_;

  using Layout = RowLayout<kDim * sizeof(T)>;
  static constexpr int kColumns = forward_columns(kDim, sizeof(T));
  static constexpr int kWarps = warps_of(kDim, sizeof(T));
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = kRows / kWarps;
  static constexpr int kMTiles = kWarpRows / 16;

  // Two stages need one barrier per box; one needs two barriers, and half of the memory.
  static constexpr int kStages = Layout::kRowBytes <= 128 ? 2 : 1;
  static constexpr bool kQueryHeld = kMTiles * Layout::kRowBytes <= 256;

  // CTAs per multiprocessor whose registers fit.
  static constexpr int kResident = kMTiles == 1 ? (Layout::kRowBytes <= 64    ? 5
                                                   : Layout::kRowBytes <= 128 ? 4
                                                   : Layout::kRowBytes <= 256 ? 3
                                                                              : 2)
                                                : (Layout::kRowBytes <= 64 ? 3 : 2);

  struct Shared {
    alignas(128) uint8_t query[kRows * Layout::kRowBytes];  // the output in the end
    alignas(128) uint8_t key[kStages][kColumns * Layout::kRowBytes];
    alignas(128) uint8_t value[kStages][kColumns * Layout::kRowBytes];
    TileTables<kRows, kColumns> tables;
    BiasTables<kRows, kColumns> bias;
    float bias_table[1];  // as long as shared_bias_bytes says
  };
  static constexpr int64_t kBiasRoom = bias_room<Shared>();
};

template <class S, bool kHasBias>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    forward_kernel(const __grid_constant__ ForwardPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  constexpr int kThreads = S::kThreads, kMTiles = S::kMTiles, kStages = S::kStages;
  constexpr int kColumns = S::kColumns;
  constexpr Side kQueries = Side::kQueries;
  const Problem& p = plan.call.problem;
  const Inputs& in = plan.call.in;
  auto& shared = shared_memory<typename S::Shared>();
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.group, plan.key_heads);
  if (!place.exists(p.query_grid)) return;
  const int64_t first_query = place.batch * p.query_tokens();
  const RowSource query =
      row_source(in.query, first_query, place.head, p.heads, p.head_dim, sizeof(T));

  // ---- Tables and queries --------------------------------------------------------------
  if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
    clear_block<sizeof(shared.query) + sizeof(shared.key) + sizeof(shared.value), kThreads>(
        shared.query);
  }
  fill_tables<kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns,
                                            place.batch, place.first);
  const float* bias = nullptr;
  if constexpr (kHasBias) {
    fill_bias_tables<kThreads>(&shared.bias, p, plan.rows, plan.columns);
    bias = bring_bias<kThreads, S::kBiasRoom>(p, in.bias, place.batch, place.head,
                                              shared.bias_table);
  }
  __syncthreads();
  copy_rows<Layout, S::kRows, kThreads>(ptx::shared_address(shared.query), query,
                                        shared.tables.row_token);
  Walk walk;
  walk.start<kQueries>(shared.tables, p, plan.rows, p.additional, kColumns);
  RowView view;
  view.start(shared.tables, plan.rows, warp_row + threadIdx.x % S::kWarpRows);

  // ---- Walk over the keys --------------------------------------------------------------
  KeyStream<Layout, kColumns, kThreads, sizeof(T)> stream(p, in, place, shared.tables);
  stream.follow(walk, p, in, place);
  if (walk.more()) {
    if constexpr (kStages == 2) {
      stream.copy_both(shared.key[0], shared.value[0], walk);
    } else {
      stream.copy_keys(shared.key[0], walk);
    }
  }
  ptx::copy_async_commit();

  const float scale = static_cast<float>(p.scale);
  const bool prescaled = kHasBias || !(scale > 0);
  const float log2_scale = prescaled ? kLog2E : scale * kLog2E;
  RowOperand<Layout, kMTiles, S::kQueryHeld> rows(ptx::shared_address(shared.query), warp_row);
  if constexpr (S::kQueryHeld) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    rows.hold();
  }
  OnlineSoftmax<kMTiles> softmax;
  Accumulator scores[kMTiles][kColumns / 8], sums[kMTiles][S::kDim / 8];
  clear(sums);

  for (int current = 0; walk.more(); current = (current + 1) % kStages) {
    Walk next = walk;
    next.advance(plan.columns.order.extent);
    // The box at hand has arrived, and all warps are done with what the copies overwrite.
    ptx::copy_async_wait<0>();
    __syncthreads();
    if constexpr (kStages == 1) {
      stream.copy_values(shared.value[0], walk);
      ptx::copy_async_commit();
    }
    stream.follow(next, p, in, place);
    if constexpr (kStages == 2) {
      if (next.more()) {
        stream.copy_both(shared.key[1 - current], shared.value[1 - current], next);
      }
      ptx::copy_async_commit();
    }

    const uint64_t columns = view.columns(shared.tables, walk, plan.columns);
    const bool visible = __any_sync(kFullWarp, columns != 0);
    if (visible) {
      clear(scores);
      multiply_rows<T, S::kPrecision>(scores, rows, ptx::shared_address(shared.key[current]));
    }
    if constexpr (kStages == 1) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      if (next.more()) stream.copy_keys(shared.key[0], next);
      ptx::copy_async_commit();
    }
    if (visible) {
      if (kHasBias && !walk.in_list) {
        add_bias<Sides<kQueries>::kSign>(scores, scale, LaneMask<kMTiles>(columns), bias,
                                         shared.bias, p, walk, warp_row);
      } else {
        if (prescaled) {
          for_each_element(scores, [&](float& score, auto...) { score *= scale; });
        }
        if (!__all_sync(kFullWarp, all_columns<kColumns>(columns))) {
          const LaneMask<kMTiles> mask(columns);
          for_each_element(scores, [&](float& score, int m, int half, int n, int i) {
            if (!mask.test(m, half, n, i)) score = -kInfinity;
          });
        }
      }
      softmax.weigh(scores, log2_scale, sums);
      multiply_columns<T, S::kPrecision, Layout>(sums, scores,
                                                   ptx::shared_address(shared.value[current]));
    }
    walk = next;
  }
  ptx::copy_async_wait<0>();

  // ---- Output --------------------------------------------------------------------------
  softmax.finish();
  float factor[kMTiles][2];
  float* lse = static_cast<float*>(plan.call.lse) + first_query * p.heads + place.head;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[m][half] = softmax.empty(m, half) ? 0 : 1 / softmax.total[m][half];
      const int row = warp_row + 16 * m + 8 * half + threadIdx.x % kWarpLanes / 4;
      const int32_t token = shared.tables.row_token[row];
      if (threadIdx.x % 4 == 0 && token != kNoToken) {
        lse[int64_t{max(token, ~token)} * p.heads] = softmax.lse(m, half);
      }
    }
  }
  const RowSource out =
      row_source(plan.call.out, first_query, place.head, p.heads, p.value_dim, sizeof(T));
  __syncwarp();
  put_rows<T, Layout>(shared.query, warp_row, sums, factor);
  store_rows<Layout, S::kWarpRows>(shared.query, warp_row, shared.tables.row_token, out);
}

template <typename T, int kDim, int kRows, Precision kPrecision>
cudaError_t launch_forward(const ForwardPlan& plan, cudaStream_t stream) {
  using S = ForwardShape<T, kDim, kRows, kPrecision>;
  const Problem& p = plan.call.problem;
  const int64_t ctas = p.batch * p.heads * plan.rows.order.size;
  const int64_t bytes = sizeof(typename S::Shared);
  if (plan.call.in.bias == nullptr) {
    return launch(&forward_kernel<S, false>, ctas, S::kThreads, bytes, plan, stream);
  }
  return launch(&forward_kernel<S, true>, ctas, S::kThreads,
                bytes + shared_bias_bytes<S::kBiasRoom>(p), plan, stream);
}

}  // namespace jax_na::cuda::fused
