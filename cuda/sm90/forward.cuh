// Forward on Hopper: rows are queries, columns keys and values.
//
//   producer    [tile 0] [keys 0] [values 0] [keys 1] [values 1] ... [tile 1] ...
//   consumer    S0 = Q K0^T | softmax 0 | S1 = Q K1^T, O += P0 V0 | softmax 1 | ...
//
// The softmax of a box runs while the tensor cores add the values of the one before, be that of
// the same tile or of the last one, whose output is stored then.
#pragma once

#include "kernel.cuh"
#include "softmax.cuh"
#include "turns.cuh"

namespace jax_na::cuda::sm90 {

// Whether the sums of weights come with the product of the values, from a block of ones behind
// them: where instructions, not tensor cores, bound the kernel.
template <class S>
constexpr bool kSumProduct = S::kDim <= 64;

// The 16 rows of a step of the product with the values.
template <class T, class Columns>
struct Ones {
  static constexpr int kPairs = 16 * Columns::kRowBytes / 4;
  alignas(1024) uint32_t pair[kPairs];

  __device__ __forceinline__ void fill(const Cut&, int threads) {
    for (int i = threadIdx.x; i < kPairs; i += threads) pair[i] = pack<T>(1, 1);
    ptx::fence_async_proxy();
  }
};

template <class S>
struct ForwardConstants {
  using OnesOf = Ones<typename S::T, typename S::Columns>;
  MaskConstants<S> masks;
  std::conditional_t<kSumProduct<S>, OnesOf, NoConstants> ones;

  __device__ __forceinline__ void fill(const Cut& cut, int threads) {
    masks.fill(cut, threads);
    ones.fill(cut, threads);
  }
};

struct ForwardPass {
  using Plan = ForwardPlan;
  template <int kDim>
  using Variants = Forward<kDim>;
  static constexpr Side kRowsAre = Side::kQueries;
  static constexpr int kRowArrays = 1;
  // More where tiles are short and their rows small.
  template <int kDim>
  static constexpr int kRowTiles = kDim <= 32 ? 4 : 2;
  template <int, int, int>
  static constexpr int kExchange = 0;
  template <int>
  static constexpr int kStatistics = 0;
  // The values of a box, the keys of the next, one to come.
  static constexpr int kLeastSlots = 3;

  template <int kDim>
  static constexpr bool kMaskProduct = kDim <= 128;
  template <int kDim, int kColumns>
  static constexpr int kConstants =
      (kMaskProduct<kDim> ? kMaskConstants<kColumns> : 0) + (kDim <= 64 ? 3 * 1024 : 0);
  template <class S>
  using Constants = ForwardConstants<S>;

  template <class S>
  using Statistics = NoStatistics;
  template <class S>
  static __device__ __forceinline__ NoStatistics reader(const Plan&, NoStatistics& none) {
    return none;
  }

  template <int>
  static constexpr bool kReadsRows = false;

  template <class S>
  static __device__ __forceinline__ void consume(const Plan& plan,
                                                 Shared<ForwardPass, S>& shared, int index);
};

// ---- Consumer ----------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void ForwardPass::consume(const Plan& plan,
                                                     Shared<ForwardPass, S>& shared,
                                                     int index) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  constexpr int kColumns = S::kColumns;
  constexpr int kSums = S::kDim / 2 + (kSumProduct<S> ? 4 : 0);
  const Problem& p = plan.call.problem;
  const Cut& cut = plan.streams.cut;
  const BoxOrder& box = cut.columns;
  const float scale = static_cast<float>(p.scale);
  const bool prescaled = S::kAddsBias || (!S::kMaskProduct && !(scale > 0));
  const float log2_scale = prescaled ? kLog2E : scale * kLog2E;
  // What is masked by a product stays below the reference, whatever else a row sees.
  const float lowest = S::kMaskProduct ? kMaskedScore / 2 * log2_scale : OnlineSoftmax::kLowest;

  Consumer<S> own(shared.pipeline[index / S::kGroups], index);
  const int group = own.group;
  const Turns<S::kGroups> turns(group);
  RowView view;
  view.place<S::kGroups>(cut, group);
  SeenBits<S::kDim> seen;
  OnlineSoftmax softmax(lowest);
  float sums[kSums];
  bool begun = false;      // there is something in the sums
  uint32_t weights[kColumns / 4];
  bool pending = false;    // there are weights whose values are to be added,
  uint32_t values = 0;     // at this position,
  int32_t passed = 0;      // so many boxes ago,
  bool due = false;        // and then the sums are complete,
  uint32_t due_stage = 0;  // those of this tile,
  OnlineSoftmax due_softmax(lowest);

  const auto add_values = [&] {
    own.wait(values);
    pin(sums);
    pin(weights);
    products_begin();
    const uint32_t at = ptx::shared_address(own.block(values));
    if constexpr (kSumProduct<S>) {
      multiply_rows_and_sum<T, Columns>(sums, weights, at,
                                        ptx::shared_address(shared.constants.ones.pair), begun);
    } else {
      multiply_rows<T, Columns>(sums, weights, at, begun);
    }
    products_commit();
  };
  const auto values_added = [&] {
    products_wait<0>();
    pin(sums);
    own.release(values);
    pending = false;
    begun = true;
  };
  const auto store_output = [&](uint32_t stage) {
    const auto& table = own.pipeline.table[stage];
    const int64_t first_row = table.first_row;
    int32_t tokens[2];
    read_tokens(tokens, table.token[group]);
    own.release_tile(stage);
    float factor[2], lse[2];
    if constexpr (!kSumProduct<S>) due_softmax.finish();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kSumProduct<S>) {
        due_softmax.total[h] = begun ? sums[S::kDim / 2 + 2 * h] : 0;
      }
      if (due_softmax.total[h] == 0) tokens[h] = min(tokens[h], ~tokens[h]);  // zeros
      factor[h] = ptx::reciprocal(due_softmax.total[h]);
      lse[h] = due_softmax.lse(h);
    }
    store_rows<T, S::kDim>(sums, factor, tokens,
                           static_cast<T*>(plan.call.out) + first_row * p.value_dim,
                           int64_t{p.heads} * p.value_dim, p.value_dim);
    float* lse_of_tile = static_cast<float*>(plan.call.lse) + first_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (threadIdx.x % 4 != 0 || tokens[h] == kNoToken) continue;
      const auto at = static_cast<uint32_t>(max(tokens[h], ~tokens[h]));
      lse_of_tile[uint64_t{at} * static_cast<uint32_t>(p.heads)] =
          tokens[h] < 0 ? -kInfinity : lse[h];
    }
    begun = false;
    due = false;
  };
  const auto finish_pending = [&] {
    if (pending) {
      add_values();
      values_added();
    }
    if (due) store_output(due_stage);
  };

  clear(sums);
  for (;;) {
    const uint32_t stage = own.next_tile();
    const auto& table = own.pipeline.table[stage];
    if (table.end) break;
    uint8_t* query_block = own.rows(stage, 0);
    const uint32_t queries = ptx::shared_address(query_block);
    if (p.head_dim < S::kDim) {
      clear_padding<Rows>(query_block, p.head_dim);
      own.barrier();
    }
    if constexpr (S::kMaskProduct) {
      seen.read(table, view, cut);
    } else {
      bool exists[2] = {true, true};
      // Rows outside of the grid would read bias from beyond its table.
      if constexpr (S::kAddsBias) find_rows(exists, table.token[group]);
      view.read(table, cut, exists);
    }
    const int32_t boxes = uniform(table.visits.boxes),
                  grid_boxes = uniform(table.visits.grid_boxes);
    int32_t i = 0, next = 0, last = grid_boxes;
    if constexpr (S::kGroups > 1) {
      next = uniform(table.first_box[group]);
      last = uniform(table.last_box[group]);
    }
    BoxWalk walk = walk_of(table, cut, group);
    // Box i: its scores, the values of the box before, its softmax.
    const auto visit = [&](int32_t i, auto has_pending) {
      constexpr bool kPending = decltype(has_pending)::value;
      float scores[kColumns / 2];
      const uint32_t keys = own.base + 2 * i;
      [[maybe_unused]] MaskRows masks;
      if constexpr (S::kMaskProduct) masks.make(seen, walk, cut, i < grid_boxes);
      const auto bias = [&] {
        return BiasView<Sides<kRowsAre>::kSign>(plan.streams.bias, 0, view, table.lo, walk);
      };
      if constexpr (S::kBeginsWithBias) {
        if (i < grid_boxes) {
          bias().begin(scores, own.pipeline.bias[stage], shared.bias);
        } else {
          clear(scores);
        }
      }
      own.wait(keys);
      turns.wait();
      pin(scores);
      multiply_and_mask<S>(scores, queries, ptx::shared_address(own.block(keys)), masks,
                           shared.constants.masks);
      products_commit();
      if constexpr (kPending) {
        add_values();
        turns.pass();
        products_wait<1>();
      } else {
        turns.pass();
        products_wait<0>();
      }
      pin(scores);
      if constexpr (S::kMaskProduct) pin(masks.operand);
      own.release(keys);

      // ---- Softmax ----
      if (prescaled && !(S::kAddsBias && i < grid_boxes)) {
#pragma unroll
        for (int e = 0; e < kColumns / 2; ++e) scores[e] *= scale;
      }
      if (i >= grid_boxes) {
        const int32_t left = min(p.additional - (i - grid_boxes) * box.size, box.size);
        if (left < kColumns) hide<kColumns>(scores, LaneMask<kColumns>::leading(left));
      } else if constexpr (S::kAddsBias) {
        bias().add(scores, scale, view.mask(shared.sets, walk, cut), own.pipeline.bias[stage],
                   shared.bias);
      } else if constexpr (!S::kMaskProduct) {
        if (box.size < kColumns || !view.all_see(walk, cut)) {
          hide<kColumns>(scores, view.mask(shared.sets, walk, cut));
        }
      }
      const bool grown = softmax.template weigh<!kSumProduct<S>>(scores, log2_scale);

      if constexpr (kPending) values_added();
      if (due) {
        store_output(due_stage);
      } else if (grown) {
        softmax.rescale(sums);
      }
      pack_all<T>(weights, scores);
      values = keys + 1;
      pending = true;
      passed = 0;
      if (i >= grid_boxes) return;
      if (!S::kMaskProduct && p.frame != nullptr) {  // what lies beyond the frame is no number
        own.wait(values);
        clear_overhang<Columns>(own.block(values), walk, box);
        own.barrier();
      }
      walk.advance(box);
    };

    for (int run = 0; run < 2; ++run) {  // boxes in the grid, then those of additional keys
      // What the warpgroup does not see. The ring must not have to wait for pending values.
      passed += next - i;
      if (passed > (S::kSlots - 2) / 2) finish_pending();
#pragma unroll 1
      for (; i < next; ++i) {
        turns.skip();
        own.pass_by(own.base + 2 * i);
      }
#pragma unroll 1
      for (; i < last; ++i) {
        if (pending) {
          visit(i, std::true_type{});
        } else {
          visit(i, std::false_type{});
        }
      }
      next = grid_boxes;
      last = boxes;
    }
    own.base += 2 * boxes;

    // ---- The tile is done but for its last values ----
    if (due) finish_pending();  // it saw nothing, so that the one before still waits
    due_softmax = softmax;
    softmax = OnlineSoftmax(lowest);
    due = true;
    due_stage = stage;
  }
  finish_pending();
}

template <typename T, int kDim>
cudaError_t launch_forward(const ForwardPlan& plan, const HopperTiling& tiling,
                           cudaStream_t stream) {
  return launch_pass<ForwardPass, T, kDim>(plan, tiling, stream);
}

}  // namespace jax_na::cuda::sm90
