// slots = queries keys^T: a CTA owns a tile of queries of one head and visits the keys that
// they see. The epilogue of a box's product puts every visible element in its slot.
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
struct PairShape : Shape<T, kDim, kPrecision> {
  using Base = Shape<T, kDim, kPrecision>;
  using typename Base::Layout;
  using Products = Image<float, Base::kColumns, false>;
  // Two stages need one barrier per box; one needs two barriers, and half of the memory.
  static constexpr int kStages = Layout::kRowBytes <= 512 ? 2 : 1;
  static constexpr bool kQueryHeld =
      Layout::kRowBytes <= 128 && kPrecision == Precision::kDefault;

  struct Shared {
    alignas(128) uint8_t query[Base::kRows * Layout::kRowBytes];
    alignas(128) uint8_t key[kStages][Base::kColumns * Layout::kRowBytes];
    alignas(16) uint8_t products[Base::kRows * Products::kRowBytes];
    Run runs[Base::kRows];
    ColumnTable<Base::kColumns> columns[kTables];
    RowTables<Base::kRows> tables;
  };
};

// Where products go.
template <typename T>
struct SlotArray {
  void* slots;
  bool wide;

  // Calls fn(slots) with the array as what it is.
  template <class Fn>
  __device__ __forceinline__ void visit(const Fn& fn) const {
    if (std::is_same_v<T, float> || wide) {
      fn(static_cast<float*>(slots));
    } else {
      fn(static_cast<T*>(slots));
    }
  }
};

// Stores the runs of a warp's rows, by way of shared memory: in registers the lanes of a warp
// hold eight rows at a time.
template <class S>
__device__ __forceinline__ void store_product(const SlotArray<typename S::T>& array,
                                              Accumulator (&product)[1][S::kColumns / 8],
                                              uint8_t* image, const Run* runs, int warp_row,
                                              const int32_t* column_part, uint64_t columns) {
  using Image = typename S::Products;
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t row_part[2] = {runs[warp_row + lane / 4].image,
                               runs[warp_row + lane / 4 + 8].image};
  for_each_place(product, row_part, column_part, LaneMask<1>(columns),
                 [&](float x, int32_t at, bool seen) {
                   if (seen) *reinterpret_cast<float*>(image + at) = x;
                 });
  __syncwarp();
  // Half of the warp takes a row, which on average has too few slots for all of it.
  constexpr int kLanes = kWarpLanes / 2;
  const int row = warp_row + lane / kLanes;
  const uint8_t* from = image + row * Image::kRowBytes + lane % kLanes * Image::kBytes;
  array.visit([&](auto* slots) {
    using Slot = std::remove_pointer_t<decltype(slots)>;
    slots += lane % kLanes;
#pragma unroll
    for (int r = 0; r < S::kWarpRows; r += 2) {
      const Run run = runs[row + r];
      const auto* products = reinterpret_cast<const float*>(from + r * Image::kRowBytes);
      const int32_t rest = run.count - lane % kLanes;
#pragma unroll
      for (int slot = 0; slot < S::kColumns; slot += kLanes) {
        if (slot < rest) slots[run.first + slot] = static_cast<Slot>(products[slot]);
      }
    }
  });
}

// Zeros for the slots of a warp's rows that no key fills, whatever runs have brought there.
template <class S>
__device__ __forceinline__ void clear_empty_slots(const SlotArray<typename S::T>& array,
                                                  const UnfusedPlan& plan,
                                                  const RowTables<S::kRows>& tables,
                                                  const QueryRow& row, int warp_row) {
  __syncwarp();
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
    begin[a] = interval.lo - row.start[a];
    end[a] = interval.hi - row.start[a];
    full = full && begin[a] <= 0 && end[a] >= plan.window.extent[a];
  }
  const unsigned gaps = __ballot_sync(kFullWarp, exists && !full);
#pragma unroll 1
  for (int r = 0; r < S::kWarpRows; ++r) {
    if ((gaps >> r & 1) == 0) continue;
    const int64_t first = __shfl_sync(kFullWarp, row.first, r);
    int32_t from[kMaxRank], to[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      from[a] = __shfl_sync(kFullWarp, begin[a], r);
      to[a] = __shfl_sync(kFullWarp, end[a], r);
    }
    array.visit([&](auto* slots) {
      using Slot = std::remove_pointer_t<decltype(slots)>;
#pragma unroll 1
      for (int32_t slot = lane; slot < plan.window.size; slot += kWarpLanes) {
        plan.window.point(slot, at);
        const bool held = at[0] >= from[0] && at[0] < to[0] && at[1] >= from[1] &&
                          at[1] < to[1] && at[2] >= from[2] && at[2] < to[2];
        if (!held) slots[first + slot] = static_cast<Slot>(0.0f);
      }
    });
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

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.one, plan.head_parts);
  if (!place.exists(p.query_grid)) return;

  // ---- Tables --------------------------------------------------------------------------
  if (p.head_dim < S::kDim) {
    clear_block<sizeof(shared.query) + sizeof(shared.key), kThreads>(shared.query);
  }
  fill_row_tables<Side::kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, place.batch,
                                                      place.first);
  __syncthreads();
  ColumnList list;
  list.start<Side::kQueries>(shared.tables, p, plan.rows, LeastKeys(p).count);
  ListView view;
  view.start(shared.tables, plan.rows, list, warp_row);
  const int32_t first_head = place.head * plan.cta_heads;
  QueryRow row(plan, place, first_head, shared.tables.row_token, warp_row);
  const SlotArray<T> array{plan.call.slots, plan.call.wide_result};
  const int32_t boxes = (list.size + kColumns - 1) / kColumns;
  const auto note_box = [&](int32_t box) {
    put_keys(&shared.columns[box % kTables], plan, list, box * kColumns, sizeof(float));
  };

  for (int32_t head = first_head; head < first_head + plan.cta_heads; ++head) {
    // ---- Queries -----------------------------------------------------------------------
    __syncthreads();  // all warps are done with the head before
    copy_rows<Layout, S::kRows, kThreads>(
        ptx::shared_address(shared.query),
        row_source(plan.call.queries, place.batch * p.query_tokens(), head, p.heads,
                   p.head_dim, sizeof(T)),
        shared.tables.row_token);
    note_box(0);
    note_box(1);

    // ---- Walk over the keys ------------------------------------------------------------
    const RowSource keys =
        row_source(plan.call.keys, place.batch * p.key_tokens(), plan.group.quotient(head),
                   p.key_heads, p.head_dim, sizeof(T));
    const auto copy_box = [&](int32_t box) {
      if (box < boxes) {
        copy_rows<Layout, kColumns, kThreads>(ptx::shared_address(shared.key[box % kStages]),
                                              keys, shared.columns[box % kTables].token);
      }
      ptx::copy_async_commit();
    };
    __syncthreads();
    copy_box(0);
    RowOperand<Layout, 1, S::kQueryHeld> query(ptx::shared_address(shared.query), warp_row);
    if constexpr (S::kQueryHeld) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      query.hold();
    }

    for (int32_t box = 0; box < boxes; ++box) {
      // The box at hand has arrived, and all warps are done with what is overwritten now.
      ptx::copy_async_wait<0>();
      __syncthreads();
      if constexpr (kStages == 2) copy_box(box + 1);
      note_box(box + 2);
      const auto& table = shared.columns[box % kTables];
      const uint64_t columns = view.columns(list, table);
      const bool visible = __any_sync(kFullWarp, columns != 0);
      Accumulator product[1][kColumns / 8];
      if (visible) {
        clear(product);
        multiply_rows<T, S::kPrecision>(product, query,
                                        ptx::shared_address(shared.key[box % kStages]));
      }
      if constexpr (kStages == 1) {
        __syncthreads();
        copy_box(box + 1);
      }
      if (visible) {
        row.template put_run<typename S::Products>(shared.runs, warp_row, columns, table);
        store_product<S>(array, product, shared.products, shared.runs, warp_row, table.part,
                         columns);
      }
    }
    ptx::copy_async_wait<0>();
    clear_empty_slots<S>(array, plan, shared.tables, row, warp_row);
    row.advance(plan);
  }
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_pair(const UnfusedPlan& plan, cudaStream_t stream) {
  using S = PairShape<T, kDim, kPrecision>;
  const Problem& p = plan.call.problem;
  return launch(&pair_kernel<S>, p.batch * plan.head_parts.value * plan.rows.order.size,
                S::kThreads, sizeof(typename S::Shared), plan, stream);
}

}  // namespace jax_na::cuda::gemm
