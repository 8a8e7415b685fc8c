// Gradients of keys and values on Hopper: rows are keys and values, columns the queries that
// see them and their output gradients, of every head of a group.
//
//   P^T = exp(scale K Q^T + bias - lse),  dV = P^T dO
//   dS^T = P^T (V dO^T - delta),          dK = scale dS^T Q
//
//   S0, dP0 | P0 | dV += P0 dO0 | dS0 | dK += dS0 Q0, S1, dP1 | P1 | ...
//
// The weights of a box are made while the tensor cores still add dK of the one before, and two
// warpgroups that share a pipeline take turns in beginning a box.
#pragma once

#include "kernel.cuh"
#include "softmax.cuh"
#include "statistics.cuh"
#include "turns.cuh"

namespace jax_na::cuda::sm90 {

struct DKeyPass {
  using Plan = BackwardPlan;
  template <int kDim>
  using Variants = DKey<kDim>;
  static constexpr Side kRowsAre = Side::kKeys;
  static constexpr int kRowArrays = 2;
  template <int>
  static constexpr int kRowTiles = 2;
  template <int kDim>
  static constexpr bool kMaskProduct = kDim <= 128;
  template <int kDim, int kColumns>
  static constexpr int kConstants = kMaskProduct<kDim> ? kMaskConstants<kColumns> : 0;
  template <class S>
  using Constants = MaskConstants<S>;
  template <int, int, int>
  static constexpr int kExchange = 0;
  template <int kColumns>
  static constexpr int kStatistics = sizeof(ColumnStatistics<kColumns>);
  // The queries of a box, and both blocks of the next.
  static constexpr int kLeastSlots = 3;

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
  static __device__ __forceinline__ void consume(const Plan& plan, Shared<DKeyPass, S>& shared,
                                                 int index);
};

template <class S>
__device__ __forceinline__ void DKeyPass::consume(const Plan& plan, Shared<DKeyPass, S>& shared,
                                                  int index) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
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
  RowView view;
  view.place<S::kGroups>(cut, group);
  const Turns<S::kGroups> turns(group);
  float dkey[S::kDim / 2], dvalue[S::kDim / 2];
  uint32_t dweights[kColumns / 4];  // dS as an operand
  bool pending = false;             // dK += dS Q is under way,
  uint32_t pending_queries = 0;     // with the queries at this position

  for (;;) {
    const uint32_t stage = own.next_tile();
    const auto& table = own.pipeline.table[stage];
    if (table.end) return;
    if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
      clear_padding<Rows>(own.rows(stage, 0), p.head_dim);
      clear_padding<Rows>(own.rows(stage, 1), p.value_dim);
      own.barrier();
    }
    const uint32_t keys = ptx::shared_address(own.rows(stage, 0));
    const uint32_t values = ptx::shared_address(own.rows(stage, 1));
    [[maybe_unused]] SeenBits<S::kDim> seen;
    if constexpr (S::kMaskProduct) {
      seen.read(table, view, cut);
    } else {
      bool exists[2] = {true, true};
      // Rows outside of the grid would read bias from beyond its table.
      if constexpr (S::kAddsBias) find_rows(exists, table.token[group]);
      view.read(table, cut, exists);
    }
    const int32_t boxes = uniform(table.visits.boxes);
    const int32_t first = uniform(table.first_box[group]),
                  last = uniform(table.last_box[group]);
    clear(dkey);
    clear(dvalue);

    const auto visit = [&](int32_t member, const BoxWalk& walk, uint32_t at) {
      float weights[kColumns / 2], dscores[kColumns / 2];
      uint32_t operand[kColumns / 4];  // P
      const uint32_t queries = ptx::shared_address(own.block(at));
      const uint32_t douts = ptx::shared_address(own.block(at + 1));
      [[maybe_unused]] MaskRows masks;
      if constexpr (S::kMaskProduct) masks.make(seen, walk, cut, true);
      const auto bias = [&] {
        return BiasView<Sides<kRowsAre>::kSign>(plan.streams.bias, member, view, table.lo, walk);
      };
      if constexpr (S::kBeginsWithBias) {
        bias().begin(weights, own.pipeline.bias[stage], shared.bias);
      }
      own.wait(at);
      if constexpr (turns.kTaken) own.wait(at + 1);  // not while another waits for its turn
      turns.wait();
      pin(weights);
      multiply_and_mask<S>(weights, keys, queries, masks, shared.constants);
      products_commit();
      products_wait<1>();
      pin(dkey);
      pin(dweights);
      if (pending) own.release(pending_queries);
      if constexpr (!turns.kTaken) own.wait(at + 1);
      if (p.frame != nullptr) {  // what lies beyond the frame is no number
        products_wait<0>();
        pin(weights);
        clear_overhang<Columns>(own.block(at), walk, box);
        clear_overhang<Columns>(own.block(at + 1), walk, box);
        own.barrier();
      }
      pin(dscores);
      products_begin();
      multiply_channels<T, Rows, Columns>(dscores, values, douts);
      products_commit();
      turns.pass();

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
        for (int e = 0; e < 4; ++e) {
          dscores[4 * n + e] =
              weights[4 * n + e] * (dscores[4 * n + e] - (e % 2 == 0 ? pair.x : pair.y));
        }
      }
      if (masked) select<kColumns>(dscores, mask);
      pack_all<T>(dweights, dscores);
      pin(dkey);
      pin(dweights);
      products_begin();
      multiply_rows<T, Columns>(dkey, dweights, queries);
      products_commit();
      products_wait<1>();
      pin(dvalue);
      own.release(at + 1);
      pending = true;
      pending_queries = at;
    };
    const auto finish_pending = [&] {
      products_wait<0>();
      pin(dkey);
      pin(dweights);
      if (pending) own.release(pending_queries);
      pending = false;
    };

    for (int32_t member = 0; member < plan.streams.members; ++member) {
      BoxWalk walk = walk_of(table, cut, group);
      int32_t i = 0;
      if (i < first) finish_pending();
#pragma unroll 1
      for (; i < first; ++i) {
        turns.skip();
        own.pass_by(own.base + 2 * i);
      }
#pragma unroll 1
      for (; i < last; ++i) {
        visit(member, walk, own.base + 2 * i);
        walk.advance(box);
      }
      if (i < boxes) finish_pending();
#pragma unroll 1
      for (; i < boxes; ++i) {
        turns.skip();
        own.pass_by(own.base + 2 * i);
      }
      own.base += 2 * boxes;
    }

    finish_pending();

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
}

template <typename T, int kDim>
cudaError_t launch_dkey_dvalue(const BackwardPlan& plan, const HopperTiling& tiling,
                               cudaStream_t stream) {
  return launch_pass<DKeyPass, T, kDim>(plan, tiling, stream);
}

}  // namespace jax_na::cuda::sm90
