// The interface between the fused kernels' planner (fused.cc, compiled once) and their
// inner loops (fused_tile.h, compiled once per instruction set). Plain data only.
//
// A tile is a box of up to `lanes` tokens of one residue class per axis, one token in each
// SIMD lane: queries in the forward kernel and for dquery, keys for dkey and dvalue. The
// tokens of the other kind that any lane sees form a box too; the kernel visits its rows
// one after the other, and lanes that do not see a row are masked.
#pragma once

#include <cstdint>

#include "../ffi/problem.h"

namespace jax_na::cpu {

constexpr int kMaxLanes = 64;

// One token of a tile on one axis.
struct LaneSlot {
  int32_t position;  // local index, or -1: no token
  int32_t in_grid;   // 1 if the frame's grid contains it
  int32_t begin;     // first row it sees, counted from the first row of the tile's box
  int32_t count;     // rows it sees
  int32_t bias;      // row r of the box has index bias + r (queries as lanes), bias - r (keys)
};

// The rows that one tile visits on one axis: first + dilation * r, 0 <= r < count.
struct RowSpan {
  int32_t first;
  int32_t count;
};

struct AxisTiles {
  const LaneSlot* slots;  // `extent` of them per tile
  const RowSpan* rows;    // one per tile
};

// All tiles of one kind of token.
struct TilePlan {
  int32_t vectors;                    // SIMD vectors of lanes in a tile
  int32_t extent[kMaxRank];           // lanes per axis
  int32_t tiles[kMaxRank];            // tiles per axis
  int32_t region[kMaxRank];           // tiles per axis that one task takes
  int32_t regions[kMaxRank];          // tasks per axis
  int8_t lane[kMaxRank][kMaxLanes];   // slot of each lane on each axis
  int32_t lanes;                      // product of the extents
  const AxisTiles* frames;            // kMaxRank per frame
  int64_t frame_stride;               // kMaxRank, or 0 where one frame serves all samples
  int64_t bias_size;                  // entries of one head's table

  int64_t tasks() const { return int64_t(regions[0]) * regions[1] * regions[2]; }
};

// The part of the queries of one sample that one task visits for the additional keys.
struct QuerySlab {
  int32_t first[kMaxRank], count[kMaxRank];  // the local queries inside the frame's grid
  int64_t begin, end;                        // of these, in row-major order
};

// What one instruction set provides.
struct FusedKernels {
  const char* name;
  int32_t vector_bytes;
  int32_t small_vectors, large_vectors;  // vectors per tile that are compiled

  void (*forward)(const ForwardCall& call, const TilePlan& queries, int64_t batch, int32_t head,
                  int64_t task);
  // Writes dquery and adds to the table dbias (which has the accumulation type); each may
  // be null.
  void (*backward_queries)(const BackwardCall& call, const TilePlan& queries, int64_t batch,
                           int32_t head, int64_t task, void* dbias);
  void (*backward_keys)(const BackwardCall& call, const TilePlan& keys, int64_t batch,
                        int32_t key_head, int64_t task);
  // Writes partial sums [additional, head_dim + value_dim], of the accumulation type.
  void (*backward_additional)(const BackwardCall& call, int64_t batch, int32_t key_head,
                              const QuerySlab& slab, void* partial);
};

#if defined(__x86_64__)
extern const FusedKernels kFusedAvx512, kFusedAvx2;
#endif
extern const FusedKernels kFusedBaseline;

}  // namespace jax_na::cpu
