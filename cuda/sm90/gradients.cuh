// All three gradients in one walk on Hopper: rows are keys and values, columns the queries that
// see them and their output gradients, of every head of a group.
//
//   P^T = exp(scale K Q^T + bias - lse),  dV = P^T dO
//   dS^T = P^T (V dO^T - delta),          dK = scale dS^T Q,  dQ = scale dS K
//
//   S0, dP0 | P0 | dV += P0 dO0 | dS0 | dQ0 = dS0 K, dK += dS0 Q0 | add dQ0 | S1, dP1 | ...
//
// Five products where dquery.cuh and dkey_dvalue.cuh make seven. The price is that a query's
// gradient is a sum over tiles of keys, which is made in memory, in float32 and in any order.
// dS goes through shared memory, since it is needed with its rows and columns exchanged, and
// since the warpgroups of a pipeline divide dQ among them by its channels: so each adds what
// all keys of the CTA give, and there is less to add in memory.
#pragma once

#include "kernel.cuh"
#include "softmax.cuh"
#include "statistics.cuh"
#include "sums.h"

namespace jax_na::cuda::sm90 {

struct GradientsPass {
  using Plan = GradientsPlan;
  template <int kDim>
  using Variants = Gradients<kDim>;
  static constexpr Side kRowsAre = Side::kKeys;
  static constexpr int kRowArrays = 2;
  template <int kDim>
  static constexpr int kRowTiles = kDim <= 64 ? 2 : 1;
  template <int>
  static constexpr bool kMaskProduct = true;
  template <int, int kColumns>
  static constexpr int kConstants = kMaskConstants<kColumns>;
  template <class S>
  using Constants = MaskConstants<S>;
  // The queries of a box, and both blocks of the next.
  static constexpr int kLeastSlots = 3;

  // dS of a box and of the one before, which another warpgroup may still multiply, and dQ.
  template <int kDim, int kColumns, int kGroups>
  static constexpr int kExchange = 2 * kColumns * kGroups * kGroupRows * 2 +
                                   kColumns * kDim * 4;

  template <int kColumns>
  static constexpr int kStatistics = sizeof(ColumnStatistics<kColumns>);
  template <class S>
  struct Statistics {
    ColumnStatistics<S::kColumns> slot[S::kSlots];
  };
  template <class S>
  static __device__ __forceinline__ StatisticsReader<S::kColumns> reader(
      const Plan& plan, Statistics<S>& statistics) {
    return StatisticsReader<S::kColumns>(plan.call, plan.streams.cut.columns, statistics.slot);
  }

  template <int>
  static constexpr bool kReadsRows = false;

  template <class S>
  static __device__ __forceinline__ void consume(const Plan& plan,
                                                 Shared<GradientsPass, S>& shared, int index);
};

// What a warpgroup makes of dQ: the queries of a box by kChannels channels.
template <class S>
struct QueryShare {
  static_assert(S::kColumns == kGroupRows);  // queries are rows of a product, too
  static constexpr int kChannels = S::kDim / S::kGroups;
  static constexpr int kBlocks = kChannels / kSumChannels;
  static constexpr int kBlockBytes = S::kColumns * kSumChannels * 4;
  using Exchange = Block<S::kColumns, S::kGroups * kGroupRows>;  // rows are keys
  using Keys = typename S::Rows;
  static_assert(Keys::kChannels % kChannels == 0 || kChannels % Keys::kChannels == 0);

  int pipeline, group, first_channel;

  __device__ __forceinline__ QueryShare(int pipeline, int group)
      : pipeline(pipeline), group(group), first_channel(group * kChannels) {}

  // All warpgroups of the pipeline.
  __device__ __forceinline__ void exchange_barrier() const {
    ptx::named_barrier(1 + S::kConsumers + pipeline, S::kGroups * kGroupThreads);
  }

  // d = dS K, with the keys of group 0 at `keys` and those of the next behind them.
  template <typename T>
  __device__ __forceinline__ void multiply(float (&d)[kChannels / 2], uint32_t exchange,
                                           uint32_t keys) const {
    const uint64_t a = Exchange::by_rows(exchange);
    const uint64_t b = Keys::by_rows(keys + first_channel / Keys::kChannels * Keys::kBytes +
                                     first_channel % Keys::kChannels * 2);
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
#pragma unroll
      for (int k = 0; k < kGroupRows / 16; ++k) {
        Product<kChannels>::template add<T, true, true>(
            d, a + Exchange::row_step(g * kGroupRows / 16 + k),
            b + g * (Keys::kAllBytes / 16) + Keys::row_step(k), g + k > 0);
      }
    }
  }

  // Whether this thread tells the copy engine to add.
  __device__ __forceinline__ bool adds() const {
    return threadIdx.x % kGroupThreads == 0;
  }

  // Adds d to a box of sums by way of `buffer`, which the copy engine is done with: the channels
  // of its head begin at `channel`, its queries at `at`.
  __device__ __forceinline__ void add(const float (&d)[kChannels / 2], uint32_t buffer,
                                      const CUtensorMap* sums, int32_t channel,
                                      const int32_t (&at)[kMaxRank], int32_t batch) const {
    const int lane = threadIdx.x % kWarpLanes;
    const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
    buffer += group * kBlocks * kBlockBytes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + lane / 4 + 8 * h;
#pragma unroll
      for (int j = 0; j < kChannels / 16; ++j) {
        const float* own = d + 8 * j + 2 * h;
        const int unit = lane % 4 * 2 + j % 2;  // no two lanes of a quarter in the same banks
        ptx::store_shared(buffer + j / 2 * kBlockBytes + row * 128 + (unit ^ row % 8) * 16,
                          own[0], own[1], own[4], own[5]);
      }
    }
    ptx::fence_async_proxy();
    group_barrier(pipeline * S::kGroups + group);
    if (!adds()) return;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      ptx::add_box(sums, buffer + i * kBlockBytes, channel + first_channel + i * kSumChannels,
                   at, batch);
    }
    ptx::additions_commit();
  }
};

template <class S>
__device__ __forceinline__ void GradientsPass::consume(const Plan& plan,
                                                       Shared<GradientsPass, S>& shared,
                                                       int index) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  using Share = QueryShare<S>;
  using Exchange = typename Share::Exchange;
  constexpr int kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  const Cut& cut = plan.streams.cut;
  const BoxOrder& box = cut.columns;
  const float scale = static_cast<float>(p.scale);
  const float log2_scale = S::kAddsBias ? kLog2E : scale * kLog2E;
  const int lane = threadIdx.x % kWarpLanes;
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;

  const int pipeline = index / S::kGroups;
  Consumer<S> own(shared.pipeline[pipeline], index);
  const int group = own.group;
  const Share share(pipeline, group);
  RowView view;
  view.place<S::kGroups>(cut, group);
  float dkey[S::kDim / 2], dvalue[S::kDim / 2];
  float dquery[Share::kChannels / 2];
  uint32_t dweights[kColumns / 4];  // dS as an operand
  constexpr bool kFromRegisters = S::kDim < 128;  // where there are enough
  bool pending = false;             // dK += dS Q is under way,
  uint32_t pending_queries = 0;     // with the queries at this position
  uint32_t turn = 0;                // half of the exchange that is next

  for (;;) {
    const uint32_t stage = own.next_tile();
    const auto& table = own.pipeline.table[stage];
    if (table.end) break;
    if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
      clear_padding<Rows>(own.rows(stage, 0), p.head_dim);
      clear_padding<Rows>(own.rows(stage, 1), p.value_dim);
    }
    if (!S::kMaskProduct && p.frame != nullptr) {  // what lies beyond the frame is no number
      clear_absent<Rows>(own.rows(stage, 0), table.token[group]);
      clear_absent<Rows>(own.rows(stage, 1), table.token[group]);
    }
    own.barrier();
    const uint32_t keys = ptx::shared_address(own.rows(stage, 0));
    const uint32_t values = ptx::shared_address(own.rows(stage, 1));
    const uint32_t all_keys = keys - group * Rows::kAllBytes;
    bool exists[2];  // what is no key must not add to dQ
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      exists[h] = table.token[group][warp_row + lane / 4 + 8 * h] >= 0;
    }
    [[maybe_unused]] SeenBits seen;
    if constexpr (S::kMaskProduct) {
      seen.read(table, view, cut, exists);
    } else {
      view.read(table, cut, exists);
    }
    const int32_t boxes = uniform(table.visits.boxes);
    clear(dkey);
    clear(dvalue);

    const auto visit = [&](int32_t member, const BoxWalk& walk, uint32_t at) {
      float weights[kColumns / 2], dscores[kColumns / 2];
      uint32_t operand[kColumns / 4];  // P
      const uint32_t queries = ptx::shared_address(own.block(at));
      const uint32_t douts = ptx::shared_address(own.block(at + 1));
      const uint32_t buffers = ptx::shared_address(own.pipeline.exchange);
      const uint32_t exchange = buffers + turn * Exchange::kAllBytes;
      turn ^= 1;
      [[maybe_unused]] MaskRows masks;
      if constexpr (S::kMaskProduct) masks.make(seen, walk, cut, true);
      const auto bias = [&] {
        return BiasView<Sides<kRowsAre>::kSign>(plan.streams.bias, member, view, table.lo, walk);
      };
      if constexpr (S::kBeginsWithBias) {
        bias().begin(weights, own.pipeline.bias[stage], shared.bias);
      }
      own.wait(at);
      if (!S::kMaskProduct && p.frame != nullptr) {  // what lies beyond the frame is no number
        clear_overhang<Columns>(own.block(at), walk, box);
        own.barrier();
      }
      pin(weights);
      multiply_and_mask<S>(weights, keys, queries, masks, shared.constants);
      products_commit();
      products_wait<1>();
      pin(dkey);
      if constexpr (kFromRegisters) pin(dweights);
      if (pending) own.release(pending_queries);
      own.wait(at + 1);
      if (!S::kMaskProduct && p.frame != nullptr) {
        clear_overhang<Columns>(own.block(at + 1), walk, box);
        own.barrier();
      }
      pin(dscores);
      products_begin();
      multiply_channels<T, Rows, Columns>(dscores, values, douts);
      products_commit();

      // ---- Weights ----
      const bool masked = !S::kMaskProduct &&
                          (S::kAddsBias || box.size < kColumns || !view.all_see(walk, cut));
      LaneMask<kColumns> mask;
      if (masked) mask = view.mask(shared.sets, walk, cut);
      products_wait<1>();
      pin(weights);
      if constexpr (S::kMaskProduct) pin(masks.operand);
      if constexpr (S::kAddsBias) {
        bias().add(weights, scale, mask, own.pipeline.bias[stage], shared.bias);
      }
      const auto& statistics = shared.statistics[pipeline].slot[own.pipeline.ring.slot(at)];
      const auto* delta = reinterpret_cast<const float2*>(statistics.delta) + lane % 4;
      statistics.weigh(weights, log2_scale);
      if (masked) select<kColumns>(weights, mask);
      pack_all<T>(operand, weights);
      pin(dvalue);
      pin(operand);
      products_begin();
      multiply_rows<T, Columns>(dvalue, operand, douts);
      products_commit();

      // ---- Their gradients ----
      products_wait<1>();
      pin(dscores);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float2 pair = delta[4 * n];
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // weights as they were multiplied need half the registers
          const float2 weight = unpack<T>(operand[2 * n + h]);
          float* d = dscores + 4 * n + 2 * h;
          d[0] = weight.x * (d[0] - pair.x);
          d[1] = weight.y * (d[1] - pair.y);
        }
      }
      if (masked) select<kColumns>(dscores, mask);
      pack_all<T>(dweights, dscores);
      put_operand<Exchange>(exchange, group * kGroupRows, dweights);
      ptx::fence_async_proxy();
      if (share.adds()) ptx::additions_wait_read();
      share.exchange_barrier();
      pin(dquery);
      products_begin();
      share.template multiply<T>(dquery, exchange, all_keys);
      products_commit();
      pin(dkey);
      products_begin();
      if constexpr (kFromRegisters) {
        pin(dweights);
        multiply_rows<T, Columns>(dkey, dweights, queries);
      } else {
        multiply_rows<T, Exchange, Columns>(dkey, exchange, group * kGroupRows, queries);
      }
      products_commit();
      products_wait<1>();
      pin(dvalue);
      pin(dquery);
      own.release(at + 1);
      int32_t first[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        first[a] = table.visits.start[a] + p.window[a].dilation * walk.at[a];
      }
      share.add(dquery, buffers + 2 * Exchange::kAllBytes, &plan.sums,
                (table.key_head * plan.streams.members + member) * S::kDim, first,
                static_cast<int32_t>(table.batch));
      pending = true;
      pending_queries = at;
    };

    for (int32_t member = 0; member < plan.streams.members; ++member) {
      BoxWalk walk{{uniform(table.visits.length[0]), uniform(table.visits.length[1]),
                    uniform(table.visits.length[2])},
                   {0, 0, 0}};
#pragma unroll 1
      for (int32_t i = 0; i < boxes; ++i) {
        visit(member, walk, own.base + 2 * i);
        walk.advance(box);
      }
      own.base += 2 * boxes;
    }
    products_wait<0>();
    pin(dkey);
    if constexpr (kFromRegisters) pin(dweights);
    if (pending) own.release(pending_queries);
    pending = false;

    share.exchange_barrier();  // another warpgroup may still multiply by these keys
    const int64_t row = table.batch * p.key_tokens() * p.key_heads + table.head;
    const auto store = [&](const auto& gradient, float by, void* to, int array, int32_t dim) {
      if (to == nullptr) return;
      const float factor[2] = {by, by};
      store_product<T, Rows>(gradient, factor, own.rows(stage, array), table.token[group],
                             static_cast<T*>(to) + row * dim, int64_t{p.key_heads} * dim, dim);
    };
    store(dkey, scale, plan.call.dkey, 0, p.head_dim);
    store(dvalue, 1, plan.call.dvalue, 1, p.value_dim);
    own.release_tile(stage);
  }
  if (share.adds()) ptx::additions_wait_read();
}

template <typename T, int kDim>
cudaError_t launch_gradients(const GradientsPlan& plan, const HopperTiling& tiling,
                             cudaStream_t stream) {
  return launch_pass<GradientsPass, T, kDim>(plan, tiling, stream);
}

}  // namespace jax_na::cuda::sm90
