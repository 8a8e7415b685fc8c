// keys = slots^T queries: a CTA owns a tile of keys of one key head and visits the queries that
// see them, of every query head of the group. The prologue of a box's product brings the weights
// of its visible elements from their slots.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../fused/gemm.cuh"
#include "../fused/geometry.cuh"
#include "../fused/launch.cuh"
#include "../fused/softmax.cuh"
#include "../fused/staging.cuh"
#include "../fused/stream.cuh"
#include "plans.cuh"
#include "slots.cuh"

namespace jax_na::cuda::gemm {

template <typename T, int kDim, Precision kPrecision>
struct ScatterShape : Shape<T, kDim, kPrecision> {
  using Base = Shape<T, kDim, kPrecision>;
  using typename Base::Layout;

  struct Shared {
    alignas(128) uint8_t query[2][Base::kColumns * Layout::kRowBytes];  // the result in the end
    alignas(16) int64_t column[2][Base::kColumns];  // the queries' parts of slots
    AxisFrame frame[kMaxRank];
    TileTables<Base::kRows> tables;
  };
};

// The queries of one head after the other, box by box.
struct GroupWalk {
  Walk walk;
  int32_t member, members;  // of the group

  __device__ __forceinline__ GroupWalk(const Walk& first, const Divisor& group)
      : walk(first), member(0), members(first.more() ? group.value : 0) {}

  __device__ __forceinline__ bool more() const { return member < members; }

  __device__ __forceinline__ void advance(const int32_t (&extent)[kMaxRank]) {
    walk.advance(extent);
    if (walk.more()) return;
    ++member;
    walk.at[0] = 0;
    walk.in_list = false;
  }
};

// Threads and queries of a box correspond.
__device__ __forceinline__ int64_t query_part(const UnfusedPlan& plan, const GroupWalk& queries,
                                              const AxisFrame* frame, const TilePlace& place,
                                              const int32_t* origin, const ColumnEntry& entry,
                                              const int32_t (&at)[kMaxRank]) {
  const AxisWindow* window = plan.call.problem.window;
  int32_t start[kMaxRank];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const int32_t relative = queries.walk.lo[a] + queries.walk.at[a] + at[a];
    const int32_t query = origin[a] + window[a].dilation * relative;
    start[a] = relative + first_bias_row(window[a], frame[a], query);
  }
  const int32_t head = place.key_head * plan.group.value + queries.member;
  return first_slot(plan, place.batch, queries.walk.token() + entry.token, head) -
         slot_offset(plan, start);
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    scatter_kernel(const __grid_constant__ UnfusedPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  auto& shared = shared_memory<typename S::Shared>();
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.one, plan.key_heads);
  if (!place.exists(p.key_grid)) return;
  fill_tables<Side::kKeys, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns,
                                               place.batch, place.first);
  if (threadIdx.x < kMaxRank) {
    shared.frame[threadIdx.x] = p.axis_frame(place.batch, threadIdx.x);
  }
  __syncthreads();
  Walk first;
  first.start<Side::kKeys>(shared.tables, p, plan.rows, 0, 0);
  GroupWalk queries(first, plan.group);
  RowView view;
  view.start(shared.tables, plan.rows, warp_row + lane % S::kWarpRows);

  // ---- Walk over the queries -----------------------------------------------------------
  int32_t column_at[kMaxRank];  // of the query in a box that is this thread's
  plan.columns.order.point(threadIdx.x, column_at);
  const auto bring_box = [&](int stage, const GroupWalk& at) {
    if (at.more()) {
      const int32_t head = place.key_head * plan.group.value + at.member;
      copy_columns<Layout, kColumns, kThreads>(
          shared.tables.column, at.walk.token(), at.walk.guarded_limits(),
          ptx::shared_address(shared.query[stage]),
          row_source(plan.call.queries, place.batch * p.query_tokens(), head, p.heads,
                     p.head_dim, sizeof(T)));
      if (threadIdx.x < kColumns) {
        shared.column[stage][threadIdx.x] =
            query_part(plan, at, shared.frame, place, shared.tables.origin,
                       shared.tables.column[threadIdx.x], column_at);
      }
    }
    ptx::copy_async_commit();
  };
  bring_box(0, queries);

  // The keys' parts of slots, of this lane's rows.
  int32_t key_part[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int32_t at[kMaxRank];
    plan.rows.tile.point(warp_row + 8 * half + lane / 4, at);
    key_part[half] = slot_offset(plan, at);
  }
  Accumulator sums[1][S::kDim / 8];
  clear(sums);

  for (int current = 0; queries.more(); current = 1 - current) {
    GroupWalk next = queries;
    next.advance(plan.columns.order.extent);
    // The box at hand has arrived, and all warps are done with what the copies overwrite.
    ptx::copy_async_wait<0>();
    __syncthreads();
    bring_box(1 - current, next);
    const uint64_t columns = view.columns(shared.tables, queries.walk, plan.columns);
    if (__any_sync(kFullWarp, columns != 0)) {
      // Eight neighbouring rows at a time, which are neighbouring slots as long as the tile has
      // them on its last axis.
      const LaneMask<1> mask(columns);
      const auto* parts =
          reinterpret_cast<const longlong2*>(shared.column[current]) + lane % 4;
      const T* array = static_cast<const T*>(plan.call.slots);
      Accumulator weights[1][kColumns / 8];
      for_each_element(weights, [&](float& weight, int m, int half, int n, int i) {
        const longlong2 pair = parts[4 * n];
        const T* slot = array + (i == 0 ? pair.x : pair.y) + key_part[half];
        weight = mask.test(m, half, n, i) ? static_cast<float>(__ldg(slot)) : 0.0f;
      });
      multiply_columns<T, S::kPrecision, Layout>(sums, weights,
                                                 ptx::shared_address(shared.query[current]));
    }
    queries = next;
  }
  ptx::copy_async_wait<0>();

  // ---- Output --------------------------------------------------------------------------
  const int64_t first_row = place.batch * p.key_tokens();
  if (!std::is_same_v<T, float> && plan.call.wide_result) {
    float* result = static_cast<float*>(plan.call.keys) +
                    (first_row * p.key_heads + place.key_head) * p.head_dim;
    store_partials(result, warp_row, shared.tables.row_token, sums, 1,
                   p.key_heads * p.head_dim, p.head_dim);
    return;
  }
  __syncthreads();
  const float one[1][2] = {{1, 1}};
  put_rows<T, Layout>(shared.query[0], warp_row, sums, one);
  store_rows<Layout, S::kWarpRows>(
      shared.query[0], warp_row, shared.tables.row_token,
      row_source(plan.call.keys, first_row, place.key_head, p.key_heads, p.head_dim, sizeof(T)));
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_scatter(const UnfusedPlan& plan, cudaStream_t stream) {
  using S = ScatterShape<T, kDim, kPrecision>;
  const Problem& p = plan.call.problem;
  return launch(&scatter_kernel<S>, p.batch * p.key_heads * plan.rows.order.size, S::kThreads,
                sizeof(typename S::Shared), plan, stream);
}

}  // namespace jax_na::cuda::gemm
