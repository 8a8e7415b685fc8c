// queries = slots keys: a CTA owns a tile of queries of one head and visits the keys that they
// see. The weights of a box arrive in an image, from where the prologue of its product takes
// those of visible elements.
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
struct GatherShape : Shape<T, kDim, kPrecision> {
  using Base = Shape<T, kDim, kPrecision>;
  using typename Base::Layout;
  using Weights = WeightImages<Image<T, Base::kColumns, true>, Base::kRows>;

  struct Shared {
    alignas(128) uint8_t key[2][Base::kColumns * Layout::kRowBytes];  // the result in the end
    Weights weights;
    Run runs[2 * Base::kRows];  // of the rows of the images
    ColumnTable<Base::kColumns> columns[kTables];
    RowTables<Base::kRows> tables;
  };
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    gather_kernel(const __grid_constant__ UnfusedPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  using Weights = typename S::Weights;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  auto& shared = shared_memory<typename S::Shared>();
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.one, plan.head_parts);
  if (!place.exists(p.query_grid)) return;
  shared.weights.start();
  fill_row_tables<Side::kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, place.batch,
                                                      place.first);
  __syncthreads();
  ColumnList list;
  list.start<Side::kQueries>(shared.tables, p, plan.rows, LeastKeys(p).count);
  ListView view;
  view.start(shared.tables, plan.rows, list, warp_row);
  const int32_t first_head = place.head * plan.cta_heads;
  QueryRow row(plan, place, first_head, shared.tables.row_token, warp_row);
  const auto* slots = static_cast<const T*>(plan.call.slots);
  const int32_t boxes = (list.size + kColumns - 1) / kColumns;
  const auto note_box = [&](int32_t box) {
    put_keys(&shared.columns[box % kTables], plan, list, box * kColumns, sizeof(T));
  };

  for (int32_t head = first_head; head < first_head + plan.cta_heads; ++head) {
    // ---- Walk over the keys ------------------------------------------------------------
    const RowSource keys =
        row_source(plan.call.keys, place.batch * p.key_tokens(), plan.group.quotient(head),
                   p.key_heads, p.head_dim, sizeof(T));
    // Returns which columns this lane's row sees.
    const auto copy_box = [&](int32_t box) {
      uint64_t columns = 0;
      if (box < boxes) {
        const auto& table = shared.columns[box % kTables];
        copy_rows<Layout, kColumns, kThreads>(ptx::shared_address(shared.key[box % 2]), keys,
                                              table.token);
        columns = view.columns(list, table);
        if (__any_sync(kFullWarp, columns != 0)) {
          const int image_row = box % 2 * S::kRows + warp_row;
          row.template put_run<typename Weights::Image>(shared.runs, image_row, columns,
                                                        table);
          copy_runs<typename Weights::Image, S::kWarpRows>(
              ptx::shared_address(shared.weights.rows), image_row, shared.runs, slots);
        }
      }
      ptx::copy_async_commit();
      return columns;
    };
    __syncthreads();  // all warps are done with the head before
    note_box(0);
    note_box(1);
    __syncthreads();
    uint64_t columns = copy_box(0);
    Accumulator sums[1][S::kDim / 8];
    clear(sums);

    for (int32_t box = 0; box < boxes; ++box) {
      // The box at hand has arrived, and all warps are done with what is overwritten now.
      ptx::copy_async_wait<0>();
      __syncthreads();
      const uint64_t next_columns = copy_box(box + 1);
      note_box(box + 2);
      if (__any_sync(kFullWarp, columns != 0)) {
        const Run* runs = shared.runs + box % 2 * S::kRows + warp_row + lane / 4;
        const int32_t row_part[2] = {runs[0].image, runs[8].image};
        Accumulator weights[1][kColumns / 8];
        shared.weights.get(weights, row_part, shared.columns[box % kTables].part,
                           LaneMask<1>(columns));
        multiply_columns<T, S::kPrecision, Layout>(sums, weights,
                                                   ptx::shared_address(shared.key[box % 2]));
      }
      columns = next_columns;
    }
    ptx::copy_async_wait<0>();

    // ---- Output --------------------------------------------------------------------------
    const int64_t first_row = place.batch * p.query_tokens();
    if (!std::is_same_v<T, float> && plan.call.wide_result) {
      float* result =
          static_cast<float*>(plan.call.queries) + (first_row * p.heads + head) * p.head_dim;
      store_partials(result, warp_row, shared.tables.row_token, sums, 1, p.heads * p.head_dim,
                     p.head_dim);
    } else {
      __syncthreads();
      const float one[1][2] = {{1, 1}};
      put_rows<T, Layout>(shared.key[0], warp_row, sums, one);
      store_rows<Layout, S::kWarpRows>(
          shared.key[0], warp_row, shared.tables.row_token,
          row_source(plan.call.queries, first_row, head, p.heads, p.head_dim, sizeof(T)));
    }
    row.advance(plan);
  }
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_gather(const UnfusedPlan& plan, cudaStream_t stream) {
  using S = GatherShape<T, kDim, kPrecision>;
  const Problem& p = plan.call.problem;
  return launch(&gather_kernel<S>, p.batch * plan.head_parts.value * plan.rows.order.size,
                S::kThreads, sizeof(typename S::Shared), plan, stream);
}

}  // namespace jax_na::cuda::gemm
