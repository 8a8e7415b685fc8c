// Where the elements of a product lie among the slots of windows.
//
// On every axis a slot is the bias row of its query and key less that of the window's first key,
// and bias rows are differences of relative class indices (fused/geometry.cuh). So the index of
// a slot is a sum: a part of the query, a part of the key and, as both are cut in tiles and
// boxes, a part of the box.
#pragma once

#include <cstdint>

#include "../fused/gemm.cuh"
#include "../fused/geometry.cuh"
#include "../fused/stream.cuh"
#include "plans.cuh"

namespace jax_na::cuda::gemm {

__device__ __forceinline__ int32_t slot_offset(const UnfusedPlan& plan,
                                               const int32_t (&at)[kMaxRank]) {
  return at[0] * plan.slot_step[0] + at[1] * plan.slot_step[1] + at[2] * plan.slot_step[2];
}

// The part of the box at hand: that of its first column.
__device__ __forceinline__ int32_t box_offset(const UnfusedPlan& plan, const Walk& walk) {
  const int32_t at[kMaxRank] = {walk.lo[0] + walk.at[0], walk.lo[1] + walk.at[1],
                                walk.lo[2] + walk.at[2]};
  return slot_offset(plan, at);
}

// The index of the first slot of a query and head.
__device__ __forceinline__ int64_t first_slot(const UnfusedPlan& plan, int64_t batch,
                                              int32_t token, int32_t head) {
  const Problem& p = plan.call.problem;
  return ((batch * p.query_tokens() + token) * p.heads + head) * plan.window.size;
}

// Rows are queries. Neighbouring lanes access neighbouring columns of one row, which are
// neighbouring slots as long as the box has them on its last axis: lane l has columns l and
// l + 32, and knows row l % 16 of its warp.
template <int kColumns>
struct RowSlots {
  static constexpr int kParts = kColumns / kWarpLanes;
  int32_t start[kMaxRank];  // relative class index of the window's first key
  int64_t first;            // slot of the window
  int64_t row;              // the row's part
  int32_t column[kParts];

  __device__ __forceinline__ RowSlots(const UnfusedPlan& plan, const TilePlace& place,
                                      const int32_t* row_token, int warp_row) {
    const Problem& p = plan.call.problem;
    const int lane = threadIdx.x % kWarpLanes;
    const int own = warp_row + lane % 16;
    plan.rows.tile.point(own, start);
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int32_t query = place.first[a] + p.window[a].dilation * start[a];
      start[a] += first_bias_row(p.window[a], p.axis_frame(place.batch, a), query);
    }
    const int32_t token = max(row_token[own], ~row_token[own]);
    first = first_slot(plan, place.batch, token, place.head);
    row = first - slot_offset(plan, start);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int32_t at[kMaxRank];
      plan.columns.order.point(lane + part * kWarpLanes, at);
      column[part] = slot_offset(plan, at);
    }
  }
};

// Whether this lane's column of a part is in the set.
__device__ __forceinline__ bool has_column(uint64_t columns, int part) {
  const uint32_t word = static_cast<uint32_t>(part == 0 ? columns : columns >> 32);
  return (word >> threadIdx.x % kWarpLanes & 1) != 0;
}

}  // namespace jax_na::cuda::gemm
