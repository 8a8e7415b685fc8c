// Forward on Hopper: consumer warpgroups own boxes of queries of one head, a producer warp brings
// the keys and values that they see. CTAs stay and take one tile after the other.
//
//   producer    [keys 0] [queries] [keys 1] [values 0] [keys 2] [values 1] ...
//   consumer    S0 = Q K0^T | softmax 0 | S1 = Q K1^T, O += P0 V0 | softmax 1 | ...
//
// The softmax of a box runs while the tensor cores add the values of the one before.
#pragma once

#include <iterator>
#include <utility>

#include "bias.cuh"
#include "blocks.cuh"
#include "launch.cuh"
#include "plans.cuh"
#include "ring.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include "variants.h"

namespace jax_na::cuda::sm90 {

template <typename T_, int kDim_, int kColumns_, int kGroups_>
struct ForwardShape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr int kColumns = kColumns_;
  static constexpr int kGroups = kGroups_;

  using Rows = Block<kDim, kGroupRows>;
  using Columns = Block<kDim, kColumns>;

  // With one consumer warpgroup a CTA is small, several share a multiprocessor, and the producer
  // is one warp. With more, the producer is a warpgroup, so that it can give registers away.
  static constexpr int kProducerThreads = kGroups == 1 ? kWarpLanes : kGroupThreads;
  static constexpr int kThreads = kGroups * kGroupThreads + kProducerThreads;
  static constexpr int kAccumulators = kColumns / 2 + kColumns / 4 + kDim / 2;
  static constexpr int kResident = kGroups > 1 ? 1 : kAccumulators <= 80 ? 3 : 2;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;

  static constexpr int kMemory = 227 * 1024 / kResident - 1024;  // of a CTA
  static constexpr int kTables = 12 * 1024;                      // at most, beside blocks
  static constexpr int kFit =
      (kMemory - kTables - kGroups * Rows::kAllBytes) / Columns::kAllBytes;
  static constexpr int kSlots = kFit < 16 ? kFit : 16;
  static_assert(kSlots >= 3, "the walk would stall");

  using ColumnRing = Ring<kSlots, Columns::kAllBytes>;
  using Table = TileTable<kGroups>;

  struct Shared {
    alignas(1024) uint8_t query[kGroups][Rows::kAllBytes];
    alignas(1024) uint8_t column[kSlots][Columns::kAllBytes];
    ColumnRing ring;
    uint64_t query_full[kGroups], query_empty[kGroups];
    Table table[2];  // filled while consumers use the one before
    ColumnSets<kColumns> sets;
    alignas(8) BiasColumns<kColumns> bias;
  };
  static_assert(sizeof(Shared) <= kMemory);
};

// ---- Producer ----------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void produce(const ForwardPlan& plan, typename S::Shared& shared) {
  const Problem& p = plan.call.problem;
  const BoxOrder& box = plan.cut.columns;
  const bool elected = threadIdx.x % kWarpLanes == 0;
  uint32_t position = 0, round = 0;
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const TilePlace place(tile, plan.cut.ctas, p.window, plan.group, plan.key_heads);
    if (!place.exists(p.query_grid)) continue;
    auto& table = shared.table[round % 2];
    fill_table<Side::kQueries>(&table, p, plan.cut, place.batch, place.first);
    __syncwarp();
    if (elected) {
      const int32_t batch = static_cast<int32_t>(place.batch);
      const auto copy_queries = [&](int g) {
        ptx::barrier_wait(&shared.query_empty[g], round % 2 ^ 1);
        ptx::barrier_expect(&shared.query_full[g],
                            box_bytes<typename S::Rows>(plan.cut.rows.size));
        int32_t at[kMaxRank];
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          const int32_t before = a == plan.cut.group_axis ? g * plan.cut.rows.extent[a] : 0;
          at[a] = place.first[a] + p.window[a].dilation * before;
        }
        copy_block<typename S::Rows>(shared.query[g], &plan.query, &shared.query_full[g],
                                     place.head * p.head_dim, at, batch);
      };
      BoxWalk ahead, behind;  // of keys, of values
      const auto copy_columns = [&](int32_t i, BoxWalk* walk, bool values) {
        uint64_t* full = shared.ring.begin_copy(position, box_bytes<typename S::Columns>(box.size));
        uint8_t* slot = shared.column[shared.ring.slot(position)];
        ++position;
        const int32_t channel = place.key_head * (values ? p.value_dim : p.head_dim);
        int32_t at[kMaxRank];
        if (i < table.grid_boxes) {
#pragma unroll
          for (int a = 0; a < kMaxRank; ++a) {
            at[a] = table.start[a] + p.window[a].dilation * walk->at[a];
          }
          walk->advance(table.length, box);
          copy_block<typename S::Columns>(slot, values ? &plan.value : &plan.key, full, channel,
                                          at, batch);
        } else {
          at[0] = at[1] = 0;
          at[2] = (i - table.grid_boxes) * box.size;
          copy_block<typename S::Columns>(
              slot, values ? &plan.additional_value : &plan.additional_key, full, channel, at,
              batch);
        }
      };
      for (int32_t i = 0; i <= table.boxes; ++i) {
        if (i < table.boxes) copy_columns(i, &ahead, false);
        if (i == 0) {
          for (int g = 0; g < S::kGroups; ++g) copy_queries(g);
        } else {
          copy_columns(i - 1, &behind, true);
        }
      }
    }
    __syncwarp();
    ++round;
  }
}

// ---- Consumer ----------------------------------------------------------------------------

template <class S, bool kHasBias>
__device__ __forceinline__ void consume(const ForwardPlan& plan, typename S::Shared& shared,
                                        int group) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  constexpr int kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  const BoxOrder& box = plan.cut.columns;
  const bool elected = threadIdx.x % kWarpLanes == 0;
  const float scale = static_cast<float>(p.scale);
  const bool prescaled = kHasBias || !(scale > 0);
  const float log2_scale = prescaled ? kLog2E : scale * kLog2E;
  const bool padded = p.head_dim < S::kDim;
  const uint32_t queries = ptx::shared_address(shared.query[group]);
  const auto block = [&](uint32_t position) {
    return ptx::shared_address(shared.column[shared.ring.slot(position)]);
  };
  const auto release = [&](uint32_t position) {
    if (elected) shared.ring.release(position);
  };

  RowView view;
  view.place<S::kGroups>(plan.cut, group);
  uint32_t base = 0, round = 0;  // position of the tile's first block; tiles so far
  for (int32_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const TilePlace place(tile, plan.cut.ctas, p.window, plan.group, plan.key_heads);
    if (!place.exists(p.query_grid)) continue;
    ptx::barrier_wait(&shared.query_full[group], round % 2);
    const auto& table = shared.table[round % 2];
    if (padded) {
      clear_padding<Rows>(shared.query[group], p.head_dim);
      group_barrier(group);
    }
    view.read<Side::kQueries>(table, p, place.first);
    const int32_t boxes = table.boxes, grid_boxes = table.grid_boxes;
    const auto key_position = [&](int32_t i) { return base + (i == 0 ? 0 : 2 * i - 1); };
    const auto value_position = [&](int32_t i) {
      return base + (i == boxes - 1 ? 2 * i + 1 : 2 * i + 2);
    };
    const auto pass_by = [&](int32_t from, int32_t to) {  // boxes that the warpgroup does not see
#pragma unroll 1
      for (int32_t i = from; i < to; ++i) {
        shared.ring.wait(key_position(i));
        release(key_position(i));
        shared.ring.wait(value_position(i));
        release(value_position(i));
      }
    };

    OnlineSoftmax softmax;
    float sums[S::kDim / 2];
#pragma unroll
    for (float& sum : sums) sum = 0;
    int32_t i = table.first_box[group], last = table.last_box[group];
    pass_by(0, i);
    BoxWalk walk, weighed;  // to the next box; to the last one
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      walk.at[a] = a == plan.cut.group_axis ? table.first_at[group] : 0;
    }

    // Makes weights of the scores of box `at`; true if the sums are to be rescaled.
    const auto weigh = [&](float(&scores)[kColumns / 2], int32_t at) {
      if (prescaled) {
#pragma unroll
        for (float& score : scores) score *= scale;
      }
      if (at >= grid_boxes) {
        const int32_t left = min(p.additional - (at - grid_boxes) * box.size, box.size);
        if (left < kColumns) {
          const int half = threadIdx.x % kWarpLanes / kWarpRows;
          hide<kColumns>(scores,
                         LaneMask<kColumns>(ColumnSets<kColumns>::leading(left, half)));
        }
      } else {
        if constexpr (kHasBias) {
          const float* bias = static_cast<const float*>(plan.call.in.bias) +
                              place.batch * p.bias_batch_stride + place.head * p.bias_size();
          const int32_t box_at[kMaxRank] = {table.lo[0] + walk.at[0], table.lo[1] + walk.at[1],
                                            table.lo[2] + walk.at[2]};
          add_bias<Sides<Side::kQueries>::kSign, kColumns>(
              scores, view.mask(shared.sets, walk, box), bias, shared.bias, p, view, box_at);
        } else if (box.size < kColumns || !view.all_see(walk, box)) {
          hide<kColumns>(scores, view.mask(shared.sets, walk, box));
        }
        weighed = walk;
        walk.advance(table.length, box);
      }
      return softmax.weigh(scores, log2_scale);
    };
    const auto clean_values = [&](int32_t at) {
      if (p.frame == nullptr || at >= grid_boxes) return;
      clear_overhang<Columns>(shared.column[shared.ring.slot(value_position(at))], table, weighed,
                              box);
      group_barrier(group);
    };

    // The run of boxes in the grid, then that of additional keys.
    for (int run = 0; run < 2; ++run) {
      if (i < last) {
        uint32_t weights[kColumns / 4];
        {
          float scores[kColumns / 2];
          shared.ring.wait(key_position(i));
          pin(scores);
          products_begin();
          multiply_channels<T, Rows, Columns>(scores, queries, block(key_position(i)));
          products_commit();
          products_wait<0>();
          pin(scores);
          release(key_position(i));
          if (weigh(scores, i)) softmax.rescale(sums);
          pack_all<T>(weights, scores);
        }
        for (++i; i < last; ++i) {
          float scores[kColumns / 2];
          shared.ring.wait(key_position(i));
          pin(scores);
          products_begin();
          multiply_channels<T, Rows, Columns>(scores, queries, block(key_position(i)));
          products_commit();
          shared.ring.wait(value_position(i - 1));
          clean_values(i - 1);
          pin(sums);
          pin(weights);
          products_begin();
          multiply_rows<T, Columns>(sums, weights, block(value_position(i - 1)));
          products_commit();
          products_wait<1>();
          pin(scores);
          release(key_position(i));
          const bool grown = weigh(scores, i);
          products_wait<0>();
          pin(sums);
          release(value_position(i - 1));
          if (grown) softmax.rescale(sums);
          pack_all<T>(weights, scores);
        }
        shared.ring.wait(value_position(i - 1));
        clean_values(i - 1);
        pin(sums);
        pin(weights);
        products_begin();
        multiply_rows<T, Columns>(sums, weights, block(value_position(i - 1)));
        products_commit();
        products_wait<0>();
        pin(sums);
        release(value_position(i - 1));
      }
      if (run == 0) {
        pass_by(i, grid_boxes);
        i = grid_boxes;
        last = boxes;
      }
    }
    if (elected) ptx::barrier_arrive(&shared.query_empty[group]);
    base += 2 * boxes;
    ++round;

    softmax.finish();
    const RowTargets targets(view);
    float factor[2];
    const int64_t first_row = place.batch * p.query_tokens() * p.heads + place.head;
    float* lse = static_cast<float*>(plan.call.lse) + first_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = softmax.total[h] == 0 ? 0 : 1 / softmax.total[h];
      if (threadIdx.x % 4 == 0 && targets.token[h] >= 0) {
        lse[int64_t{targets.token[h]} * p.heads] =
            targets.in_grid[h] ? softmax.lse(h) : -kInfinity;
      }
    }
    store_rows<T>(sums, factor, targets, static_cast<T*>(plan.call.out) + first_row * p.value_dim,
                  int64_t{p.heads} * p.value_dim, p.value_dim);
  }
}

// ---- Kernel ------------------------------------------------------------------------------

template <class S, bool kHasBias>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    forward_kernel(const __grid_constant__ ForwardPlan plan) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(S::kGroups * kGroupWarps);
    for (int g = 0; g < S::kGroups; ++g) {
      ptx::barrier_init(&shared.query_full[g], 1);
      ptx::barrier_init(&shared.query_empty[g], kGroupWarps);
    }
    ptx::fence_barrier_init();
  }
  shared.sets.fill(plan.cut.columns, S::kThreads / kWarpLanes);
  if constexpr (kHasBias) {
    shared.bias.fill(plan.call.problem, plan.cut.columns, S::kThreads);
  }
  // What no copy writes must not be taken for infinity.
  clear_rest<typename S::Columns, S::kThreads>(shared.column[0], S::kSlots,
                                               plan.cut.columns.size);
  clear_rest<typename S::Rows, S::kThreads>(shared.query[0], S::kGroups, plan.cut.rows.size);
  ptx::fence_async_proxy();
  __syncthreads();

  const int group = threadIdx.x / kGroupThreads;
  if (group == S::kGroups) {
    if constexpr (S::kGroups > 1) ptx::fewer_registers<S::kProducerRegisters>();
    if (threadIdx.x % kGroupThreads < kWarpLanes) produce<S>(plan, shared);
  } else {
    if constexpr (S::kGroups > 1) ptx::more_registers<S::kConsumerRegisters>();
    consume<S, kHasBias>(plan, shared, group);
  }
}

template <class S>
cudaError_t launch_shape(const ForwardPlan& plan, cudaStream_t stream) {
  const auto kernel = plan.call.in.bias == nullptr ? &forward_kernel<S, false>
                                                   : &forward_kernel<S, true>;
  return launch_persistent(kernel, plan.tiles, S::kResident, S::kThreads,
                           sizeof(typename S::Shared), plan, stream);
}

template <typename T, int kDim, size_t... kIndex>
cudaError_t launch_forward(const ForwardPlan& plan, int columns, int groups, cudaStream_t stream,
                           std::index_sequence<kIndex...>) {
  cudaError_t status = cudaErrorInvalidValue;
  const auto attempt = [&](auto index) {
    constexpr Variant kVariant = Forward<kDim>::kVariants[decltype(index)::value];
    if (kVariant.columns != columns || kVariant.groups != groups) return;
    status = launch_shape<ForwardShape<T, kDim, kVariant.columns, kVariant.groups>>(plan, stream);
  };
  (attempt(std::integral_constant<size_t, kIndex>{}), ...);
  return status;
}

template <typename T, int kDim>
cudaError_t launch_forward(const ForwardPlan& plan, int columns, int groups,
                           cudaStream_t stream) {
  constexpr size_t kCount = std::size(Forward<kDim>::kVariants);
  return launch_forward<T, kDim>(plan, columns, groups, stream,
                                 std::make_index_sequence<kCount>{});
}

}  // namespace jax_na::cuda::sm90
