// keys = slots^T queries: a CTA owns a tile of keys of one key head and visits the queries
// that see them, of every query head of the group. The weights of a box arrive in an image,
// from where the prologue of its product takes those of visible elements.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../fused/gemm.cuh"
#include "../fused/geometry.cuh"
#include "../fused/launch.cuh"
#include "../fused/softmax.cuh"
#include "../fused/staging.cuh"
#include "../fused/stream.cuh"
#include "columns.cuh"
#include "plans.cuh"
#include "slots.cuh"

namespace jax_na::cuda::gemm {

template <typename T, int kDim, Precision kPrecision>
struct ScatterShape : Shape<T, kDim, kPrecision> {
  using Base = Shape<T, kDim, kPrecision>;
  using typename Base::Layout;
  using Weights = WeightImages<Image<T, most_spanned(sizeof(T)), true>, Base::kColumns>;
  static constexpr int kResident = Base::kResident < 4 ? Base::kResident : 4;

  struct Shared {
    alignas(128) uint8_t query[2][Base::kColumns * Layout::kRowBytes];  // result in the end
    Weights weights;
    Run runs[kTables][Base::kColumns];
    ColumnTable<Base::kColumns> columns[kTables];
    AxisFrame frame[kMaxRank];
    RowTables<Base::kRows> tables;
  };
};

// The queries of one head after the other, box by box.
struct GroupWalk {
  int32_t first_column, size;  // of the list
  int32_t member, members;     // of the group
  int32_t box;

  __device__ __forceinline__ GroupWalk(const ColumnList& list, const Divisor& group)
      : first_column(0),
        size(list.size),
        member(0),
        members(size > 0 ? group.value : 0),
        box(0) {}

  __device__ __forceinline__ bool more() const { return member < members; }

  __device__ __forceinline__ void advance(int32_t columns) {
    ++box;
    first_column += columns;
    if (first_column < size) return;
    first_column = 0;
    ++member;
  }
};

// The run of a query, from the slot of the first key of its window in the tile to that of the
// last one, in row `row` of an image. It may hold slots without a key.
template <class Image>
__device__ __forceinline__ Run run_in_tile(const UnfusedPlan& plan, const AxisFrame* frame,
                                           const int32_t* origin,
                                           const int32_t (&relative)[kMaxRank],
                                           int64_t first_slot, int row) {
  const AxisWindow* window = plan.call.problem.window;
  int32_t from = 0, to = 0;  // slots of the tile's keys, counted as if the window were endless
  bool any = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const int32_t query = origin[a] + window[a].dilation * relative[a];
    const int32_t start = relative[a] + first_bias_row(window[a], frame[a], query);
    const int32_t begin = max(0, start);
    const int32_t end = min(plan.rows.tile.extent[a], start + window[a].kernel_size);
    any = any && begin < end;
    first_slot -= start * plan.slot_step[a];
    from += begin * plan.slot_step[a];
    to += (end - 1) * plan.slot_step[a];
  }
  return any ? Image::run(row, first_slot + from, to - from + 1, from * Image::kBytes)
             : Run{0, 0, 0};
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    scatter_kernel(const __grid_constant__ UnfusedPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  using Weights = typename S::Weights;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  auto& shared = shared_memory<typename S::Shared>();
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int warp_row = warp * S::kWarpRows;  // the warp's first one

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.one, plan.head_parts);
  if (!place.exists(p.key_grid)) return;
  shared.weights.start();
  fill_row_tables<Side::kKeys, S::kRows, kThreads>(&shared.tables, p, plan.rows, place.batch,
                                                   place.first);
  if (threadIdx.x < kMaxRank) {
    shared.frame[threadIdx.x] = p.axis_frame(place.batch, threadIdx.x);
  }
  __syncthreads();
  constexpr int32_t kLeastQueries[kMaxRank] = {1, 1, 1};
  ColumnList list;
  list.start<Side::kKeys>(shared.tables, p, plan.rows, kLeastQueries);
  ListView view;
  view.start(shared.tables, plan.rows, list, warp_row);

  int32_t row_part[2];  // of the keys of this lane's rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int32_t at[kMaxRank];
    plan.rows.tile.point(warp_row + 8 * half + lane / 4, at);
    row_part[half] = slot_offset(plan, at) * int32_t{sizeof(T)};
  }

  const int32_t first_head = place.head * plan.cta_heads;
  for (int32_t head = first_head; head < first_head + plan.cta_heads; ++head) {
    // ---- Walk over the queries ---------------------------------------------------------
    const auto head_of = [&](const GroupWalk& at) {
      return head * plan.group.value + at.member;
    };
    const auto note_box = [&](const GroupWalk& queries) {
      if (threadIdx.x >= kColumns || !queries.more()) return;
      int32_t at[kMaxRank];
      list.point(queries.first_column + threadIdx.x, at);
      const int32_t token = list.token(at);
      Run run = {0, 0, 0};
      if (token != kNoToken) {
        const int32_t relative[kMaxRank] = {
            list.tokens.lo[0] + at[0], list.tokens.lo[1] + at[1], list.tokens.lo[2] + at[2]};
        run = run_in_tile<typename Weights::Image>(
            plan, shared.frame, shared.tables.origin, relative,
            first_slot(plan, place.batch, token, head_of(queries)),
            queries.box % 2 * kColumns + threadIdx.x);
      }
      shared.runs[queries.box % kTables][threadIdx.x] = run;
      shared.columns[queries.box % kTables].put(list, queries.first_column + threadIdx.x, at,
                                                run.image);
    };
    const auto copy_box = [&](const GroupWalk& queries) {
      if (queries.more()) {
        copy_rows<Layout, kColumns, kThreads>(
            ptx::shared_address(shared.query[queries.box % 2]),
            row_source(plan.call.queries, place.batch * p.query_tokens(), head_of(queries),
                       p.heads, p.head_dim, sizeof(T)),
            shared.columns[queries.box % kTables].token);
        constexpr int kShare = kColumns / S::kWarps;  // of the runs
        copy_runs<typename Weights::Image, kShare>(
            ptx::shared_address(shared.weights.rows[queries.box % 2 * kColumns]),
            warp * kShare, shared.runs[queries.box % kTables],
            static_cast<const T*>(plan.call.slots));
      }
      ptx::copy_async_commit();
    };
    __syncthreads();  // all warps are done with the head before
    GroupWalk queries(list, plan.group), noted = queries;
    note_box(noted);
    noted.advance(kColumns);
    note_box(noted);
    __syncthreads();
    copy_box(queries);

    Accumulator sums[1][S::kDim / 8];
    clear(sums);

    while (queries.more()) {
      const int32_t box = queries.box;
      queries.advance(kColumns);
      noted.advance(kColumns);
      // The box at hand has arrived, and all warps are done with what is overwritten now.
      ptx::copy_async_wait<0>();
      __syncthreads();
      copy_box(queries);
      note_box(noted);
      const auto& table = shared.columns[box % kTables];
      const uint64_t columns = view.columns(list, table);
      if (__any_sync(kFullWarp, columns != 0)) {
        Accumulator weights[1][kColumns / 8];
        shared.weights.get(weights, row_part, table.part, LaneMask<1>(columns));
        multiply_columns<T, S::kPrecision, Layout>(sums, weights,
                                                   ptx::shared_address(shared.query[box % 2]));
      }
    }
    ptx::copy_async_wait<0>();

    // ---- Output --------------------------------------------------------------------------
    const int64_t first_row = place.batch * p.key_tokens();
    if (!std::is_same_v<T, float> && plan.call.wide_result) {
      float* result =
          static_cast<float*>(plan.call.keys) + (first_row * p.key_heads + head) * p.head_dim;
      store_partials(result, warp_row, shared.tables.row_token, sums, 1,
                     p.key_heads * p.head_dim, p.head_dim);
    } else {
      __syncthreads();
      const float one[1][2] = {{1, 1}};
      put_rows<T, Layout>(shared.query[0], warp_row, sums, one);
      store_rows<Layout, S::kWarpRows>(
          shared.query[0], warp_row, shared.tables.row_token,
          row_source(plan.call.keys, first_row, head, p.key_heads, p.head_dim, sizeof(T)));
    }
  }
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_scatter(const UnfusedPlan& plan, cudaStream_t stream) {
  using S = ScatterShape<T, kDim, kPrecision>;
  const Problem& p = plan.call.problem;
  return launch(&scatter_kernel<S>, p.batch * plan.head_parts.value * plan.rows.order.size,
                S::kThreads, sizeof(typename S::Shared), plan, stream);
}

}  // namespace jax_na::cuda::gemm
