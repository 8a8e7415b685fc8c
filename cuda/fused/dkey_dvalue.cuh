// Gradients of keys and values: a CTA owns a tile of keys of one key head and visits the
// queries that see them, of every query head of the group.
//
//   P^T = exp(scale K Q^T + bias - lse),  dV = P^T dO
//   dS^T = P^T (V dO^T - delta),          dK = scale dS^T Q
//
// Warps work in pairs where both sums of wide rows would leave no registers for more than 16
// rows: one makes P and dV of 32 rows, the other dS and dK of the same, so that every fragment
// of queries and dO feeds two products, as in the other kernels.
#pragma once

#include "bias.cuh"
#include "exchange.cuh"
#include "gemm.cuh"
#include "geometry.cuh"
#include "launch.cuh"
#include "plans.cuh"
#include "softmax.cuh"
#include "staging.cuh"
#include "stream.cuh"
#include "variants.h"

namespace jax_na::cuda::fused {

// Which gradients one launch makes. Those of wide heads do not fit the registers together.
enum class Wanted { kBoth, kDKey, kDValue };

template <typename T_, int kDim_, Precision kPrecision_, Wanted kWanted>
struct DKeyShape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr Precision kPrecision = kPrecision_;
  static constexpr bool kDKey = kWanted != Wanted::kDValue;
  static constexpr bool kDValue = kWanted != Wanted::kDKey;

  using Layout = RowLayout<kDim * sizeof(T)>;
  static constexpr int kRows = backward_rows(kDim, sizeof(T));
  static constexpr int kColumns = dkey_columns(kDim, sizeof(T));
  static constexpr int kWarps = warps_of(kDim, sizeof(T));
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr bool kPaired = sizeof(T) == 2 && kDim > 64 && kDim <= 128;
  static constexpr int kWarpRows = kRows / kWarps * (kPaired ? 2 : 1);
  static constexpr int kRowGroups = kRows / kWarpRows;  // one warp each, or one pair
  static constexpr int kMTiles = kWarpRows / 16;
  static constexpr int kSums = kPaired ? 1 : kDKey + kDValue;  // of a warp
  static constexpr int kStages = Layout::kRowBytes <= 256 ? 2 : 1;
  // Copies are spread among the steps of a product where its loop is unrolled.
  static constexpr bool kSpread = kStages == 2 && sizeof(T) == 2;
  static constexpr bool kRowsHeld = Layout::kRowBytes <= 64;
  static constexpr int kResident = Layout::kRowBytes <= 128   ? 3
                                   : Layout::kRowBytes <= 256 ? 2
                                                              : 1;

  struct Tile {
    alignas(128) uint8_t key[kRows * Layout::kRowBytes];    // dK in the end
    alignas(128) uint8_t value[kRows * Layout::kRowBytes];  // dV in the end
    alignas(128) uint8_t query[kStages][kColumns * Layout::kRowBytes];
    alignas(128) uint8_t dout[kStages][kColumns * Layout::kRowBytes];
    alignas(8) float lse[2][kColumns];  // in log2 units; +inf, so that weights are 0, where -inf
    alignas(8) float delta[2][kColumns];
    TileTables<kRows, kColumns> tables;
  };
  struct TileOfPairs : Tile {
    WeightExchange<kMTiles, kColumns / 8> weights[kRowGroups];
  };
  using Shared = std::conditional_t<kPaired, TileOfPairs, Tile>;
  struct SharedWithBias : Shared {
    BiasTables<kRows, kColumns> bias;
  };
  static_assert(sizeof(SharedWithBias) <= kSharedBytes);
};

// The queries of one head after the other, box by box; where CTAs share them, a part of the
// boxes of every head.
struct QueryWalk {
  Walk walk;
  int32_t member, members;  // of the group
  int32_t at, end;          // boxes of a head
  int32_t begin[kMaxRank];  // the walk's start

  template <Side kRowsAre, int kRows>
  __device__ __forceinline__ void start(const RowTables<kRows>& tables,
                                        const BackwardPlan& plan, int32_t split) {
    walk.start<kRowsAre>(tables, plan.call.problem, plan.rows, 0, 0);
    member = 0;
    members = walk.more() ? plan.group.value : 0;
    begin[0] = begin[1] = begin[2] = 0;
    at = 0;
    end = INT32_MAX;
    if (plan.column_splits > 1 && members > 0) take_part(plan, split);
  }

  __device__ __forceinline__ bool more() const { return member < members; }

  __device__ __forceinline__ void advance(const int32_t (&extent)[kMaxRank]) {
    ++at;
    walk.advance(extent);
    if (at < end && walk.more()) return;
    ++member;
    at = 0;
    restart();
  }

 private:
  __device__ __forceinline__ void restart() {
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) walk.at[a] = begin[a];
    walk.in_list = false;
  }

  __device__ __forceinline__ void take_part(const BackwardPlan& plan, int32_t split) {
    const int32_t(&extent)[kMaxRank] = plan.columns.order.extent;
    int32_t count[kMaxRank], boxes = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      count[a] = (walk.length[a] + extent[a] - 1) / extent[a];
      boxes *= count[a];
    }
    const int64_t splits = plan.column_splits;
    const int32_t first = static_cast<int32_t>(boxes * int64_t{split} / splits);
    end = static_cast<int32_t>(boxes * (int64_t{split} + 1) / splits) - first;
    if (end == 0) members = 0;
    begin[2] = first % count[2] * extent[2];
    begin[1] = first / count[2] % count[1] * extent[1];
    begin[0] = first / count[2] / count[1] * extent[0];
    restart();
  }
};

template <class S, Side kRowsAre, bool kHasBias>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    dkey_dvalue_kernel(const __grid_constant__ BackwardPlan plan) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  using Sided = Sides<kRowsAre>;
  constexpr int kThreads = S::kThreads, kMTiles = S::kMTiles, kStages = S::kStages;
  constexpr int kColumns = S::kColumns, kNTiles = kColumns / 8;
  constexpr Precision kPrecision = S::kPrecision;
  const Problem& p = plan.call.problem;
  const Inputs& in = plan.call.in;
  using Shared = std::conditional_t<kHasBias, typename S::SharedWithBias, typename S::Shared>;
  auto& shared = shared_memory<Shared>();
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int row_group = warp % S::kRowGroups;
  const int warp_row = row_group * S::kWarpRows;  // the warp's first one
  // CTAs that share a multiprocessor should not have all their exponentials in the same warps.
  const bool makes_dkey = (warp / S::kRowGroups + blockIdx.x) % 2 != 0;  // of a pair
  const float scale = static_cast<float>(p.scale);
  const float log2_scale = kHasBias ? kLog2E : scale * kLog2E;

  // ---- Tables and rows -----------------------------------------------------------------
  const int32_t tile = blockIdx.x / plan.column_splits;
  const int32_t split = blockIdx.x - tile * plan.column_splits;
  const TilePlace place(tile, plan.rows, p.window, plan.one, plan.key_heads);
  if (!place.exists(p.key_grid)) return;
  const int64_t first_key = place.batch * p.key_tokens();
  if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
    clear_block<sizeof(shared.key) + sizeof(shared.value) + sizeof(shared.query) +
                    sizeof(shared.dout),
                kThreads>(shared.key);
  }
  fill_tables<kRowsAre, S::kRows, kThreads>(&shared.tables, p, plan.rows, plan.columns,
                                            place.batch, place.first);
  if constexpr (kHasBias) {
    fill_bias_tables<kThreads>(&shared.bias, p, plan.rows, plan.columns);
  }
  __syncthreads();
  copy_rows<Layout, S::kRows, kThreads>(
      ptx::shared_address(shared.key),
      row_source(in.key, first_key, place.key_head, p.key_heads, p.head_dim, sizeof(T)),
      shared.tables.row_token);
  copy_rows<Layout, S::kRows, kThreads>(
      ptx::shared_address(shared.value),
      row_source(in.value, first_key, place.key_head, p.key_heads, p.value_dim, sizeof(T)),
      shared.tables.row_token);
  QueryWalk queries;
  queries.start<kRowsAre>(shared.tables, plan, split);
  RowView view;
  view.start(shared.tables, plan.rows, warp_row + threadIdx.x % S::kWarpRows);

  // ---- Walk over the queries -----------------------------------------------------------
  const int64_t first_query = place.batch * p.query_tokens();
  const int32_t first_head = place.key_head * plan.group.value;
  const RowSource first_queries =
      row_source(in.query, first_query, first_head, p.heads, p.head_dim, sizeof(T));
  const RowSource first_douts =
      row_source(plan.call.dout, first_query, first_head, p.heads, p.value_dim, sizeof(T));
  const auto copy_of_box = [&](int stage, const QueryWalk& at) {
    ColumnCopy<Layout, kColumns, kThreads> copy{
        {shared.tables.column},
        at.walk.token(),
        at.walk.guarded_limits(),
        {ptx::shared_address(shared.query[stage]), ptx::shared_address(shared.dout[stage])},
        {first_queries, first_douts},
        at.more()};
    copy.source[0].rows += at.member * p.head_dim * int{sizeof(T)};
    copy.source[1].rows += at.member * p.value_dim * int{sizeof(T)};
    return copy;
  };
  // lse and delta of one query of a box per thread, on their way to shared memory. Nothing waits
  // for them until they are put there.
  float lse = -kInfinity, delta = 0;
  const int64_t first_row = first_query * p.heads + first_head;
  const auto read_statistics = [&](const QueryWalk& at) {
    lse = -kInfinity;
    if (threadIdx.x >= kColumns) return;
    const ColumnEntry entry = shared.tables.column[threadIdx.x];
    if (!within(entry.coordinates, at.walk.guarded_limits())) return;
    const int64_t row =
        first_row + at.member + int64_t{at.walk.token() + entry.token} * p.heads;
    lse = static_cast<const float*>(plan.call.lse)[row];
    delta = static_cast<const float*>(plan.call.delta)[row];
  };
  const auto put_statistics = [&](int stage) {
    if (threadIdx.x >= kColumns) return;
    const bool empty = lse == -kInfinity;
    shared.lse[stage][threadIdx.x] = empty ? kInfinity : lse * kLog2E;
    shared.delta[stage][threadIdx.x] = empty ? 0 : delta;
  };
  if (queries.more()) {
    if (kStages == 2) copy_of_box(0, queries).start_all();
    read_statistics(queries);
    put_statistics(0);
  }
  ptx::copy_async_commit();
  RowOperand<Layout, kMTiles, S::kRowsHeld> key(ptx::shared_address(shared.key), warp_row);
  RowOperand<Layout, kMTiles, S::kRowsHeld> value(ptx::shared_address(shared.value), warp_row);
  if constexpr (S::kRowsHeld) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    key.hold();
    if constexpr (S::kDKey) value.hold();
  }
  Accumulator sums[S::kSums][kMTiles][S::kDim / 8];
  auto& dkey = sums[0];
  auto& dvalue = sums[S::kSums - 1];
  clear(dkey);
  clear(dvalue);

  for (int parity = 0; queries.more(); parity = 1 - parity) {
    // All that does not touch the blocks is done before the barrier, where warps wait anyway.
    const int current = parity % kStages;
    QueryWalk next = queries;
    next.advance(plan.columns.order.extent);
    const uint64_t columns = view.columns(shared.tables, queries.walk, plan.columns);
    if constexpr (kStages == 1) {
      __syncthreads();
      copy_of_box(0, queries).start_all();
      ptx::copy_async_commit();
    }
    const auto copy = copy_of_box(kStages - 1 - current, next);
    // The box at hand has arrived, and all warps are done with what the copies overwrite.
    ptx::copy_async_wait<0>();
    __syncthreads();
    if constexpr (kStages == 2 && !S::kSpread) copy.start_all();
    if (next.more()) read_statistics(next);
    const uint32_t query_block = ptx::shared_address(shared.query[current]);
    const uint32_t dout_block = ptx::shared_address(shared.dout[current]);

    if (__any_sync(kFullWarp, columns != 0)) {
      const float2* lse_of = reinterpret_cast<const float2*>(shared.lse[parity]) + lane % 4;
      const float2* delta_of = reinterpret_cast<const float2*>(shared.delta[parity]) + lane % 4;
      // K Q^T or V dO^T, and meanwhile the copy of the next box.
      const auto first_product = [&](auto& product, const auto& rows, uint32_t block) {
        clear(product);
        multiply_rows<T, kPrecision>(product, rows, block, [&](int step) {
          if constexpr (S::kSpread) copy.start_after(step);
        });
      };
      // The logarithms of the weights to base 2.
      const auto scale_scores = [&](auto& scores) {
        if constexpr (kHasBias) {
          const int32_t head = first_head + queries.member;
          const float* bias = static_cast<const float*>(in.bias) +
                              place.batch * p.bias_batch_stride + head * p.bias_size();
          add_bias<Sided::kSign>(scores, scale, LaneMask<kMTiles>(columns), bias, shared.bias, p,
                                 queries.walk, warp_row);
        }
        for_each_element(scores, [&](float& score, int, int, int n, int i) {
          const float2 pair = lse_of[4 * n];
          score = score * log2_scale - (i == 0 ? pair.x : pair.y);
        });
      };
      // Gives pairs out of sight `value`; add_bias has done so.
      const auto mask_pairs = [&](auto& pairs, float value) {
        if (kHasBias || __all_sync(kFullWarp, all_columns<kColumns>(columns))) return;
        const LaneMask<kMTiles> mask(columns);
        for_each_element(pairs, [&](float& pair, int m, int half, int n, int i) {
          if (!mask.test(m, half, n, i)) pair = value;
        });
      };
      const auto subtract_delta = [&](auto& dweights) {
        for_each_element(dweights, [&](float& dweight, int, int, int n, int i) {
          const float2 pair = delta_of[4 * n];
          dweight -= i == 0 ? pair.x : pair.y;
        });
      };
      const auto raise = [](float& score, auto...) { score = ptx::exp2(score); };

      Accumulator weights[kMTiles][kNTiles];
      if constexpr (S::kPaired) {
        const int barrier = 1 + row_group;  // 0 is that of __syncthreads
        first_product(weights, makes_dkey ? value : key, makes_dkey ? dout_block : query_block);
        if (makes_dkey) {
          subtract_delta(weights);
          ptx::barrier_sync<2 * kWarpLanes>(barrier);
          shared.weights[row_group].multiply(weights);
        } else {
          scale_scores(weights);
          for_each_element(weights, raise);
          mask_pairs(weights, 0);
          shared.weights[row_group].put(weights);
          ptx::barrier_arrive<2 * kWarpLanes>(barrier);
        }
        multiply_columns<T, kPrecision, Layout>(sums[0], weights,
                                                makes_dkey ? query_block : dout_block);
      } else {
        // Products hide the rest of the arithmetic where there is no branch between them, and
        // registers for both: those of float32 hold weights unpacked until dV is made.
        constexpr bool kBoth = S::kDKey && sizeof(T) == 2;
        Accumulator dweights[kMTiles][kNTiles];
        const auto multiply_values = [&] {
          clear(dweights);
          multiply_rows<T, kPrecision>(dweights, value, dout_block);
        };
        first_product(weights, key, query_block);
        scale_scores(weights);
        mask_pairs(weights, -kInfinity);
        if constexpr (kBoth) multiply_values();
        for_each_element(weights, raise);
        if constexpr (S::kDValue) {
          multiply_columns<T, kPrecision, Layout>(dvalue, weights, dout_block);
        }
        if constexpr (S::kDKey) {
          if constexpr (!kBoth) multiply_values();
          subtract_delta(dweights);
          for_each_element(weights, [&](float& weight, int m, int half, int n, int i) {
            weight *= dweights[m][n][2 * half + i];
          });
          multiply_columns<T, kPrecision, Layout>(dkey, weights, query_block);
        }
      }
    } else if constexpr (S::kSpread) {
      copy.start_all();
    }
    ptx::copy_async_commit();
    if (next.more()) put_statistics(1 - parity);
    queries = next;
  }
  ptx::copy_async_wait<0>();

  // ---- Output --------------------------------------------------------------------------
  const auto store = [&](uint8_t* block, auto& sums, float factor, void* gradient,
                         float* partials, int32_t dim) {
    if (gradient == nullptr) return;
    if (plan.column_splits > 1) {
      const int64_t rows = p.batch * p.key_tokens() * p.key_heads;
      float* part = partials + (split * rows + first_key * p.key_heads + place.key_head) * dim;
      store_partials(part, warp_row, shared.tables.row_token, sums, factor,
                     p.key_heads * dim, dim);
      return;
    }
    float factors[kMTiles][2];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) factors[m][0] = factors[m][1] = factor;
    __syncwarp();
    put_rows<T, Layout>(block, warp_row, sums, factors);
    store_rows<Layout, S::kWarpRows>(
        block, warp_row, shared.tables.row_token,
        row_source(gradient, first_key, place.key_head, p.key_heads, dim, sizeof(T)));
  };
  if constexpr (S::kPaired) __syncthreads();  // the other warp has read the rows
  if (S::kPaired ? makes_dkey : S::kDKey) {
    store(shared.key, dkey, scale, plan.call.dkey, plan.dkey_partials, p.head_dim);
  }
  if (S::kPaired ? !makes_dkey : S::kDValue) {
    store(shared.value, dvalue, 1, plan.call.dvalue, plan.dvalue_partials, p.value_dim);
  }
}

template <class S>
cudaError_t launch_dkey_shape(const BackwardPlan& plan, Side rows, cudaStream_t stream) {
  const Problem& p = plan.call.problem;
  const int64_t ctas = p.batch * p.key_heads * plan.rows.order.size * plan.column_splits;
  if (rows == Side::kKeys && plan.call.in.bias != nullptr) {
    return launch(&dkey_dvalue_kernel<S, Side::kKeys, true>, ctas, S::kThreads,
                  sizeof(typename S::SharedWithBias), plan, stream);
  }
  const auto kernel = rows == Side::kKeys ? &dkey_dvalue_kernel<S, Side::kKeys, false>
                                          : &dkey_dvalue_kernel<S, Side::kAdditional, false>;
  return launch(kernel, ctas, S::kThreads, sizeof(typename S::Shared), plan, stream);
}

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_dkey_dvalue(const BackwardPlan& plan, Side rows, cudaStream_t stream) {
  const auto launch_shape = [&](auto wanted) {
    using S = DKeyShape<T, kDim, kPrecision, decltype(wanted)::value>;
    return launch_dkey_shape<S>(plan, rows, stream);
  };
  if constexpr (kDim <= 128) {
    return launch_shape(std::integral_constant<Wanted, Wanted::kBoth>{});
  } else {
    if (plan.call.dkey != nullptr) {
      const cudaError_t status = launch_shape(std::integral_constant<Wanted, Wanted::kDKey>{});
      if (status != cudaSuccess) return status;
    }
    if (plan.call.dvalue == nullptr) return cudaSuccess;
    return launch_shape(std::integral_constant<Wanted, Wanted::kDValue>{});
  }
}

}  // namespace jax_na::cuda::fused
