// slots = queries keys^T: a CTA owns a tile of queries of one head and visits the keys that they
// see. The epilogue of a box's product puts every visible element in its slot.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../fused/gemm.cuh"
#include "../fused/geometry.cuh"
#include "../fused/launch.cuh"
#include "../fused/staging.cuh"
#include "../fused/stream.cuh"
#include "plans.cuh"
#include "slots.cuh"

namespace jax_na::cuda::gemm {

template <typename T, int kDim, Precision kPrecision>
struct PairShape : Shape<T, kDim, kPrecision> {
  using Base = Shape<T, kDim, kPrecision>;
  using typename Base::Layout;
  using TileLayout = RowLayout<Base::kColumns * sizeof(float)>;
  // Two stages need one barrier per box; one needs two barriers, and half of the memory.
  static constexpr int kStages = Layout::kRowBytes <= 256 ? 2 : 1;
  static constexpr bool kQueryHeld = Layout::kRowBytes <= 128;

  struct Shared {
    alignas(128) uint8_t query[Base::kRows * Layout::kRowBytes];
    alignas(128) uint8_t key[kStages][Base::kColumns * Layout::kRowBytes];
    alignas(128) uint8_t product[Base::kRows * TileLayout::kRowBytes];
    TileTables<Base::kRows> tables;
  };
};

// Where products go.
template <typename T>
struct SlotArray {
  void* slots;
  bool wide;

  __device__ __forceinline__ void put(int64_t index, float x) const {
    if (std::is_same_v<T, float> || wide) {
      static_cast<float*>(slots)[index] = x;
    } else {
      static_cast<T*>(slots)[index] = static_cast<T>(x);
    }
  }
};

// Stores the visible elements of a product of one warp, by way of shared memory: in registers
// the lanes of a warp hold eight rows at a time.
template <class S>
__device__ __forceinline__ void store_product(
    const SlotArray<typename S::T>& array, Accumulator (&product)[1][S::kColumns / 8],
    uint8_t* block, int warp_row, uint64_t columns, const RowSlots<S::kColumns>& slots,
    int32_t box) {
  using Tile = typename S::TileLayout;
  const int lane = threadIdx.x % kWarpLanes;
  const float one[1][2] = {{1, 1}};
  __syncwarp();
  put_rows<float, Tile>(block, warp_row, product, one);
  __syncwarp();
#pragma unroll 4
  for (int r = 0; r < S::kWarpRows; ++r) {
    const uint64_t seen = __shfl_sync(kFullWarp, columns, r);
    const int64_t row = __shfl_sync(kFullWarp, slots.row, r) + box;
    if (seen == 0) continue;
#pragma unroll
    for (int part = 0; part < slots.kParts; ++part) {
      const int byte = (lane + part * kWarpLanes) * int{sizeof(float)};
      const uint8_t* from = block + Tile::offset(warp_row + r, byte / kChunkBytes);
      if (has_column(seen, part)) {
        array.put(row + slots.column[part],
                  *reinterpret_cast<const float*>(from + byte % kChunkBytes));
      }
    }
  }
}

// Zeros for the slots of a warp's rows that no key fills.
template <class S>
__device__ __forceinline__ void clear_empty_slots(const SlotArray<typename S::T>& array,
                                                  const UnfusedPlan& plan,
                                                  const TileTables<S::kRows>& tables,
                                                  const RowSlots<S::kColumns>& slots,
                                                  int warp_row) {
  const int lane = threadIdx.x % kWarpLanes;
  const int own = warp_row + lane % S::kWarpRows;
  const bool exists = tables.row_token[own] != kNoToken;
  int32_t at[kMaxRank], begin[kMaxRank], end[kMaxRank];
  plan.rows.tile.point(own, at);
  bool full = true;
  int32_t coordinates = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const Interval interval = tables.interval[exists ? coordinates + at[a] : 0];
    coordinates += plan.rows.tile.extent[a];
    begin[a] = interval.lo - slots.start[a];
    end[a] = interval.hi - slots.start[a];
    full = full && begin[a] <= 0 && end[a] >= plan.window.extent[a];
  }
  const unsigned gaps = __ballot_sync(kFullWarp, exists && !full);
#pragma unroll 1
  for (int r = 0; r < S::kWarpRows; ++r) {
    if ((gaps >> r & 1) == 0) continue;
    const int64_t first = __shfl_sync(kFullWarp, slots.first, r);
    int32_t from[kMaxRank], to[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      from[a] = __shfl_sync(kFullWarp, begin[a], r);
      to[a] = __shfl_sync(kFullWarp, end[a], r);
    }
    for (int32_t slot = lane; slot < plan.window.size; slot += kWarpLanes) {
      plan.window.point(slot, at);
      const bool held = at[0] >= from[0] && at[0] < to[0] && at[1] >= from[1] &&
                        at[1] < to[1] && at[2] >= from[2] && at[2] < to[2];
      if (!held) array.put(first + slot, 0);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    pair_kernel(const __grid_constant__ UnfusedPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  constexpr int kThreads = S::kThreads, kStages = S::kStages, kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  auto& shared = shared_memory<typename S::Shared>();
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.group, plan.key_heads);
  if (!place.exists(p.query_grid)) return;

  // ---- Tables and queries --------------------------------------------------------------
  if (p.head_dim < S::kDim) {
    clear_block<sizeof(shared.query) + sizeof(shared.key), kThreads>(shared.query);
  }
  fill_tables<Side::kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns,
                                                  place.batch, place.first);
  __syncthreads();
  copy_rows<Layout, S::kRows, kThreads>(
      ptx::shared_address(shared.query),
      row_source(plan.call.queries, place.batch * p.query_tokens(), place.head, p.heads,
                 p.head_dim, sizeof(T)),
      shared.tables.row_token);
  Walk walk;
  walk.start<Side::kQueries>(shared.tables, p, plan.rows, 0, 0);
  RowView view;
  view.start(shared.tables, plan.rows, warp_row + threadIdx.x % S::kWarpRows);
  const RowSlots<kColumns> slots(plan, place, shared.tables.row_token, warp_row);
  const SlotArray<T> array{plan.call.slots, plan.call.wide_result};

  // ---- Walk over the keys --------------------------------------------------------------
  const RowSource keys = row_source(plan.call.keys, place.batch * p.key_tokens(),
                                    place.key_head, p.key_heads, p.head_dim, sizeof(T));
  const auto copy_box = [&](int stage, const Walk& at) {
    if (at.more()) {
      copy_columns<Layout, kColumns, kThreads>(shared.tables.column, at.token(),
                                               at.guarded_limits(),
                                               ptx::shared_address(shared.key[stage]), keys);
    }
    ptx::copy_async_commit();
  };
  copy_box(0, walk);
  RowOperand<Layout, 1, S::kQueryHeld> query(ptx::shared_address(shared.query), warp_row);
  if constexpr (S::kQueryHeld) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    query.hold();
  }

  for (int current = 0; walk.more(); current = (current + 1) % kStages) {
    Walk next = walk;
    next.advance(plan.columns.order.extent);
    // The box at hand has arrived, and all warps are done with what the copies overwrite.
    ptx::copy_async_wait<0>();
    __syncthreads();
    if constexpr (kStages == 2) copy_box(1 - current, next);
    const uint64_t columns = view.columns(shared.tables, walk, plan.columns);
    const bool visible = __any_sync(kFullWarp, columns != 0);
    Accumulator product[1][kColumns / 8];
    if (visible) {
      clear(product);
      multiply_rows<T, S::kPrecision>(product, query, ptx::shared_address(shared.key[current]));
    }
    if constexpr (kStages == 1) {
      __syncthreads();
      copy_box(0, next);
    }
    if (visible) {
      store_product<S>(array, product, shared.product, warp_row, columns, slots,
                       box_offset(plan, walk));
    }
    walk = next;
  }
  ptx::copy_async_wait<0>();
  clear_empty_slots<S>(array, plan, shared.tables, slots, warp_row);
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_pair(const UnfusedPlan& plan, cudaStream_t stream) {
  using S = PairShape<T, kDim, kPrecision>;
  const Problem& p = plan.call.problem;
  return launch(&pair_kernel<S>, p.batch * p.heads * plan.rows.order.size, S::kThreads,
                sizeof(typename S::Shared), plan, stream);
}

}  // namespace jax_na::cuda::gemm
