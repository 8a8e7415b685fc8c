// All three gradients in one walk on Hopper: rows are keys and values, columns the queries that
// see them and their output gradients, of every head of a group.
//
//   P^T = exp(scale K Q^T + bias - lse),  dV = P^T dO
//   dS^T = P^T (V dO^T - delta),          dK = scale dS^T Q,  dQ = scale dS K
//
//   S0 | dP0 | P0 | dV += P0 dO0 | dS0 | dQ0 = dS0 K, dK += dS0 Q0, S1 | add dQ0 | dP1 | P1 ...
//
// Five products where dquery.cuh and dkey_dvalue.cuh make seven. The price is that a query's
// gradient is a sum over tiles of keys, which is made in memory, in float32 and in any order.
// dS goes through shared memory, since it is needed with its rows and columns exchanged, and
// since warpgroups of a pipeline add what all of its keys give, so that there is less to add in
// memory: they divide dQ among them by its channels, or take turns in making it, box by box.
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

  // Whether warpgroups take turns: where their shares of channels would be so narrow that their
  // products wait for shared memory, and registers suffice for all channels.
  template <int kDim, int kGroups>
  static constexpr bool kTakesTurns = kGroups > 1 && kDim <= 64;
  // dS of a box and of the one before, which another warpgroup may still multiply, and dQ.
  template <int kDim, int kColumns, int kGroups>
  static constexpr int kExchange =
      2 * kColumns * kGroups * kGroupRows * 2 +
      (kTakesTurns<kDim, kGroups> ? kGroups : 1) * kColumns * kDim * 4;

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

// What a warpgroup makes of dQ: the queries of a box by kChannels channels, of every box or, if
// they take turns, of every second one.
template <class S>
struct QueryShare {
  static_assert(S::kColumns == kGroupRows);  // queries are rows of a product, too
  static constexpr bool kTakesTurns = GradientsPass::kTakesTurns<S::kDim, S::kGroups>;
  // As many as halves of the exchange, and names of barriers.
  static_assert(!kTakesTurns || (S::kGroups == 2 && S::kPipelines == 1));
  static constexpr int kChannels = kTakesTurns ? S::kDim : S::kDim / S::kGroups;
  static constexpr int kBlocks = kChannels / kSumChannels;
  static constexpr int kBlockBytes = S::kColumns * kSumChannels * 4;
  using Exchange = Block<S::kColumns, S::kGroups * kGroupRows>;  // rows are keys
  using Keys = typename S::Rows;
  static_assert(Keys::kChannels % kChannels == 0 || kChannels % Keys::kChannels == 0);

  int pipeline, group, first_channel;

  __device__ __forceinline__ QueryShare(int pipeline, int group)
      : pipeline(pipeline), group(group), first_channel(kTakesTurns ? 0 : group * kChannels) {}

  // Whether the box whose dS lies in half `turn` of the exchange is this warpgroup's.
  __device__ __forceinline__ bool has_turn(uint32_t turn) const {
    return !kTakesTurns || turn == static_cast<uint32_t>(group);
  }

  // All warpgroups of the pipeline have put their dS into half `turn` of the exchange, and have
  // read the other half. Who does not make dQ of it goes on.
  template <bool kWaits>
  __device__ __forceinline__ void exchange_barrier(uint32_t turn) const {
    constexpr int kThreads = S::kGroups * kGroupThreads;
    const int name = 1 + S::kConsumers + pipeline + (kTakesTurns ? turn : 0);
    if constexpr (kWaits) {
      ptx::named_barrier(name, kThreads);
    } else {
      ptx::named_barrier_arrive(name, kThreads);
    }
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

  // Puts d into the warpgroup's part of `buffer`, which the copy engine is done with.
  __device__ __forceinline__ void put(const float (&d)[kChannels / 2], uint32_t buffer) const {
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
  }

  // Adds what was put there to a box of sums: the channels of its head begin at `channel`, its
  // queries at `at`.
  __device__ __forceinline__ void add(uint32_t buffer, const CUtensorMap* sums, int32_t channel,
                                      const int32_t (&at)[kMaxRank], int32_t batch) const {
    buffer += group * kBlocks * kBlockBytes;
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

// Whether the scores of a visit are begun as soon as dQ of the one before lies in shared memory,
// so that tensor cores have work while it is added; or after that. Measured: NOTES.md.
template <class S>
constexpr bool kScoresAhead = S::kGroups > 1 || (S::kDim > 32 && S::kMaskProduct);

// The scores of a visit, which become weights, and what masks them.
template <class S>
struct Scores {
  float weights[S::kColumns / 2];
  MaskRows masks;
};

// One box of queries of one head of the group.
struct Visit {
  int32_t member, box;  // of so many
  BoxWalk walk;

  __device__ __forceinline__ void advance(const BoxOrder& order, int32_t boxes) {
    walk.advance(order);
    if (++box < boxes) return;
    box = 0;
    ++member;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) walk.at[a] = 0;
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
  constexpr bool kAhead = kScoresAhead<S>;
  uint32_t turn = 0;  // half of the exchange that is next

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
    find_rows(exists, table.token[group]);
    [[maybe_unused]] SeenBits<S::kDim> seen;
    if constexpr (S::kMaskProduct) {
      seen.read(table, view, cut, exists);
    } else {
      view.read(table, cut, exists);
    }
    const int32_t boxes = uniform(table.visits.boxes);
    clear(dkey);
    clear(dvalue);

    const auto bias_of = [&](const Visit& visit) {
      return BiasView<Sides<kRowsAre>::kSign>(plan.streams.bias, visit.member, view, table.lo,
                                              visit.walk);
    };
    const auto begin_scores = [&](Scores<S>& scores, const Visit& visit, uint32_t at) {
      if constexpr (S::kMaskProduct) scores.masks.make(seen, visit.walk, cut, true);
      if constexpr (S::kBeginsWithBias) {
        bias_of(visit).begin(scores.weights, own.pipeline.bias[stage], shared.bias);
      }
      own.wait(at);
      if (!S::kMaskProduct && p.frame != nullptr) {  // what lies beyond the frame is no number
        clear_overhang<Columns>(own.block(at), visit.walk, box);
        own.barrier();
      }
      pin(scores.weights);
      multiply_and_mask<S>(scores.weights, keys, ptx::shared_address(own.block(at)),
                           scores.masks, shared.constants);
      products_commit();
    };
    const auto scores_made = [&](Scores<S>& scores) {
      pin(scores.weights);
      if constexpr (S::kMaskProduct) pin(scores.masks.operand);
    };
    const auto keys_added = [&] {
      pin(dkey);
      if constexpr (kFromRegisters) pin(dweights);
    };
    // The rest of a visit.
    const auto make_gradients = [&](Scores<S>& scores, const Visit& visit, const Visit& next,
                                    uint32_t at, auto has_next, auto has_turn) {
      constexpr bool kHasNext = decltype(has_next)::value, kHasTurn = decltype(has_turn)::value;
      float dscores[kColumns / 2];
      uint32_t operand[kColumns / 4];  // P
      const uint32_t queries = ptx::shared_address(own.block(at));
      const uint32_t douts = ptx::shared_address(own.block(at + 1));
      const uint32_t buffers = ptx::shared_address(own.pipeline.exchange);
      const uint32_t exchange = buffers + turn * Exchange::kAllBytes;
      own.wait(at + 1);
      if (!S::kMaskProduct && p.frame != nullptr) {
        clear_overhang<Columns>(own.block(at + 1), visit.walk, box);
        own.barrier();
      }
      pin(dscores);
      products_begin();
      multiply_channels<T, Rows, Columns>(dscores, values, douts);
      products_commit();

      // ---- Weights ----
      auto& weights = scores.weights;
      const bool masked = !S::kMaskProduct &&
                          (S::kAddsBias || box.size < kColumns || !view.all_see(visit.walk, cut));
      LaneMask<kColumns> mask;
      if (masked) mask = view.mask(shared.sets, visit.walk, cut);
      if constexpr (!kAhead) {
        products_wait<1>();
        scores_made(scores);
      }
      if constexpr (S::kAddsBias) {
        bias_of(visit).add(weights, scale, mask, own.pipeline.bias[stage], shared.bias);
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
      if (kHasTurn && share.adds()) ptx::additions_wait_read();
      share.template exchange_barrier<kHasTurn>(turn);
      turn ^= 1;
      if constexpr (kHasTurn) {
        pin(dquery);
        products_begin();
        share.template multiply<T>(dquery, exchange, all_keys);
        products_commit();
      }
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
      if constexpr (kHasTurn) pin(dquery);
      own.release(at + 1);
      const uint32_t buffer = buffers + 2 * Exchange::kAllBytes;
      if constexpr (kHasTurn) share.put(dquery, buffer);
      if constexpr (kAhead && kHasNext) begin_scores(scores, next, at + 2);
      if constexpr (kHasTurn) {
        int32_t first[kMaxRank];
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          first[a] = table.visits.start[a] + p.window[a].dilation * visit.walk.at[a];
        }
        share.add(buffer, &plan.sums,
                  (table.key_head * plan.streams.members + visit.member) * S::kDim, first,
                  static_cast<int32_t>(table.batch));
      }
      if constexpr (kAhead) {
        products_wait<0>();
        if constexpr (kHasNext) scores_made(scores);
        keys_added();
        own.release(at);
      }
    };

    const auto in_turn = [&](auto&&... rest) {
      if (share.has_turn(turn)) {
        make_gradients(rest..., std::true_type{});
      } else if constexpr (Share::kTakesTurns) {
        make_gradients(rest..., std::false_type{});
      }
    };

    const int32_t last = plan.streams.members * boxes - 1;
    Visit visit{0, 0, {{uniform(table.visits.length[0]), uniform(table.visits.length[1]),
                        uniform(table.visits.length[2])},
                       {0, 0, 0}}};
    if constexpr (kAhead) {
      if (last >= 0) {
        Scores<S> scores;
        begin_scores(scores, visit, own.base);
        products_wait<0>();
        scores_made(scores);
#pragma unroll 1
        for (int32_t i = 0; i < last; ++i) {
          Visit next = visit;
          next.advance(box, boxes);
          in_turn(scores, visit, next, own.base + 2 * i, std::true_type{});
          visit = next;
        }
        in_turn(scores, visit, visit, own.base + 2 * last, std::false_type{});
      }
    } else {
#pragma unroll 1
      for (int32_t i = 0; i <= last; ++i) {
        const uint32_t at = own.base + 2 * i;
        Scores<S> scores;
        begin_scores(scores, visit, at);
        products_wait<1>();
        keys_added();
        if (i > 0) own.release(at - 2);
        in_turn(scores, visit, visit, at, std::false_type{});
        visit.advance(box, boxes);
      }
      products_wait<0>();
      keys_added();
      if (last >= 0) own.release(own.base + 2 * last);
    }
    own.base += 2 * (last + 1);

    const int64_t row = table.batch * p.key_tokens() * p.key_heads + table.head;
    int32_t tokens[2];
    read_tokens(tokens, table.token[group]);
    own.release_tile(stage);
    const auto store = [&](const auto& gradient, float by, void* to, int32_t dim) {
      if (to == nullptr) return;
      const float factor[2] = {by, by};
      store_rows<T, S::kDim>(gradient, factor, tokens, static_cast<T*>(to) + row * dim,
                             int64_t{p.key_heads} * dim, dim);
    };
    store(dkey, scale, plan.call.dkey, p.head_dim);
    store(dvalue, 1, plan.call.dvalue, p.value_dim);
  }
  if (share.adds()) ptx::additions_wait_read();
}

template <typename T, int kDim>
cudaError_t launch_gradients(const GradientsPlan& plan, const HopperTiling& tiling,
                             cudaStream_t stream) {
  return launch_pass<GradientsPass, T, kDim>(plan, tiling, stream);
}

}  // namespace jax_na::cuda::sm90
