// Gradient of the queries on Hopper: rows are queries and output gradients, columns keys and
// values.
//
//   P = exp(scale Q K^T + bias - lse),  dS = P (dO V^T - delta),  dQ = scale dS K
//
//   S0, dP0 | P0 dS0 | S1, dP1, dQ += dS0 K0 | P1 dS1 | ...
//
// The elementwise part of a box runs while the tensor cores multiply dS of the one before, which
// may be one of the last tile.
#pragma once

#include "../fused/delta.cuh"
#include "kernel.cuh"
#include "softmax.cuh"

namespace jax_na::cuda::sm90 {

struct DQueryPass {
  using Plan = BackwardPlan;
  template <int kDim>
  using Variants = DQuery<kDim>;
  static constexpr Side kRowsAre = Side::kQueries;
  static constexpr int kRowArrays = 2;
  // One where rows are large: more slots do more than rows that are there early.
  template <int kDim>
  static constexpr int kRowTiles = kDim <= 64 ? 2 : 1;
  template <int kDim>
  static constexpr bool kMaskProduct = kDim <= 128;
  template <int kDim, int kColumns>
  static constexpr int kConstants = kMaskProduct<kDim> ? kMaskConstants<kColumns> : 0;
  template <class S>
  using Constants = MaskConstants<S>;
  template <int, int, int>
  static constexpr int kExchange = 0;
  template <int>
  static constexpr int kStatistics = 0;
  // The keys of a box, both blocks of the next, one more.
  static constexpr int kLeastSlots = 4;

  template <class S>
  using Statistics = NoStatistics;
  template <class S>
  static __device__ __forceinline__ NoStatistics reader(const Plan&, NoStatistics& none) {
    return none;
  }

  // Where tiles take long enough, and a warpgroup has a warp to spare.
  template <int kDim>
  static constexpr bool kReadsRows = kDim >= 96;
  template <class S>
  static __device__ __forceinline__ void read_rows(const Plan& plan,
                                                   Shared<DQueryPass, S>& shared, int index);
  template <class S>
  static __device__ __forceinline__ void consume(const Plan& plan,
                                                 Shared<DQueryPass, S>& shared, int index);
};

// Whether the gradient of a tile is completed and stored when the products of the next one's first
// box are under way. Measured: NOTES.md.
template <class S>
constexpr bool kOverlapsTiles = S::kDim == 64;

// delta of a warpgroup's rows, by one warp: eight lanes per row, and rows at once so that enough
// loads are under way.
template <class S>
__device__ __forceinline__ void make_deltas(const BackwardCall& call,
                                            const TileTable<S::kGroups>& table, int group,
                                            float* deltas) {
  constexpr int kLanes = 8, kRows = kWarpLanes / kLanes;
  constexpr int kUnits = (S::kDim / 8 + kLanes - 1) / kLanes;  // of a lane, 16 bytes each
  constexpr int kTurns = 4 / kUnits;
  const int lane = threadIdx.x % kWarpLanes;
  const int units = call.problem.value_dim / 8;
  for (int first = 0; first < kGroupRows; first += kRows * kTurns) {
    uint4 out[kTurns][kUnits], dout[kTurns][kUnits];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int32_t token = table.token[group][first + turn * kRows + lane / kLanes];
      const int64_t row = table.first_row + int64_t{token} * call.problem.heads;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = lane % kLanes + u * kLanes;
        out[turn][u] = dout[turn][u] = make_uint4(0, 0, 0, 0);
        if (token < 0 || unit >= units) continue;
        out[turn][u] = __ldg(static_cast<const uint4*>(call.out) + row * units + unit);
        dout[turn][u] = __ldg(static_cast<const uint4*>(call.dout) + row * units + unit);
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      float sum = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        sum += fused::unit_dot<typename S::T>(out[turn][u], dout[turn][u]);
      }
#pragma unroll
      for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, lanes);
      }
      if (lane % kLanes == 0) deltas[first + turn * kRows + lane / kLanes] = sum;
    }
  }
  __syncwarp();
}

// The part of a warp that brings lse and delta of a warpgroup's rows while tiles before are
// multiplied. Where delta is not given it makes it, also for what is launched next.
template <class S>
__device__ __forceinline__ void DQueryPass::read_rows(const Plan& plan,
                                                      Shared<DQueryPass, S>& shared, int index) {
  constexpr int kOwn = kGroupRows / kWarpLanes;  // rows of a lane
  const BackwardCall& call = plan.call;
  auto& pipeline = shared.pipeline[index / S::kGroups];
  const int group = index % S::kGroups, lane = threadIdx.x % kWarpLanes;
  for (uint32_t round = 0;; ++round) {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.table_full[stage], round / S::kTiles % 2);
    const auto& table = pipeline.table[stage];
    const bool end = table.end;
    if (!end) {
      RowNumbers& numbers = pipeline.row_numbers[stage][group];
      float lse[kOwn], delta[kOwn];  // or dlse, of which delta is to be made
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int32_t token = table.token[group][lane + i * kWarpLanes];
        lse[i] = -kInfinity;
        delta[i] = 0;
        if (token < 0) continue;
        const int64_t row = table.first_row + int64_t{token} * call.problem.heads;
        lse[i] = static_cast<const float*>(call.lse)[row];
        const void* from = call.out == nullptr ? call.delta : call.dlse;
        if (from != nullptr) delta[i] = static_cast<const float*>(from)[row];
      }
      if (call.out != nullptr) make_deltas<S>(call, table, group, numbers.delta);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = lane + i * kWarpLanes;
        const int32_t token = table.token[group][row];
        if (call.out != nullptr) {
          delta[i] = numbers.delta[row] - delta[i];
          if (token >= 0) {
            const int64_t at = table.first_row + int64_t{token} * call.problem.heads;
            static_cast<float*>(call.delta)[at] = delta[i];
          }
        }
        const bool empty = lse[i] == -kInfinity;
        numbers.lse[row] = empty ? kInfinity : lse[i] * kLog2E;
        numbers.delta[row] = empty ? 0 : delta[i];
      }
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&pipeline.tile_full[stage]);
    if (end) return;
  }
}

template <class S>
__device__ __forceinline__ void DQueryPass::consume(const Plan& plan,
                                                    Shared<DQueryPass, S>& shared, int index) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  constexpr int kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  const Cut& cut = plan.streams.cut;
  const BoxOrder& box = cut.columns;
  const float scale = static_cast<float>(p.scale);
  const float log2_scale = S::kAddsBias ? kLog2E : scale * kLog2E;

  Consumer<S> own(shared.pipeline[index / S::kGroups], index);
  const int group = own.group;
  const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
  RowView view;
  view.place<S::kGroups>(cut, group);
  float dquery[S::kDim / 2];
  uint32_t dweights[kColumns / 4];  // dS as an operand
  bool pending = false;             // dS of a box is to be multiplied
  uint32_t keys = 0;                // by the keys at this position,
  bool due = false;                 // and then dQ is complete,
  int32_t due_tokens[2];            // that of these tokens
  T* due_to = nullptr;              // of a head here

  const auto add_keys = [&] {
    pin(dquery);
    pin(dweights);
    products_begin();
    multiply_rows<T, Columns>(dquery, dweights, ptx::shared_address(own.block(keys)));
    products_commit();
  };
  const auto store_gradient = [&] {
    const float factor[2] = {scale, scale};
    store_rows<T, S::kDim>(dquery, factor, due_tokens, due_to, int64_t{p.heads} * p.head_dim,
                           p.head_dim);
    clear(dquery);
    due = false;
  };
  const auto keys_added = [&] {
    products_wait<0>();
    pin(dquery);
    own.release(keys);
    pending = false;
  };
  const auto finish_pending = [&] {
    if (!pending) return;
    add_keys();
    keys_added();
    if (due) store_gradient();
  };

  clear(dquery);
  for (;;) {
    const uint32_t stage = own.next_tile();
    const auto& table = own.pipeline.table[stage];
    if (table.end) break;
    if (p.head_dim < S::kDim || p.value_dim < S::kDim) {
      clear_padding<Rows>(own.rows(stage, 0), p.head_dim);
      clear_padding<Rows>(own.rows(stage, 1), p.value_dim);
      own.barrier();
    }
    const uint32_t queries = ptx::shared_address(own.rows(stage, 0));
    const uint32_t douts = ptx::shared_address(own.rows(stage, 1));
    [[maybe_unused]] SeenBits<S::kDim> seen;
    if constexpr (S::kMaskProduct) {
      seen.read(table, view, cut);
    } else {
      bool exists[2] = {true, true};
      // Rows outside of the grid would read bias from beyond its table.
      if constexpr (S::kAddsBias) find_rows(exists, table.token[group]);
      view.read(table, cut, exists);
    }
    float lse[2], delta[2];  // as RowNumbers
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + threadIdx.x % kWarpLanes / 4 + 8 * h;
      if constexpr (S::kRowReaders > 0) {
        const RowNumbers& numbers = own.pipeline.row_numbers[stage][group];
        lse[h] = numbers.lse[row];
        delta[h] = numbers.delta[row];
      } else {
        const int32_t token = table.token[group][row];
        const int64_t at = table.first_row + int64_t{max(token, 0)} * p.heads;
        const float natural =
            token < 0 ? -kInfinity : static_cast<const float*>(plan.call.lse)[at];
        const bool empty = natural == -kInfinity;
        lse[h] = empty ? kInfinity : natural * kLog2E;
        delta[h] = empty ? 0 : static_cast<const float*>(plan.call.delta)[at];
      }
    }
    const int32_t boxes = uniform(table.visits.boxes),
                  grid_boxes = uniform(table.visits.grid_boxes);
    int32_t i = 0, next = uniform(table.first_box[group]),
            last = uniform(table.last_box[group]);
    BoxWalk walk = walk_of(table, cut, group);
    const auto visit = [&](int32_t i, auto has_pending) {
      constexpr bool kPending = decltype(has_pending)::value;
      const uint32_t at = own.base + 2 * i;
      float weights[kColumns / 2], dscores[kColumns / 2];
      [[maybe_unused]] MaskRows masks;
      if constexpr (S::kMaskProduct) masks.make(seen, walk, cut, i < grid_boxes);
      const auto bias = [&] {
        return BiasView<Sides<kRowsAre>::kSign>(plan.streams.bias, 0, view, table.lo, walk);
      };
      if constexpr (S::kBeginsWithBias) {
        if (i < grid_boxes) {
          bias().begin(weights, own.pipeline.bias[stage], shared.bias);
        } else {
          clear(weights);
        }
      }
      own.wait(at);
      if (p.frame != nullptr && i < grid_boxes) {  // what lies beyond the frame is no number
        clear_overhang<Columns>(own.block(at), walk, box);
        own.barrier();
      }
      pin(weights);
      multiply_and_mask<S>(weights, queries, ptx::shared_address(own.block(at)), masks,
                           shared.constants);
      products_commit();
      own.wait(at + 1);
      pin(dscores);
      products_begin();
      multiply_channels<T, Rows, Columns>(dscores, douts,
                                          ptx::shared_address(own.block(at + 1)));
      products_commit();
      if constexpr (kPending) {
        add_keys();
        products_wait<2>();
      } else {
        products_wait<1>();
      }
      pin(weights);
      if constexpr (S::kMaskProduct) pin(masks.operand);

      // ---- Weights ----
      LaneMask<kColumns> mask;
      bool masked;
      if (i >= grid_boxes) {
        const int32_t left = min(p.additional - (i - grid_boxes) * box.size, box.size);
        masked = left < kColumns;
        if (masked) mask = LaneMask<kColumns>::leading(left);
        if constexpr (S::kAddsBias) {
#pragma unroll
          for (int e = 0; e < kColumns / 2; ++e) weights[e] *= scale;
        }
      } else {
        masked = !S::kMaskProduct &&
                 (S::kAddsBias || box.size < kColumns || !view.all_see(walk, cut));
        if (masked) mask = view.mask(shared.sets, walk, cut);
        if constexpr (S::kAddsBias) {
          bias().add(weights, scale, mask, own.pipeline.bias[stage], shared.bias);
        }
        walk.advance(box);
      }
#pragma unroll
      for (int e = 0; e < kColumns / 2; ++e) {
        weights[e] = ptx::exp2(weights[e] * log2_scale - lse[e / 2 % 2]);
      }

      // ---- Their gradients ----
      if constexpr (kPending) {
        products_wait<1>();
      } else {
        products_wait<0>();
      }
      pin(dscores);
      own.release(at + 1);
#pragma unroll
      for (int e = 0; e < kColumns / 2; ++e) {
        dscores[e] = weights[e] * (dscores[e] - delta[e / 2 % 2]);
      }
      if (masked) select<kColumns>(dscores, mask);
      if constexpr (kPending) {
        keys_added();
        if (due) store_gradient();
      }
      pack_all<T>(dweights, dscores);
      keys = at;
      pending = true;
    };

    for (int run = 0; run < 2; ++run) {  // boxes in the grid, then those of additional keys
      if (i < next) finish_pending();
#pragma unroll 1
      for (; i < next; ++i) own.pass_by(own.base + 2 * i);
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

    // ---- The tile is done but for its last keys ----
    // They are added now where tiles do not overlap, or if this one saw nothing, so that the one
    // before still waits.
    if (!kOverlapsTiles<S> || due) finish_pending();
    due_to = static_cast<T*>(plan.call.dquery) + table.first_row * p.head_dim;
    read_tokens(due_tokens, table.token[group]);
    own.release_tile(stage);
    due = true;
    if (!pending) store_gradient();
  }
  finish_pending();
}

template <typename T, int kDim>
cudaError_t launch_dquery(const BackwardPlan& plan, const HopperTiling& tiling,
                          cudaStream_t stream) {
  return launch_pass<DQueryPass, T, kDim>(plan, tiling, stream);
}

}  // namespace jax_na::cuda::sm90
