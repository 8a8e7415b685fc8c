// The frame that all Hopper kernels share. A CTA has consumer warpgroups, which own boxes of
// rows, and a producer warpgroup, whose warps bring those rows and then, box by box, the
// columns that they see. CTAs stay and take one tile after the other.
//
// Warpgroups either share the columns of neighbouring boxes of rows (`kGroups` of them), which
// divides the traffic, or have pipelines of their own (`kPipelines`), which suits small
// windows. Every visited box comes as two blocks, keys and values or queries and output
// gradients, in two slots of the ring.
#pragma once

#include <type_traits>

#include "bias.cuh"
#include "blocks.cuh"
#include "plans.cuh"
#include "ring.cuh"
#include "rows.cuh"
#include "tile.cuh"
#include "variants.h"

namespace jax_na::cuda::sm90 {

constexpr int kSharedMemory = 227 * 1024;

struct NoBias {};

// What the gradient of the scores needs to know of a warpgroup's rows.
struct RowNumbers {
  float lse[kGroupRows];  // in log2 units, and +inf, so that weights are 0, where it is -inf
  float delta[kGroupRows];
};

// kMaskProduct: see mask_product.cuh.
template <typename T_, int kDim_, class Pass, class Variant, bool kHasBias_, bool kMaskProduct_>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr int kRowArrays = Pass::kRowArrays;
  static constexpr int kColumns = Variant::kColumns;
  static constexpr int kGroups = Variant::kGroups;  // consumer warpgroups of a pipeline
  static constexpr int kPipelines = Variant::kPipelines;
  static constexpr bool kHasBias = kHasBias_, kMaskProduct = kMaskProduct_;
  static constexpr bool kBeginsWithBias = kHasBias && kMaskProduct;  // see bias.cuh
  static constexpr bool kAddsBias = kHasBias && !kMaskProduct;
  static constexpr int kConsumers = kGroups * kPipelines;
  static_assert(kConsumers >= 2 && kConsumers <= 4);

  using Rows = Block<kDim, kGroupRows>;
  using Columns = Block<kDim, kColumns>;

  static constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
  // Of a pipeline, one per warpgroup: warps of the producer's that bring numbers of rows.
  static constexpr int kRowReaders = Pass::template kReadsRows<kDim> ? kGroups : 0;
  static constexpr bool kHasStatistics = Pass::template kStatistics<kColumns> > 0;
  // Together at most what the CTA has at launch, 65536 / kThreads rounded down to 8 for each.
  static constexpr int kConsumerRegisters = kConsumers == 2   ? (kRowReaders > 0 ? 224 : 232)
                                            : kConsumers == 3 ? (kHasStatistics ? 152 : 160)
                                                              : 112;
  static constexpr int kProducerRegisters = kConsumers == 2 ? (kRowReaders > 0 ? 56 : 40)
                                            : kConsumers == 3 && kHasStatistics ? 56
                                                                                : 32;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <=
                (kConsumers + 1) * (65536 / kThreads / 8 * 8));

  // Whether a pipeline may stay in its place of the grid and go on to other heads, or samples if
  // it has brought a head's bias. Tiles of keys take too unequally long, and where there is one
  // pipeline, a warp of its own makes tables.
  static constexpr bool kCanStay = Pass::kRowsAre == Side::kQueries && kPipelines > 1;

  static constexpr int kProducers = kPipelines == 1 ? 2 : kPipelines;  // warps
  static_assert(kProducers + kPipelines * kRowReaders <= kGroupWarps);
  // Tiles of which rows are there at once, and tables.
  static constexpr int kMostRowTiles = Pass::template kRowTiles<kDim>;
  static constexpr int kRowTiles = kBeginsWithBias && kMostRowTiles > 2 ? 2 : kMostRowTiles;
  static constexpr int kTiles = kRowTiles > 2 ? kRowTiles : 2;
  static_assert(kRowTiles == 1 || kRowTiles == kTiles);
  static constexpr int kExchange = Pass::template kExchange<kDim, kColumns, kGroups>;
  static constexpr int kFixed =
      kRowTiles * kGroups * kRowArrays * Rows::kAllBytes + kExchange;
  static constexpr int kBias = kBeginsWithBias ? kBiasEntries<kDim> : kLargestBias;
  using Bias = std::conditional_t<kHasBias, BiasTables<kBias, kBeginsWithBias>, NoBias>;
  // Of a pipeline, and all else, at most: barriers, sets of columns, constants, alignment.
  static constexpr int kTables = kTiles * (sizeof(TileTable<kGroups>) + sizeof(Bias) +
                                         kGroups * (kRowReaders > 0 ? sizeof(RowNumbers) : 0));
  static constexpr int kElse =
      1536 + (24 * kColumns + 1536 + Pass::template kConstants<kDim, kColumns>) / kPipelines;
  static constexpr int kFit =
      (kSharedMemory / kPipelines - kFixed - kTables - kElse) /
      (Columns::kAllBytes + Pass::template kStatistics<kColumns>);
  static constexpr int kSlots = kFit < 8 ? kFit : 8;

  struct Pipeline {
    alignas(1024) uint8_t row[kRowTiles][kRowArrays][kGroups][Rows::kAllBytes];
    alignas(1024) uint8_t column[kSlots][Columns::kAllBytes];
    alignas(1024) uint8_t exchange[kExchange > 0 ? kExchange : 1];
    Ring<kSlots> ring;
    uint64_t table_full[kTiles];                     // for a warp that brings columns
    uint64_t tile_full[kTiles], tile_empty[kTiles];  // rows and table
    TileTable<kGroups> table[kTiles];
    RowNumbers row_numbers[kRowReaders > 0 ? kTiles : 1][kGroups];
    Bias bias[kTiles];  // of the heads of a tile
  };
};

// ---- Producer ----------------------------------------------------------------------------

// What comes with a box beside its blocks: nothing.
struct NoStatistics {
  __device__ __forceinline__ void read(int32_t, int32_t, const int32_t (&)[kMaxRank]) {}
  __device__ __forceinline__ void put(uint32_t) {}
};

// Starts the copies of the rows of tile `round`, and fills its table unless that is `filled` but
// for the head.
template <class S, Side kRowsAre>
__device__ __forceinline__ Visits bring_rows(const Streams& streams, const Problem& p,
                                             const void* bias, typename S::Pipeline& pipeline,
                                             const TilePlace& place, bool filled,
                                             uint32_t round) {
  using Rows = typename S::Rows;
  const Cut& cut = streams.cut;
  const uint32_t stage = round % S::kTiles;
  auto& table = pipeline.table[stage];
  const Visits visits =
      filled ? uniform(table.visits) : fill_table<kRowsAre>(&table, p, cut, place);
  if (threadIdx.x % kWarpLanes == 0) set_head<kRowsAre>(&table, p, place);
  if constexpr (S::kHasBias) {
    const int32_t heads = kRowsAre == Side::kKeys ? streams.members : 1;
    const int32_t size = static_cast<int32_t>(p.bias_size());
    const float* from = static_cast<const float*>(bias) + place.batch * p.bias_batch_stride +
                        place.head * heads * size;
    auto& tables = pipeline.bias[stage];
    if (tables.from != from) {  // those of the tile before are others
      const float factor = S::kBeginsWithBias ? 1 / static_cast<float>(p.scale) : 1;
      tables.bring(from, heads * size, factor, streams.bias);
    }
  }
  __syncwarp();
  if (threadIdx.x % kWarpLanes != 0) return visits;
  ptx::barrier_arrive(&pipeline.table_full[stage]);
  if (S::kRowTiles == 1 && round > 0) {  // the rows of the tile before lie there
    const uint32_t before = round - 1;
    ptx::barrier_wait(&pipeline.tile_empty[before % S::kTiles], before / S::kTiles % 2);
  }
  uint64_t* full = &pipeline.tile_full[stage];
  ptx::barrier_expect(full, S::kRowArrays * S::kGroups * box_bytes<Rows>(cut.rows.size));
#pragma unroll
  for (int g = 0; g < S::kGroups; ++g) {
    int32_t at[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int32_t before = a == cut.group_axis ? g * cut.rows.extent[a] : 0;
      at[a] = place.first[a] + p.window[a].dilation * before;
    }
#pragma unroll
    for (int k = 0; k < S::kRowArrays; ++k) {
      copy_block<Rows>(pipeline.row[stage % S::kRowTiles][k][g], &streams.row[k], full,
                       place.head * streams.dim[k], at, static_cast<int32_t>(place.batch));
    }
  }
  return visits;
}

// Brings the columns of a tile, box by box, from `position` of the ring on.
template <class S, class Statistics>
__device__ __forceinline__ void bring_columns(const Streams& streams, const Problem& p,
                                              typename S::Pipeline& pipeline,
                                              const Visits& visits, int32_t batch,
                                              int32_t key_head, uint32_t* position,
                                              Statistics& statistics) {
  using Columns = typename S::Columns;
  const BoxOrder& box = streams.cut.columns;
  const bool elected = threadIdx.x % kWarpLanes == 0;
  const auto copy = [&](const CUtensorMap(&maps)[2], int32_t head,
                        const int32_t (&at)[kMaxRank]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t slot = pipeline.ring.slot(*position);
      pipeline.ring.wait_empty(*position);
      if (k == 0) {
        statistics.put(slot);
        __syncwarp();
      }
      if (elected) {
        uint64_t* full = pipeline.ring.expect(*position, box_bytes<Columns>(box.size));
        copy_block<Columns>(pipeline.column[slot], &maps[k], full, head * streams.dim[k], at,
                            batch);
      }
      ++*position;
    }
  };
  for (int32_t member = 0; member < streams.members; ++member) {
    const int32_t head = key_head * streams.members + member;
    BoxWalk walk{{visits.length[0], visits.length[1], visits.length[2]}, {0, 0, 0}};
    for (int32_t i = 0; i < visits.grid_boxes; ++i) {
      int32_t at[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        at[a] = visits.start[a] + p.window[a].dilation * walk.at[a];
      }
      statistics.read(batch, head, at);
      copy(streams.column, head, at);
      walk.advance(box);
    }
    for (int32_t i = 0; i < visits.boxes - visits.grid_boxes; ++i) {
      const int32_t at[kMaxRank] = {0, 0, i * box.size};
      copy(streams.list, head, at);
    }
  }
}

// The tiles of a pipeline, one after the other, the first being `tile`. Calls
// then(visits, place) for each.
template <class S, Side kRowsAre, class Then>
__device__ __forceinline__ void produce_tiles(const Streams& streams, const Problem& p,
                                              const void* bias, typename S::Pipeline& pipeline,
                                              int32_t tile, const Then& then) {
  uint32_t round = 0;
  const auto wait_for_stage = [&] {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.tile_empty[stage], round / S::kTiles % 2 ^ 1);
    return stage;
  };
  int32_t step = streams.step, end = streams.first_spare;
  bool stays = S::kCanStay && streams.stays;
  if (S::kCanStay && tile >= step) {  // left over from those that stay
    tile += end - step;
    end = streams.tiles;
    step = static_cast<int32_t>(gridDim.x * S::kPipelines) - step;
    stays = false;
  }
  while (tile < end) {
    // Asked for long before it is needed, so that nothing waits for the answer.
    int32_t next = tile;
    if (streams.taken != nullptr && threadIdx.x % kWarpLanes == 0) {
      next = atomicAdd(streams.taken, 1);
    }
    const TilePlace place(tile, streams.cut.ctas, p.window, streams.group, streams.key_heads,
                          S::kHasBias);
    if (place.exists(Sides<kRowsAre>::row_grid(p))) {
      wait_for_stage();
      const bool filled = stays && round >= S::kTiles;
      then(bring_rows<S, kRowsAre>(streams, p, bias, pipeline, place, filled, round), place);
      ++round;
    }
    tile = step + uniform(next);
  }
  const uint32_t stage = wait_for_stage();
  if (threadIdx.x % kWarpLanes == 0) {
    pipeline.table[stage].end = true;
    ptx::barrier_arrive(&pipeline.table_full[stage]);
    ptx::barrier_arrive(&pipeline.tile_full[stage]);
  }
}

// The columns of all tiles of a pipeline whose rows another warp brings.
template <class S, class Statistics>
__device__ __forceinline__ void produce_columns(const Streams& streams, const Problem& p,
                                                typename S::Pipeline& pipeline,
                                                Statistics statistics) {
  uint32_t position = 0;
  for (uint32_t round = 0;; ++round) {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.table_full[stage], round / S::kTiles % 2);
    const auto& table = pipeline.table[stage];
    if (table.end) return;
    const Visits visits = uniform(table.visits);
    const int32_t batch = uniform(static_cast<int32_t>(table.batch));
    const int32_t key_head = uniform(table.key_head);
    __syncwarp();
    if (threadIdx.x % kWarpLanes == 0) ptx::barrier_arrive(&pipeline.tile_empty[stage]);
    bring_columns<S>(streams, p, pipeline, visits, batch, key_head, &position, statistics);
  }
}

// The part of producer warp `warp`. Where there is one pipeline only, one warp brings rows and
// another columns, so that no copy of columns waits for the table of the next tile; otherwise
// every pipeline has a warp that does both.
template <class S, Side kRowsAre, class Statistics>
__device__ __forceinline__ void produce(const Streams& streams, const Problem& p,
                                        const void* bias, typename S::Pipeline& pipeline,
                                        int warp, Statistics statistics) {
  if constexpr (S::kPipelines == 1) {
    if (warp == 0) {
      produce_tiles<S, kRowsAre>(streams, p, bias, pipeline, blockIdx.x,
                                 [](const Visits&, const TilePlace&) {});
    } else {
      produce_columns<S>(streams, p, pipeline, statistics);
    }
  } else {
    uint32_t position = 0;
    // Neighbouring tiles on different multiprocessors: so are those of the last round.
    produce_tiles<S, kRowsAre>(streams, p, bias, pipeline, warp * gridDim.x + blockIdx.x,
                               [&](const Visits& visits, const TilePlace& place) {
                                 bring_columns<S>(streams, p, pipeline, visits,
                                                  static_cast<int32_t>(place.batch),
                                                  place.key_head, &position, statistics);
                               });
  }
}

// ---- Consumers ---------------------------------------------------------------------------

// A consumer warpgroup's side of its pipeline.
template <class S>
struct Consumer {
  typename S::Pipeline& pipeline;
  int index, group;  // among all consumers, in the pipeline
  uint32_t round = 0;
  uint32_t base = 0;  // position of the first block that is not behind

  __device__ __forceinline__ Consumer(typename S::Pipeline& pipeline, int index)
      : pipeline(pipeline), index(index), group(index % S::kGroups) {}

  static __device__ __forceinline__ bool elected() { return threadIdx.x % kWarpLanes == 0; }

  // The stage of the next tile, whose rows and table have arrived.
  __device__ __forceinline__ uint32_t next_tile() {
    const uint32_t stage = round % S::kTiles;
    ptx::barrier_wait(&pipeline.tile_full[stage], round / S::kTiles % 2);
    ++round;
    return stage;
  }
  __device__ __forceinline__ void release_tile(uint32_t stage) {
    __syncwarp();
    if (elected()) ptx::barrier_arrive(&pipeline.tile_empty[stage]);
  }
  __device__ __forceinline__ uint8_t* rows(uint32_t stage, int array) {
    return pipeline.row[stage % S::kRowTiles][array][group];
  }

  __device__ __forceinline__ uint8_t* block(uint32_t position) {
    return pipeline.column[pipeline.ring.slot(position)];
  }
  __device__ __forceinline__ void wait(uint32_t position) { pipeline.ring.wait(position); }
  __device__ __forceinline__ void release(uint32_t position) {
    __syncwarp();  // all lanes have read what came beside the block
    if (elected()) pipeline.ring.release(position);
  }
  // The two blocks of a box that the warpgroup does not see.
  __device__ __forceinline__ void pass_by(uint32_t position) {
    wait(position);
    release(position);
    wait(position + 1);
    release(position + 1);
  }
  __device__ __forceinline__ void barrier() const { group_barrier(index); }
};

// Where the walk of a warpgroup over the boxes that it sees begins.
template <int kGroups>
__device__ __forceinline__ BoxWalk walk_of(const TileTable<kGroups>& table, const Cut& cut,
                                           int group) {
  BoxWalk walk;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    walk.length[a] = uniform(table.visits.length[a]);
    walk.at[a] = a == cut.group_axis ? uniform(table.first_at[group]) : 0;
  }
  return walk;
}

// Barriers and what no copy writes, which must not be taken for infinity. All threads; the
// caller synchronises.
template <class S>
__device__ __forceinline__ void init(typename S::Pipeline (&pipelines)[S::kPipelines],
                                     const Cut& cut) {
  if (threadIdx.x == 0) {
    for (auto& pipeline : pipelines) {
      pipeline.ring.init(S::kGroups * kGroupWarps);
      for (int i = 0; i < S::kTiles; ++i) {
        ptx::barrier_init(&pipeline.table_full[i], 1);
        ptx::barrier_init(&pipeline.tile_full[i], 1 + S::kRowReaders);
        // A warp that brings columns needs the table, too.
        ptx::barrier_init(&pipeline.tile_empty[i],
                          S::kGroups * kGroupWarps + S::kProducers - S::kPipelines);
      }
    }
    ptx::fence_barrier_init();
  }
  for (auto& pipeline : pipelines) {
    clear_rest<typename S::Columns, S::kThreads>(pipeline.column[0], S::kSlots,
                                                 cut.columns.size);
    if constexpr (S::kHasBias) {
      for (auto& tables : pipeline.bias) tables.clear(S::kThreads);
    }
    clear_rest<typename S::Rows, S::kThreads>(
        pipeline.row[0][0][0], S::kRowTiles * S::kRowArrays * S::kGroups, cut.rows.size);
  }
  ptx::fence_async_proxy();
}

}  // namespace jax_na::cuda::sm90
