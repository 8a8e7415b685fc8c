// Forward on Hopper: consumer warpgroups own boxes of queries of one head, a producer warp brings
// the keys and values that they see. CTAs stay and take one tile after the other.
//
//   producer    [tile 0] [keys 0] [values 0] [keys 1] [values 1] ... [tile 1] ...
//   consumer    S0 = Q K0^T | softmax 0 | S1 = Q K1^T, O += P0 V0 | softmax 1 | ...
//
// The softmax of a box runs while the tensor cores add the values of the one before.
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
  static constexpr int kPipelines = kGroups == 1 ? 3 : 1;
  static constexpr int kConsumers = kGroups * kPipelines;
  static constexpr bool kTakeTurns = PINGPONG && kGroups == 2;

  using Rows = Block<kDim, kGroupRows>;
  using Columns = Block<kDim, kColumns>;

  static constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;

  static constexpr int kMemory = 227 * 1024 / kPipelines;  // of a pipeline
  static constexpr int kTables = 6 * 1024 / kPipelines + 5 * 1024;  // at most
  // The next tile's queries and table come while consumers are at one, if there is room.
  static constexpr int kTiles = kDim <= 192 ? 2 : 1;
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
    int32_t token[kGroups][kGroupRows];  // where the rows of the tile at hand go
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
    fill_table<Side::kQueries>(&table, p, plan.cut, place);
    __syncwarp();
    if (elected) {
      const int32_t batch = static_cast<int32_t>(place.batch);
      uint64_t* full = &pipeline.tile_full[stage];
      ptx::barrier_expect(full, S::kGroups * box_bytes<Rows>(plan.cut.rows.size));
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
      const int32_t key_channel = place.key_head * p.head_dim;
      const int32_t value_channel = place.key_head * p.value_dim;
      const auto copy_columns = [&](const CUtensorMap* map, int32_t channel,
                                    const int32_t(&at)[kMaxRank]) {
        uint64_t* slot_full = pipeline.ring.begin_copy(position, box_bytes<Columns>(box.size));
        copy_block<Columns>(pipeline.column[pipeline.ring.slot(position)], map, slot_full,
                            channel, at, batch);
        ++position;
      };
      BoxWalk walk;
      for (int32_t i = 0; i < table.boxes; ++i) {
        const bool in_grid = i < table.grid_boxes;
        int32_t at[kMaxRank] = {0, 0, (i - table.grid_boxes) * box.size};
        if (in_grid) {
#pragma unroll
          for (int a = 0; a < kMaxRank; ++a) {
            at[a] = table.start[a] + p.window[a].dilation * walk.at[a];
          }
          walk.advance(table.length, box);
        }
        copy_columns(in_grid ? &plan.key : &plan.additional_key, key_channel, at);
        copy_columns(in_grid ? &plan.value : &plan.additional_value, value_channel, at);
      }
    }
    __syncwarp();
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
  uint32_t base = 0;  // position of the tile's first block
  for (uint32_t round = 0;; ++round) {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.tile_full[stage], round / S::kTiles % 2);
    const auto& table = pipeline.table[stage];
    if (table.end) return;
    const uint32_t queries = ptx::shared_address(pipeline.query[stage][group]);
    if (p.head_dim < S::kDim) {
      clear_padding<Rows>(pipeline.query[stage][group], p.head_dim);
      group_barrier(consumer);
    }
    view.read<Side::kQueries>(table, p);
    const int32_t boxes = uniform(table.boxes), grid_boxes = uniform(table.grid_boxes);
    int32_t i = uniform(table.first_box[group]), last = uniform(table.last_box[group]);
    const auto key_position = [&](int32_t i) { return base + 2 * i; };
    const auto value_position = [&](int32_t i) { return base + 2 * i + 1; };
    const auto pass_by = [&](int32_t from, int32_t to) {  // boxes that the warpgroup does not see
#pragma unroll 1
      for (int32_t i = from; i < to; ++i) {
        turns.wait();
        turns.pass();
        ring.wait(key_position(i));
        release(key_position(i));
        ring.wait(value_position(i));
        release(value_position(i));
      }
    };

    OnlineSoftmax softmax;
    float sums[S::kDim / 2];
#pragma unroll
    for (float& sum : sums) sum = 0;
    BoxWalk walk, weighed;  // to the next box; to the last one
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      walk.at[a] = a == cut.group_axis ? table.first_at[group] : 0;
    }

    // Makes weights of the scores of box `at`; true if the sums are to be rescaled.
    const auto weigh = [&](float(&scores)[kColumns / 2], int32_t at) {
      if (prescaled) {
#pragma unroll
        for (float& score : scores) score *= scale;
      }
      if (at >= grid_boxes) {
        const int32_t left = min(p.additional - (at - grid_boxes) * box.size, box.size);
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
      return softmax.weigh(scores, log2_scale);
    };
    const auto clean_values = [&](int32_t at) {
      if (p.frame == nullptr || at >= grid_boxes) return;
      clear_overhang<Columns>(pipeline.column[ring.slot(value_position(at))], table, weighed,
                              box);
      group_barrier(consumer);
    };

    pass_by(0, i);
    for (int run = 0; run < 2; ++run) {  // the boxes in the grid, then those of additional keys
      if (i < last) {
        uint32_t weights[kColumns / 4];
        {
          float scores[kColumns / 2];
          ring.wait(key_position(i));
          turns.wait();
          pin(scores);
          products_begin();
          multiply_channels<T, Rows, Columns>(scores, queries, block(key_position(i)));
          products_commit();
          turns.pass();
          products_wait<0>();
          pin(scores);
          release(key_position(i));
          if (weigh(scores, i)) softmax.rescale(sums);
          pack_all<T>(weights, scores);
        }
        for (++i; i < last; ++i) {
          float scores[kColumns / 2];
          ring.wait(key_position(i));
          turns.wait();
          pin(scores);
          products_begin();
          multiply_channels<T, Rows, Columns>(scores, queries, block(key_position(i)));
          products_commit();
          ring.wait(value_position(i - 1));
          clean_values(i - 1);
          pin(sums);
          pin(weights);
          products_begin();
          multiply_rows<T, Columns>(sums, weights, block(value_position(i - 1)));
          products_commit();
          turns.pass();
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
        ring.wait(value_position(i - 1));
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
    base += 2 * boxes;

    softmax.finish();
    float factor[2];
    const int64_t first_row = table.batch * p.query_tokens() * p.heads + table.head;
    float* lse = static_cast<float*>(plan.call.lse) + first_row;
    int32_t* tokens = pipeline.token[group];
    const int warp_row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows;
    __syncwarp();  // all have read the tokens of the tile before
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = 1 / softmax.total[h];
      if (threadIdx.x % 4 != 0) continue;
      const bool empty = !view.in_grid[h] || softmax.total[h] == 0;
      const int32_t token = view.token[h];
      tokens[warp_row + threadIdx.x % kWarpLanes / 4 + 8 * h] =
          token < 0 ? kNoToken : empty ? ~token : token;
      if (token >= 0) lse[int64_t{token} * p.heads] = empty ? -kInfinity : softmax.lse(h);
    }
    group_barrier(consumer);  // the queries are no longer read
    put_rows<T, Rows>(pipeline.query[stage][group], sums, factor);
    __syncwarp();
    store_rows<T, Rows>(pipeline.query[stage][group], tokens,
                        static_cast<T*>(plan.call.out) + first_row * p.value_dim,
                        int64_t{p.heads} * p.value_dim, p.value_dim);
    ptx::fence_async_proxy();  // before the next queries come
    __syncwarp();
    if (elected) ptx::barrier_arrive(&pipeline.tile_empty[stage]);
  }
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
