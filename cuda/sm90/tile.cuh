// What a CTA of the Hopper kernels owns and visits, beyond cuda/fused/geometry.cuh.
//
// A CTA owns one box of rows per consumer warpgroup, next to each other on the *group axis*, the
// caller's first. It walks over boxes of columns that begin where the union of all its intervals
// begins, last axis fastest, and then over the additional keys. Because the group axis is the
// slowest, a warpgroup sees a contiguous run of the boxes.
#pragma once

#include <cstdint>

#include "../fused/geometry.cuh"
#include "wgmma.cuh"

namespace jax_na::cuda::sm90 {

using fused::BoxOrder;
using fused::Divisor;
using fused::Interval;
using fused::kFullWarp;
using fused::kNoHi;
using fused::kNoLo;
using fused::kWarpLanes;
using fused::Side;
using fused::Sides;
using fused::TileGrid;

constexpr int kGroupWarps = kGroupThreads / kWarpLanes;
constexpr int kWarpRows = kGroupRows / kGroupWarps;
constexpr int32_t kEverything = 1 << 28;  // beyond every relative class index

// How the rows of a launch are cut, and the boxes that they visit.
struct Cut {
  TileGrid ctas;      // tiles of all warpgroups of a CTA together
  BoxOrder rows;      // of one warpgroup
  BoxOrder columns;   // of a box
  int32_t group_axis;
};

// One tile as all warps of a CTA see it, in shared memory.
template <int kGroups>
struct TileTable {
  static constexpr int kEntries = kGroups * kGroupRows + kMaxRank - 1;

  Interval interval[kEntries];  // of the coordinates of axis 0, then 1, then 2
  int32_t lo[kMaxRank];         // first relative class index of the union
  int32_t start[kMaxRank];      // its local index
  int32_t length[kMaxRank];     // of the union, in class steps
  int32_t grid_boxes, boxes;    // without and with those of additional keys
  int32_t first_box[kGroups], last_box[kGroups];  // the run that a warpgroup sees, half-open
  int32_t first_at[kGroups];  // where the run begins on the group axis, from the union's start
};

// Fills the table of the tile whose first token is `first`; to be called by one whole warp.
template <Side kRowsAre, int kGroups>
__device__ __forceinline__ void fill_table(TileTable<kGroups>* table, const Problem& p,
                                           const Cut& cut, int64_t batch,
                                           const int32_t (&first)[kMaxRank]) {
  using S = Sides<kRowsAre>;
  const int lane = threadIdx.x % kWarpLanes;
  int32_t begin = 0, boxes = 1, first_box[kGroups], last_box[kGroups], first_at[kGroups];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const AxisFrame frame = p.axis_frame(batch, a);
    const int32_t extent = cut.rows.extent[a], box = cut.columns.extent[a];
    const bool grouped = a == cut.group_axis;
    int32_t lo[kGroups], hi[kGroups], least = kNoLo, most = kNoHi;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      lo[g] = kNoLo;
      hi[g] = kNoHi;
      if (g > 0 && !grouped) continue;
      for (int i = lane; i < extent; i += kWarpLanes) {
        const Interval seen = S::interval(p, frame, a, first[a], g * extent + i);
        table->interval[begin + i] = seen;
        lo[g] = min(lo[g], seen.lo);
        hi[g] = max(hi[g], seen.hi);
      }
      begin += extent;
      lo[g] = ptx::warp_min(lo[g]);
      hi[g] = ptx::warp_max(hi[g]);
      least = min(least, lo[g]);
      most = max(most, hi[g]);
    }
    const int32_t length = max(0, most - least);
    const int32_t count = (length + box - 1) / box;
    boxes *= count;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (grouped) {
        const bool any = lo[g] < hi[g];
        first_box[g] = any ? (lo[g] - least) / box : 0;
        first_at[g] = first_box[g] * box;
        last_box[g] = any ? (hi[g] - 1 - least) / box + 1 : 0;
      } else if (a > cut.group_axis) {
        first_box[g] *= count;
        last_box[g] *= count;
      }
    }
    if (lane == 0) {
      table->lo[a] = least;
      table->start[a] =
          S::origin(p, frame, a, first[a]) + p.window[a].dilation * (length > 0 ? least : 0);
      table->length[a] = length;
    }
  }
  if (lane == 0) {
    table->grid_boxes = boxes;
    const int32_t lists = kRowsAre == Side::kQueries
                              ? (p.additional + cut.columns.size - 1) / cut.columns.size
                              : 0;
    table->boxes = boxes + lists;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      table->first_box[g] = first_box[g];
      table->last_box[g] = last_box[g];
      table->first_at[g] = first_at[g];
    }
  }
}

// Position of a walk over the boxes of a tile, in class steps from the start of the union.
struct BoxWalk {
  int32_t at[kMaxRank] = {0, 0, 0};

  __device__ __forceinline__ void advance(const int32_t (&length)[kMaxRank],
                                          const BoxOrder& box) {
    at[2] += box.extent[2];
    if (at[2] < length[2]) return;
    at[2] = 0;
    at[1] += box.extent[1];
    if (at[1] < length[1]) return;
    at[1] = 0;
    at[0] += box.extent[0];
  }
};

// ---- Masks -------------------------------------------------------------------------------

// Sets of the columns of a box, one bit each, in two halves of kHalf words.
template <int kColumns>
struct ColumnSets {
  static constexpr int kWords = (kColumns + 31) / 32;
  static constexpr int kUsed = (kWords + 1) / 2;                        // words of a half
  static constexpr int kHalf = kUsed == 3 ? 4 : kUsed;                  // for aligned loads
  static constexpr int kEntries = kColumns + 2 * kMaxRank;

  struct alignas(kHalf * 4) Half {
    uint32_t word[kHalf];
  };
  // Entry v of an axis: the columns whose coordinate on it is less than v.
  Half below[kEntries][2];

  static __device__ __forceinline__ int entry(const BoxOrder& box, int axis) {
    return axis == 0 ? 0
           : axis == 1 ? box.extent[0] + 1
                       : box.extent[0] + box.extent[1] + 2;
  }

  // To be called by all `warps` warps of a CTA.
  __device__ __forceinline__ void fill(const BoxOrder& box, int warps) {
    const int lane = threadIdx.x % kWarpLanes;
    for (int w = threadIdx.x / kWarpLanes; w < 2 * kUsed; w += warps) {
      const int column = w * 32 + lane;
      int32_t at[kMaxRank];
      box.point(column, at);
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int begin = entry(box, a);
        for (int v = 0; v <= box.extent[a]; ++v) {
          const uint32_t word = __ballot_sync(kFullWarp, column < box.size && at[a] < v);
          if (lane == 0) below[begin + v][w / kUsed].word[w % kUsed] = word;
        }
      }
    }
  }

  // The first `count` columns.
  static __device__ __forceinline__ Half leading(int32_t count, int half) {
    Half set;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int32_t bits = max(0, min(32, count - 32 * (half * kUsed + i)));
      set.word[i] = static_cast<uint32_t>(ptx::shift_left(1, bits) - 1);
    }
    return set;
  }

  // The columns of half `half` with coordinates in [lo, hi) on every axis.
  __device__ __forceinline__ Half select(const BoxOrder& box, int half,
                                         const int32_t (&lo)[kMaxRank],
                                         const int32_t (&hi)[kMaxRank]) const {
    Half set;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) set.word[i] = ~0u;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int begin = entry(box, a);
      const int l = max(0, min(lo[a], box.extent[a])), h = max(l, min(hi[a], box.extent[a]));
      const Half from = below[begin + l][half], to = below[begin + h][half];
#pragma unroll
      for (int i = 0; i < kUsed; ++i) set.word[i] &= to.word[i] & ~from.word[i];
    }
    return set;
  }
};

// For the two rows of a lane (l / 4 and l / 4 + 8 of its warp) the columns that it sees, shifted
// so that bits 8 n and 8 n + 1 of word n / 4 are those of this lane.
template <int kColumns>
struct LaneMask {
  using Sets = ColumnSets<kColumns>;
  uint32_t bits[2][Sets::kWords];

  // Lane l has half l / 16 of the set of row l % 16 of the warp.
  __device__ __forceinline__ explicit LaneMask(const typename Sets::Half& set) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int w = 0; w < Sets::kWords; ++w) {
        const int from = lane / 4 + 8 * h + kWarpRows * (w / Sets::kUsed);
        bits[h][w] =
            __shfl_sync(kFullWarp, set.word[w % Sets::kUsed], from) >> lane % 4 * 2;
      }
    }
  }
  __device__ __forceinline__ bool test(int n, int h, int i) const {
    return (bits[h][n / 4] >> (n % 4 * 8 + i) & 1) != 0;
  }
};

// The rows of a warp: each lane keeps what row l % 16 sees, relative to the start of the union.
struct RowView {
  int32_t point[kMaxRank];               // of the row in its box; does not change
  int32_t entry[kMaxRank];               // of its intervals in a table; likewise
  int32_t lo[kMaxRank], hi[kMaxRank];
  int32_t common_lo[kMaxRank], common_hi[kMaxRank];  // what all rows of the warp see
  int32_t token;                         // local index, or -1 where the row has none
  bool in_grid;

  template <int kGroups>
  __device__ __forceinline__ void place(const Cut& cut, int group) {
    const int row = threadIdx.x % kGroupThreads / kWarpLanes * kWarpRows +
                    threadIdx.x % kWarpRows;
    cut.rows.point(row, point);
    const bool exists = row < cut.rows.size;
    if (!exists) point[0] = -1;
    int32_t begin = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const bool grouped = a == cut.group_axis;
      point[a] += grouped && exists ? group * cut.rows.extent[a] : 0;
      entry[a] = begin + max(point[a], 0);
      begin += cut.rows.extent[a] * (grouped ? kGroups : 1);
    }
  }

  template <Side kRowsAre, int kGroups>
  __device__ __forceinline__ void read(const TileTable<kGroups>& table, const Problem& p,
                                       const int32_t (&first)[kMaxRank]) {
    token = 0;
    in_grid = point[0] >= 0;
    bool exists = in_grid;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const Interval seen = table.interval[entry[a]];
      lo[a] = seen.lo - table.lo[a];
      hi[a] = seen.hi - table.lo[a];
      in_grid = in_grid && seen.in_grid;
      const int32_t grid = Sides<kRowsAre>::row_grid(p)[a];
      const int32_t i = first[a] + p.window[a].dilation * point[a];
      exists = exists && i < grid;
      token = token * grid + i;
    }
    if (!exists) token = -1;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (!in_grid) {  // such a row is not stored or stored as zeros: it needs no mask
        lo[a] = -kEverything;
        hi[a] = kEverything;
      }
      common_lo[a] = ptx::warp_max(lo[a]);
      common_hi[a] = ptx::warp_min(hi[a]);
    }
  }

  // Whether all rows see the whole box at hand, of which every column exists.
  __device__ __forceinline__ bool all_see(const BoxWalk& walk, const BoxOrder& box) const {
    bool all = true;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      all = all && common_lo[a] <= walk.at[a] && walk.at[a] + box.extent[a] <= common_hi[a];
    }
    return all;
  }

  template <int kColumns>
  __device__ __forceinline__ LaneMask<kColumns> mask(const ColumnSets<kColumns>& sets,
                                                     const BoxWalk& walk,
                                                     const BoxOrder& box) const {
    int32_t from[kMaxRank], to[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      from[a] = lo[a] - walk.at[a];
      to[a] = hi[a] - walk.at[a];
    }
    const int half = threadIdx.x % kWarpLanes / kWarpRows;
    return LaneMask<kColumns>(sets.select(box, half, from, to));
  }
};

}  // namespace jax_na::cuda::sm90
