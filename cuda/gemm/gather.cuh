// queries = slots keys: a CTA owns a tile of queries of one head and visits the keys that they
// see. The prologue of a box's product brings the weights of its visible elements from their
// slots.
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
struct GatherShape : Shape<T, kDim, kPrecision> {
  using Base = Shape<T, kDim, kPrecision>;
  using typename Base::Layout;
  using TileLayout = RowLayout<Base::kColumns * sizeof(T)>;

  struct Shared {
    alignas(128) uint8_t key[2][Base::kColumns * Layout::kRowBytes];  // the result in the end
    alignas(128) uint8_t weights[Base::kRows * TileLayout::kRowBytes];
    TileTables<Base::kRows> tables;
  };
};

// The weights of one warp's rows and a box, on their way from global to shared memory: lane l
// has columns l and l + 32 of every row; zeros where a row does not see the column.
template <class S>
struct WeightTile {
  using T = typename S::T;
  using Tile = typename S::TileLayout;
  static constexpr int kParts = S::kColumns / kWarpLanes;
  T weights[S::kWarpRows][kParts];

  __device__ __forceinline__ void load(const T* array, uint64_t columns,
                                       const RowSlots<S::kColumns>& slots, int32_t box) {
#pragma unroll
    for (int r = 0; r < S::kWarpRows; ++r) {
      const uint64_t seen = __shfl_sync(kFullWarp, columns, r);
      const T* row = array + __shfl_sync(kFullWarp, slots.row, r) + box;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        weights[r][part] =
            has_column(seen, part) ? __ldg(row + slots.column[part]) : static_cast<T>(0.0f);
      }
    }
  }

  __device__ __forceinline__ void put(uint8_t* block, int warp_row) const {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int r = 0; r < S::kWarpRows; ++r) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int byte = (lane + part * kWarpLanes) * int{sizeof(T)};
        uint8_t* to = block + Tile::offset(warp_row + r, byte / kChunkBytes);
        *reinterpret_cast<T*>(to + byte % kChunkBytes) = weights[r][part];
      }
    }
  }
};

// Reads the weights of a warp's rows as if they were a product.
template <class S>
__device__ __forceinline__ void get_weights(Accumulator (&to)[1][S::kColumns / 8],
                                            const uint8_t* block, int warp_row) {
  using T = typename S::T;
  const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp_row + 8 * half + lane / 4;
#pragma unroll
    for (int n = 0; n < S::kColumns / 8; ++n) {
      const int byte = (8 * n + lane % 4 * 2) * int{sizeof(T)};
      const auto* from = reinterpret_cast<const T*>(
          block + S::TileLayout::offset(r, byte / kChunkBytes) + byte % kChunkBytes);
      to[0][n][2 * half] = static_cast<float>(from[0]);
      to[0][n][2 * half + 1] = static_cast<float>(from[1]);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    gather_kernel(const __grid_constant__ UnfusedPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  auto& shared = shared_memory<typename S::Shared>();
  const int warp_row = threadIdx.x / kWarpLanes * S::kWarpRows;  // the warp's first one

  const TilePlace place(blockIdx.x, plan.rows, p.window, plan.group, plan.key_heads);
  if (!place.exists(p.query_grid)) return;
  fill_tables<Side::kQueries, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns,
                                                  place.batch, place.first);
  __syncthreads();
  Walk walk;
  walk.start<Side::kQueries>(shared.tables, p, plan.rows, 0, 0);
  RowView view;
  view.start(shared.tables, plan.rows, warp_row + threadIdx.x % S::kWarpRows);
  const RowSlots<kColumns> slots(plan, place, shared.tables.row_token, warp_row);

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
  Accumulator sums[1][S::kDim / 8];
  clear(sums);

  for (int current = 0; walk.more(); current = 1 - current) {
    Walk next = walk;
    next.advance(plan.columns.order.extent);
    const uint64_t columns = view.columns(shared.tables, walk, plan.columns);
    const bool visible = __any_sync(kFullWarp, columns != 0);
    WeightTile<S> tile;
    if (visible) {
      tile.load(static_cast<const T*>(plan.call.slots), columns, slots,
                box_offset(plan, walk));
    }
    // The box at hand has arrived, and all warps are done with what the copies overwrite.
    ptx::copy_async_wait<0>();
    __syncthreads();
    copy_box(1 - current, next);
    if (visible) {
      tile.put(shared.weights, warp_row);
      __syncwarp();
      Accumulator weights[1][kColumns / 8];
      get_weights<S>(weights, shared.weights, warp_row);
      multiply_columns<T, S::kPrecision, Layout>(sums, weights,
                                                 ptx::shared_address(shared.key[current]));
    }
    walk = next;
  }
  ptx::copy_async_wait<0>();

  // ---- Output --------------------------------------------------------------------------
  const int64_t first_row = place.batch * p.query_tokens();
  if (!std::is_same_v<T, float> && plan.call.wide_result) {
    float* result = static_cast<float*>(plan.call.queries) +
                    (first_row * p.heads + place.head) * p.head_dim;
    store_partials(result, warp_row, shared.tables.row_token, sums, 1,
                   p.heads * p.head_dim, p.head_dim);
    return;
  }
  __syncthreads();
  const float one[1][2] = {{1, 1}};
  put_rows<T, Layout>(shared.key[0], warp_row, sums, one);
  store_rows<Layout, S::kWarpRows>(
      shared.key[0], warp_row, shared.tables.row_token,
      row_source(plan.call.queries, first_row, place.head, p.heads, p.head_dim, sizeof(T)));
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_gather(const UnfusedPlan& plan, cudaStream_t stream) {
  using S = GatherShape<T, kDim, kPrecision>;
  const Problem& p = plan.call.problem;
  return launch(&gather_kernel<S>, p.batch * p.heads * plan.rows.order.size, S::kThreads,
                sizeof(typename S::Shared), plan, stream);
}

}  // namespace jax_na::cuda::gemm
