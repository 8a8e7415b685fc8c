// Forward on Hopper: consumer warpgroups own boxes of queries of one head, a producer warp brings
// the keys and values that they see. CTAs stay and take one tile after the other.
//
//   producer    [tile 0] [keys 0] [values 0] [keys 1] [values 1] ... [tile 1] ...
//   consumer    S0 = Q K0^T | softmax 0 | S1 = Q K1^T, O += P0 V0 | softmax 1 | ...
//
// The softmax of a box runs while the tensor cores add the values of the one before, be that of
// the same tile or of the last one, whose output is stored then.
//
// Warpgroups of a CTA either share the keys of neighbouring boxes of queries, which halves or
// thirds the traffic, or are pipelines of their own, which suits small windows.
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

#ifndef PINGPONG
#define PINGPONG 1
#endif

template <typename T_, int kDim_, int kColumns_, int kGroups_>
struct ForwardShape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr int kColumns = kColumns_;
  static constexpr int kGroups = kGroups_;  // consumer warpgroups of a pipeline
  static constexpr int kAccumulators = kColumns / 2 + kColumns / 4 + kDim / 2;  // registers
  static constexpr int kPipelines = kGroups > 1 ? 1 : kAccumulators <= 80 ? 4 : 3;
  static constexpr int kConsumers = kGroups * kPipelines;
  static constexpr bool kTakeTurns = PINGPONG && kGroups == 2;

  using Rows = Block<kDim, kGroupRows>;
  using Columns = Block<kDim, kColumns>;

  static constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 120;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;

  static constexpr int kMemory = 227 * 1024 / kPipelines;  // of a pipeline
  static constexpr int kTables = 6 * 1024 / kPipelines + 3 * 1024 * kGroups + 1024;  // at most
  static constexpr int kTiles = 2;  // of which queries and tables are there at once
  static constexpr int kFit =
      (kMemory - kTables - kTiles * kGroups * Rows::kAllBytes) / Columns::kAllBytes;
  static constexpr int kSlots = kFit < 16 ? kFit : 16;
  static_assert(kSlots >= 3, "the walk would stall");

  struct Pipeline {
    alignas(1024) uint8_t query[kTiles][kGroups][Rows::kAllBytes];  // the output in the end
    alignas(1024) uint8_t column[kSlots][Columns::kAllBytes];
    Ring<kSlots> ring;
    uint64_t tile_full[kTiles], tile_empty[kTiles];  // queries and table
    TileTable<kGroups> table[kTiles];
  };
  struct Shared {
    Pipeline pipeline[kPipelines];
    alignas(16) ColumnSets<kColumns> sets;
    alignas(8) BiasColumns<kColumns> bias;
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// Warpgroups take turns in giving work to the tensor cores, so that one does its softmax while
// another's products run. Every warpgroup has one turn per box, whether it sees it or not.
template <int kGroups, bool kTaken>
struct Turns {
  static constexpr int kFirstName = 1 + kGroups;  // barriers of single warpgroups come before
  int group;

  __device__ __forceinline__ explicit Turns(int group) : group(group) {
    if constexpr (kTaken) {
      for (int g = 0; g < group; ++g) arrive(g);
    }
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kTaken) {
      ptx::named_barrier(kFirstName + group, kGroups * kGroupThreads);
    }
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (kTaken) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (g != group) arrive(g);
      }
    }
  }

 private:
  __device__ __forceinline__ void arrive(int g) const {
    ptx::named_barrier_arrive(kFirstName + g, kGroups * kGroupThreads);
  }
};

// ---- Producer ----------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void produce(const ForwardPlan& plan, typename S::Pipeline& pipeline,
                                        int32_t tile) {
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  const Problem& p = plan.call.problem;
  const BoxOrder& box = plan.cut.columns;
  const bool elected = threadIdx.x % kWarpLanes == 0;
  uint32_t position = 0, round = 0;
  const auto wait_for_stage = [&] {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.tile_empty[stage], round / S::kTiles % 2 ^ 1);
    return stage;
  };
  for (; tile < plan.tiles; tile += gridDim.x * S::kPipelines) {
    const TilePlace place(tile, plan.cut.ctas, p.window, plan.group, plan.key_heads);
    if (!place.exists(p.query_grid)) continue;
    const uint32_t stage = wait_for_stage();
    auto& table = pipeline.table[stage];
    const Visits visits = fill_table<Side::kQueries>(&table, p, plan.cut, place);
    __syncwarp();
    const int32_t batch = static_cast<int32_t>(place.batch);
    if (elected) {
      uint64_t* full = &pipeline.tile_full[stage];
      ptx::barrier_expect(full, S::kGroups * box_bytes<Rows>(plan.cut.rows.size));
#pragma unroll
      for (int g = 0; g < S::kGroups; ++g) {
        int32_t at[kMaxRank];
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          const int32_t before = a == plan.cut.group_axis ? g * plan.cut.rows.extent[a] : 0;
          at[a] = place.first[a] + p.window[a].dilation * before;
        }
        copy_block<Rows>(pipeline.query[stage][g], &plan.query, full, place.head * p.head_dim, at,
                         batch);
      }
    }
    const int32_t key_channel = place.key_head * p.head_dim;
    const int32_t value_channel = place.key_head * p.value_dim;
    const auto copy_columns = [&](const CUtensorMap& keys, const CUtensorMap& values,
                                  const int32_t(&at)[kMaxRank]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t slot = pipeline.ring.slot(position);
        pipeline.ring.wait_empty(position);
        if (elected) {
          uint64_t* full = pipeline.ring.expect(position, box_bytes<Columns>(box.size));
          copy_block<Columns>(pipeline.column[slot], i == 0 ? &keys : &values, full,
                              i == 0 ? key_channel : value_channel, at, batch);
        }
        ++position;
      }
    };
    BoxWalk walk;
    for (int32_t i = 0; i < visits.grid_boxes; ++i) {
      int32_t at[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        at[a] = visits.start[a] + p.window[a].dilation * walk.at[a];
      }
      copy_columns(plan.key, plan.value, at);
      walk.advance(visits.length, box);
    }
    for (int32_t i = 0; i < visits.boxes - visits.grid_boxes; ++i) {
      const int32_t at[kMaxRank] = {0, 0, i * box.size};
      copy_columns(plan.additional_key, plan.additional_value, at);
    }
    ++round;
  }
  const uint32_t stage = wait_for_stage();
  if (elected) {
    pipeline.table[stage].end = true;
    ptx::barrier_arrive(&pipeline.tile_full[stage]);
  }
}

// ---- Consumer ----------------------------------------------------------------------------

template <class S, bool kHasBias>
__device__ __forceinline__ void consume(const ForwardPlan& plan, typename S::Shared& shared,
                                        int consumer) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  constexpr int kColumns = S::kColumns;
  const Problem& p = plan.call.problem;
  const Cut& cut = plan.cut;
  const BoxOrder& box = cut.columns;
  const int group = consumer % S::kGroups;
  auto& pipeline = shared.pipeline[consumer / S::kGroups];
  auto& ring = pipeline.ring;
  const bool elected = threadIdx.x % kWarpLanes == 0;
  const float scale = static_cast<float>(p.scale);
  const bool prescaled = kHasBias || !(scale > 0);
  const float log2_scale = prescaled ? kLog2E : scale * kLog2E;
  const auto block = [&](uint32_t position) {
    return ptx::shared_address(pipeline.column[ring.slot(position)]);
  };
  const auto release = [&](uint32_t position) {
    if (elected) ring.release(position);
  };

  const Turns<S::kGroups, S::kTakeTurns> turns(group);
  RowView view;
  view.place<S::kGroups>(cut, group);
  OnlineSoftmax softmax;
  float sums[S::kDim / 2];
  uint32_t weights[kColumns / 4];
  bool pending = false;    // there are weights whose values are to be added,
  uint32_t values = 0;     // at this position,
  int32_t passed = 0;      // so many boxes ago,
  bool due = false;        // and then the sums are complete,
  uint32_t due_stage = 0;  // those of this tile,
  float factor[2];         // to be multiplied by this

  const auto add_values = [&] {
    ring.wait(values);
    pin(sums);
    pin(weights);
    products_begin();
    multiply_rows<T, Columns>(sums, weights, block(values));
    products_commit();
  };
  const auto values_added = [&] {
    products_wait<0>();
    pin(sums);
    release(values);
    pending = false;
  };
  const auto store_output = [&](uint32_t stage) {
    const auto& table = pipeline.table[stage];
    uint8_t* staging = pipeline.query[stage][group];
    const int64_t row = table.batch * p.query_tokens() * p.heads + table.head;
    group_barrier(consumer);  // all warps are done with these queries
    put_rows<T, Rows>(staging, sums, factor);
    __syncwarp();
    store_rows<T, Rows>(staging, table.token[group],
                        static_cast<T*>(plan.call.out) + row * p.value_dim,
                        int64_t{p.heads} * p.value_dim, p.value_dim);
    ptx::fence_async_proxy();  // before the next queries come
    __syncwarp();
    if (elected) ptx::barrier_arrive(&pipeline.tile_empty[stage]);
    clear(sums);
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
  uint32_t base = 0;  // position of the tile's first block
  for (uint32_t round = 0;; ++round) {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.tile_full[stage], round / S::kTiles % 2);
    auto& table = pipeline.table[stage];
    if (table.end) break;
    const uint32_t queries = ptx::shared_address(pipeline.query[stage][group]);
    if (p.head_dim < S::kDim) {
      clear_padding<Rows>(pipeline.query[stage][group], p.head_dim);
      group_barrier(consumer);
    }
    view.read(table, cut);
    const int32_t boxes = uniform(table.boxes), grid_boxes = uniform(table.grid_boxes);
    int32_t i = 0, next = uniform(table.first_box[group]), last = uniform(table.last_box[group]);
    BoxWalk walk, weighed;  // to the next box; to the last one
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      walk.at[a] = a == cut.group_axis ? table.first_at[group] : 0;
    }

    // Box i: its scores, the values of the box before, its softmax.
    const auto visit = [&](int32_t i, auto has_pending) {
      constexpr bool kPending = decltype(has_pending)::value;
      float scores[kColumns / 2];
      ring.wait(base + 2 * i);
      turns.wait();
      pin(scores);
      products_begin();
      multiply_channels<T, Rows, Columns>(scores, queries, block(base + 2 * i));
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
      release(base + 2 * i);

      // ---- Softmax ----
      if (prescaled) {
#pragma unroll
        for (float& score : scores) score *= scale;
      }
      if (i >= grid_boxes) {
        const int32_t left = min(p.additional - (i - grid_boxes) * box.size, box.size);
        if (left < kColumns) hide<kColumns>(scores, LaneMask<kColumns>::leading(left));
      } else {
        if constexpr (kHasBias) {
          const float* bias = static_cast<const float*>(plan.call.in.bias) +
                              table.batch * p.bias_batch_stride + table.head * p.bias_size();
          const int32_t box_at[kMaxRank] = {table.lo[0] + walk.at[0], table.lo[1] + walk.at[1],
                                            table.lo[2] + walk.at[2]};
          add_bias<Sides<Side::kQueries>::kSign, kColumns>(
              scores, view.mask(shared.sets, walk, cut), bias, shared.bias, p, view, box_at);
        } else if (box.size < kColumns || !view.all_see(walk, cut)) {
          hide<kColumns>(scores, view.mask(shared.sets, walk, cut));
        }
        weighed = walk;
        walk.advance(table.length, box);
      }
      const bool grown = softmax.weigh(scores, log2_scale);

      if constexpr (kPending) values_added();
      if (due) {
        store_output(due_stage);
      } else if (grown) {
        softmax.rescale(sums);
      }
      pack_all<T>(weights, scores);
      values = base + 2 * i + 1;
      pending = true;
      passed = 0;
      if (p.frame != nullptr && i < grid_boxes) {  // what lies beyond the frame is no number
        ring.wait(values);
        clear_overhang<Columns>(pipeline.column[ring.slot(values)], table, weighed, box);
        group_barrier(consumer);
      }
    };

    for (int run = 0; run < 2; ++run) {  // boxes in the grid, then those of additional keys
      // What the warpgroup does not see. The ring must not have to wait for pending values.
      passed += next - i;
      if (passed > (S::kSlots - 2) / 2) finish_pending();
#pragma unroll 1
      for (; i < next; ++i) {
        turns.wait();
        turns.pass();
        ring.wait(base + 2 * i);
        release(base + 2 * i);
        ring.wait(base + 2 * i + 1);
        release(base + 2 * i + 1);
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
    base += 2 * boxes;

    // ---- The tile is done but for its last values ----
    if (due) finish_pending();  // it saw nothing, so that the one before still waits
    softmax.finish();
    const int64_t row = table.batch * p.query_tokens() * p.heads + table.head;
    float* lse = static_cast<float*>(plan.call.lse) + row;
    const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = 1 / softmax.total[h];
      if (threadIdx.x % 4 != 0) continue;
      int32_t& token = table.token[group][warp_row + threadIdx.x % kWarpLanes / 4 + 8 * h];
      if (token >= 0 && softmax.total[h] == 0) token = ~token;
      if (token != kNoToken) {
        lse[int64_t{max(token, ~token)} * p.heads] = token < 0 ? -kInfinity : softmax.lse(h);
      }
    }
    softmax = OnlineSoftmax();
    due = true;
    due_stage = stage;
  }
  finish_pending();
}

// ---- Kernel ------------------------------------------------------------------------------

template <class S, bool kHasBias>
__global__ void __launch_bounds__(S::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardPlan plan) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename S::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (auto& pipeline : shared.pipeline) {
      pipeline.ring.init(S::kGroups * kGroupWarps);
      for (int i = 0; i < S::kTiles; ++i) {
        ptx::barrier_init(&pipeline.tile_full[i], 1);
        ptx::barrier_init(&pipeline.tile_empty[i], S::kGroups * kGroupWarps);
      }
    }
    ptx::fence_barrier_init();
  }
  shared.sets.fill(plan.cut.columns, S::kThreads / kWarpLanes);
  if constexpr (kHasBias) {
    shared.bias.fill(plan.call.problem, plan.cut.columns, S::kThreads);
  }
  // What no copy writes must not be taken for infinity.
  for (auto& pipeline : shared.pipeline) {
    clear_rest<typename S::Columns, S::kThreads>(pipeline.column[0], S::kSlots,
                                                 plan.cut.columns.size);
    clear_rest<typename S::Rows, S::kThreads>(pipeline.query[0][0], S::kTiles * S::kGroups,
                                              plan.cut.rows.size);
  }
  ptx::fence_async_proxy();
  __syncthreads();

  const int consumer = uniform(threadIdx.x / kGroupThreads);
  if (consumer == S::kConsumers) {
    ptx::fewer_registers<S::kProducerRegisters>();
    const int producer = uniform(threadIdx.x % kGroupThreads / kWarpLanes);
    if (producer < S::kPipelines) {
      produce<S>(plan, shared.pipeline[producer], blockIdx.x * S::kPipelines + producer);
    }
  } else {
    ptx::more_registers<S::kConsumerRegisters>();
    consume<S, kHasBias>(plan, shared, consumer);
  }
}

template <class S>
cudaError_t launch_shape(const ForwardPlan& plan, cudaStream_t stream) {
  const auto kernel = plan.call.in.bias == nullptr ? &forward_kernel<S, false>
                                                   : &forward_kernel<S, true>;
  const int32_t ctas = (plan.tiles + S::kPipelines - 1) / S::kPipelines;
  return launch_persistent(kernel, ctas, S::kThreads, sizeof(typename S::Shared), plan, stream);
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
