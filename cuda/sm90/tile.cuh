// What a CTA of the Hopper kernels owns and visits, beyond cuda/fused/geometry.cuh.
//
// A CTA owns one box of rows per consumer warpgroup, next to each other on the *group axis*,
// the caller's first. It walks over boxes of columns that begin where the union of all its
// intervals begins, last axis fastest, and then over the additional keys. Because the group
// axis is the slowest, a warpgroup sees a contiguous run of the boxes.
#pragma once

#include <cstdint>

#include "../fused/stream.cuh"
#include "wgmma.cuh"

namespace jax_na::cuda::sm90 {

using fused::BoxOrder;
using fused::Divisor;
using fused::Interval;
using fused::kFullWarp;
using fused::kNoHi;
using fused::kNoLo;
using fused::kNoToken;
using fused::kWarpLanes;
using fused::Side;
using fused::Sides;
using fused::TileGrid;
using fused::TilePlace;

constexpr int kGroupWarps = kGroupThreads / kWarpLanes;
constexpr int kWarpRows = kGroupRows / kGroupWarps;
constexpr int32_t kEverything = 1 << 28;  // beyond every relative class index

// Tells the compiler that a value is the same in all lanes.
__device__ __forceinline__ int32_t uniform(int32_t x) {
  return __shfl_sync(kFullWarp, x, 0);
}

// How the rows of a launch are cut, and the boxes that they visit.
struct Cut {
  TileGrid ctas;     // tiles of all warpgroups of a CTA together
  BoxOrder rows;     // of one warpgroup
  BoxOrder columns;  // of a box
  Divisor column_extent[kMaxRank];
  int32_t group_axis;
  int32_t first_entry[kMaxRank];  // of the column's coordinates in a product of masks
};

struct alignas(8) Seen {
  int32_t lo, hi;
};

// The boxes that the warpgroups of a CTA visit together.
struct Visits {
  int32_t start[kMaxRank];    // local index of the first column
  int32_t length[kMaxRank];   // of the union, in class steps
  int32_t grid_boxes, boxes;  // without and with those of additional keys
};

__device__ __forceinline__ Visits uniform(const Visits& v) {
  return {{uniform(v.start[0]), uniform(v.start[1]), uniform(v.start[2])},
          {uniform(v.length[0]), uniform(v.length[1]), uniform(v.length[2])},
          uniform(v.grid_boxes),
          uniform(v.boxes)};
}

// One tile as all warps of a CTA see it, in shared memory.
template <int kGroups>
struct TileTable {
  static constexpr int kEntries = kGroups * kGroupRows + kMaxRank - 1;

  bool end;  // there are no more tiles, and nothing else is set
  int64_t batch;
  int32_t head, key_head;
  int64_t first_row;  // of the sample and head, where all heads of a token are neighbours
  // The token of a row, ~token where it is outside of the grid, kNoToken where there is none.
  int32_t token[kGroups][kGroupRows];
  // What the coordinates of axis 0, then 1, then 2 see, counted from the start of the union.
  // Those without a row in the grid see everything: what they get is not stored.
  Seen seen[kEntries];
  int32_t lo[kMaxRank];  // first relative class index of the union
  Visits visits;
  int32_t first_box[kGroups], last_box[kGroups];  // the run that a warpgroup sees, half-open
  int32_t first_at[kGroups];  // where the run begins on the group axis, from the union's start
};

// Which sample and head a tile is of; to be called by one lane.
template <Side kRowsAre, int kGroups>
__device__ __forceinline__ void set_head(TileTable<kGroups>* table, const Problem& p,
                                         const TilePlace& place) {
  constexpr bool kQueries = kRowsAre == Side::kQueries;
  table->batch = place.batch;
  table->head = place.head;
  table->key_head = place.key_head;
  table->first_row = place.batch * (kQueries ? p.query_tokens() : p.key_tokens()) *
                         (kQueries ? p.heads : p.key_heads) +
                     place.head;
}

// Fills the rest of the table of a tile; to be called by one whole warp.
template <Side kRowsAre, int kGroups>
__device__ __forceinline__ Visits fill_table(TileTable<kGroups>* table, const Problem& p,
                                             const Cut& cut, const TilePlace& place) {
  using S = Sides<kRowsAre>;
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t (&first)[kMaxRank] = place.first;
  const int axis_0 = cut.group_axis;  // a lane's axis relative to it is -1 or more
  const auto entries = [&](int a) { return cut.rows.extent[a] * (a == axis_0 ? kGroups : 1); };
  const int32_t end_0 = entries(0), end_1 = end_0 + entries(1), end_2 = end_1 + entries(2);

  // The unions of the group axis, one per warpgroup, then those of the other axes.
  constexpr int kUnions = kGroups + kMaxRank - 1;
  int32_t lo[kUnions], hi[kUnions];
#pragma unroll
  for (int u = 0; u < kUnions; ++u) {
    lo[u] = kNoLo;
    hi[u] = kNoHi;
  }
#pragma unroll 1
  for (int e = lane; e < end_2; e += kWarpLanes) {
    const int axis = e < end_0 ? 0 : e < end_1 ? 1 : 2;
    const int32_t i = e - (axis == 0 ? 0 : axis == 1 ? end_0 : end_1);
    const int32_t start = axis == 0 ? first[0] : axis == 1 ? first[1] : first[2];
    const Interval seen = S::interval(p, p.axis_frame(place.batch, axis), axis, start, i);
    table->seen[e] = seen.in_grid() ? Seen{seen.lo, seen.hi} : Seen{-kEverything, kEverything};
    int own = kGroups + axis - (axis > axis_0 ? 1 : 0);
    if (axis == axis_0) {
      own = 0;
#pragma unroll
      for (int g = 1; g < kGroups; ++g) own += i >= g * cut.rows.extent[axis] ? 1 : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnions; ++u) {
      lo[u] = min(lo[u], own == u ? seen.lo : kNoLo);
      hi[u] = max(hi[u], own == u ? seen.hi : kNoHi);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnions; ++u) {
    lo[u] = ptx::warp_min(lo[u]);
    hi[u] = ptx::warp_max(hi[u]);
  }

  Visits visits;
  visits.grid_boxes = 1;
  int32_t inner = 1;  // boxes of one step along the group axis
  int32_t least[kMaxRank];
#pragma unroll
  for (int a = kMaxRank - 1; a >= 0; --a) {
    int32_t low = kNoLo, high = kNoHi;
#pragma unroll
    for (int u = 0; u < kUnions; ++u) {
      const int axis = u < kGroups            ? axis_0
                       : u - kGroups < axis_0 ? u - kGroups
                                              : u - kGroups + 1;
      low = axis == a ? min(low, lo[u]) : low;
      high = axis == a ? max(high, hi[u]) : high;
    }
    least[a] = low;
    visits.length[a] = max(0, high - low);
    visits.start[a] = S::origin(p, p.axis_frame(place.batch, a), a, first[a]) +
                      (high > low ? p.window[a].dilation * low : 0);
    const int32_t count =
        cut.column_extent[a].quotient(visits.length[a] + cut.columns.extent[a] - 1);
    visits.grid_boxes *= count;
    inner *= a > axis_0 ? count : 1;
  }
  int32_t lists = 0;
  if (kRowsAre == Side::kQueries && p.additional > 0) {
    lists = (p.additional + cut.columns.size - 1) / cut.columns.size;
  }
  visits.boxes = visits.grid_boxes + lists;

  __syncwarp();
  for (int row = lane; row < kGroups * kGroupRows; row += kWarpLanes) {
    const int group = row / kGroupRows;
    int32_t at[kMaxRank], token = 0, begin = 0;
    cut.rows.point(row % kGroupRows, at);
    bool exists = row % kGroupRows < cut.rows.size, inside = true;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      at[a] += a == axis_0 ? group * cut.rows.extent[a] : 0;
      const int32_t i = first[a] + p.window[a].dilation * at[a];
      token = token * S::row_grid(p)[a] + i;
      exists = exists && i < S::row_grid(p)[a];
      inside = exists && inside && table->seen[begin + at[a]].lo != -kEverything;
      begin += entries(a);
    }
    table->token[group][row % kGroupRows] = !exists ? kNoToken : inside ? token : ~token;
  }
  __syncwarp();
  for (int e = lane; e < end_2; e += kWarpLanes) {
    const Seen seen = table->seen[e];
    const int32_t low = e < end_0 ? least[0] : e < end_1 ? least[1] : least[2];
    if (seen.lo != -kEverything) table->seen[e] = {seen.lo - low, seen.hi - low};
  }
  if (lane == 0) {
    table->end = false;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      table->lo[a] = least[a];
    }
    table->visits = visits;
    const int32_t low = axis_0 == 0 ? least[0] : axis_0 == 1 ? least[1] : least[2];
    const Divisor& extent = cut.column_extent[axis_0];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool any = lo[g] < hi[g] && visits.grid_boxes > 0;
      const int32_t from = any ? extent.quotient(lo[g] - low) : 0;
      const int32_t to = any ? extent.quotient(hi[g] - 1 - low) + 1 : 0;
      table->first_box[g] = from * inner;
      table->last_box[g] = to * inner;
      table->first_at[g] = from * extent.value;
    }
  }
  return visits;
}

// A walk over the boxes of a tile, in class steps from the start of the union.
struct BoxWalk {
  int32_t length[kMaxRank];
  int32_t at[kMaxRank];

  __device__ __forceinline__ void advance(const BoxOrder& box) {
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

// Of two rows the columns that a lane holds (l / 4 and l / 4 + 8 of its warp, columns 8 n +
// 2 (l % 4) + i): bit 2 n + i.
template <int kColumns>
struct LaneMask {
  static constexpr int kWords = (kColumns + 127) / 128;
  uint32_t bits[2][kWords];

  __device__ __forceinline__ bool test(int n, int h, int i) const {
    return (bits[h][n / 16] >> (n % 16 * 2 + i) & 1) != 0;
  }

  // The first `count` columns, in both rows.
  static __device__ __forceinline__ LaneMask leading(int32_t count) {
    LaneMask mask;
    const int32_t own = count - threadIdx.x % 4 * 2;  // of columns 8 n and 8 n + 1
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int32_t left = own - 128 * w;
      const int32_t bits = left <= 0 ? 0 : left / 8 * 2 + min(left % 8, 2);
      const auto word = static_cast<uint32_t>(ptx::shift_left(1, min(bits, 32)) - 1);
      mask.bits[0][w] = mask.bits[1][w] = word;
    }
    return mask;
  }
};

// Sets of the columns of a box, in the order of LaneMask.
template <int kColumns>
struct ColumnSets {
  static constexpr int kWords = LaneMask<kColumns>::kWords;
  static constexpr int kEntries = kColumns + 2 * kMaxRank;

  // Entry v of an axis: the columns whose coordinate on it is less than v, for lanes l % 4.
  uint32_t below[kEntries][kWords][4];

  static __device__ __forceinline__ int entry(const BoxOrder& box, int axis) {
    return axis == 0 ? 0 : axis == 1 ? box.extent[0] + 1 : box.extent[0] + box.extent[1] + 2;
  }

  // To be called by all `warps` warps of a CTA.
  __device__ __forceinline__ void fill(const BoxOrder& box, int warps) {
    const int lane = threadIdx.x % kWarpLanes;
    for (int part = threadIdx.x / kWarpLanes; part < 4 * kWords; part += warps) {
      const int w = part / 4, quad = part % 4;
      const int column = 128 * w + 8 * (lane / 2) + 2 * quad + lane % 2;
      int32_t at[kMaxRank];
      box.point(column, at);
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int begin = entry(box, a);
        for (int v = 0; v <= box.extent[a]; ++v) {
          const uint32_t word = __ballot_sync(kFullWarp, column < box.size && at[a] < v);
          if (lane == 0) below[begin + v][w][quad] = word;
        }
      }
    }
  }

  // Removes from row h of the mask the columns whose coordinate on `axis` is not in [lo, hi).
  __device__ __forceinline__ void restrict_to(LaneMask<kColumns>* mask, int h,
                                              const BoxOrder& box, int axis, int32_t lo,
                                              int32_t hi) const {
    const int begin = entry(box, axis), extent = box.extent[axis];
    const int l = max(0, min(lo, extent)), r = max(l, min(hi, extent));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      mask->bits[h][w] &=
          below[begin + r][w][threadIdx.x % 4] & ~below[begin + l][w][threadIdx.x % 4];
    }
  }
};

// The two rows of a lane, and what they see relative to the start of the union.
struct RowView {
  int32_t point[2][kMaxRank];  // in the boxes of the CTA; does not change
  int32_t entry[2][kMaxRank];  // of what they see in a table; likewise
  Seen seen[2][kMaxRank];
  Seen common[kMaxRank];  // what all rows of the warp see

  template <int kGroups>
  __device__ __forceinline__ void place(const Cut& cut, int group) {
    const int warp = threadIdx.x % kGroupThreads / kWarpLanes;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp * kWarpRows + threadIdx.x % kWarpLanes / 4 + 8 * h;
      // A row too many sees what the last one does.
      cut.rows.point(min(row, cut.rows.size - 1), point[h]);
      int32_t begin = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const bool grouped = a == cut.group_axis;
        point[h][a] += grouped ? group * cut.rows.extent[a] : 0;
        entry[h][a] = begin + point[h][a];
        begin += cut.rows.extent[a] * (grouped ? kGroups : 1);
      }
    }
  }

  // `exists` tells of both rows whether they see anything.
  template <int kGroups>
  __device__ __forceinline__ void read(const TileTable<kGroups>& table, const Cut& cut,
                                       const bool (&exists)[2]) {
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (a < cut.group_axis) continue;  // the grid has no such axis
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        seen[h][a] = exists[h] ? table.seen[entry[h][a]] : Seen{0, 0};
      }
      common[a].lo = ptx::warp_max(max(seen[0][a].lo, seen[1][a].lo));
      common[a].hi = ptx::warp_min(min(seen[0][a].hi, seen[1][a].hi));
    }
  }

  // Whether all rows see the whole box at hand, of which every column exists.
  __device__ __forceinline__ bool all_see(const BoxWalk& walk, const Cut& cut) const {
    bool all = true;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (a < cut.group_axis) continue;
      all = all && common[a].lo <= walk.at[a] &&
            walk.at[a] + cut.columns.extent[a] <= common[a].hi;
    }
    return all;
  }

  template <int kColumns>
  __device__ __forceinline__ LaneMask<kColumns> mask(const ColumnSets<kColumns>& sets,
                                                     const BoxWalk& walk,
                                                     const Cut& cut) const {
    LaneMask<kColumns> mask;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int w = 0; w < LaneMask<kColumns>::kWords; ++w) mask.bits[h][w] = ~0u;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        if (a < cut.group_axis) continue;
        sets.restrict_to(&mask, h, cut.columns, a, seen[h][a].lo - walk.at[a],
                         seen[h][a].hi - walk.at[a]);
      }
    }
    return mask;
  }
};

}  // namespace jax_na::cuda::sm90
