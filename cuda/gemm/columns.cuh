// The columns of a tile in one list, and which of them a row sees.
//
// A tile visits the union of the intervals of its rows (fused/geometry.cuh). Here the tokens
// of the union are numbered, last axis fastest, and visited so many at a time: a box is a
// piece of the list and has no shape. So no box but the last has empty columns, and where
// columns are keys, those of a box that a query sees are a run of its slots, which have the
// same order.
#pragma once

#include <cstdint>

#include "../fused/geometry.cuh"

namespace jax_na::cuda::gemm {

using namespace fused;

struct ColumnList {
  Walk tokens;               // of the union: where it starts, its lengths, its tokens
  int32_t length[kMaxRank];  // with columns that only the list has
  int32_t period[kMaxRank];  // columns after which an axis starts anew
  int32_t size;

  // Of every axis but the first the list has `least` columns or more.
  template <Side kRowsAre, int kRows>
  __device__ __forceinline__ void start(const RowTables<kRows>& tables, const Problem& p,
                                        const TileGrid& grid,
                                        const int32_t (&least)[kMaxRank]) {
    tokens.start<kRowsAre>(tables, p, grid, 0, 0);
    size = 1;
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      length[a] = a == 0 ? tokens.length[a] : max(tokens.length[a], least[a]);
      size *= length[a];
      period[a] = size;
    }
  }

  // Coordinates of a column, from the start of the union.
  __device__ __forceinline__ void point(int32_t index, int32_t (&at)[kMaxRank]) const {
    const uint32_t line = static_cast<uint32_t>(index) / static_cast<uint32_t>(length[2]);
    const uint32_t plane = line / static_cast<uint32_t>(length[1]);
    at[2] = index - line * length[2];
    at[1] = line - plane * length[1];
    at[0] = plane;
  }

  __device__ __forceinline__ int32_t token(const int32_t (&at)[kMaxRank]) const {
    const bool exists =
        at[0] < tokens.length[0] && at[1] < tokens.length[1] && at[2] < tokens.length[2];
    return exists ? tokens.first_token + at[0] * tokens.step[0] + at[1] * tokens.step[1] +
                        at[2] * tokens.step[2]
                  : kNoToken;
  }
};

// What threads know about the columns of a box, in shared memory: made by the threads of the
// first kColumns, two boxes ahead, so that copies may read it one box ahead.
constexpr int kTables = 3;  // boxes

template <int kColumns>
struct alignas(8) ColumnTable {  // parts are read in pairs
  static constexpr int kWords = kColumns / kWarpLanes;
  int32_t token[kColumns];  // or kNoToken
  int32_t part[kColumns];   // of the place of a slot in an image (slots.cuh)
  int32_t phase[kWords][kMaxRank];  // of the first of 32 columns, in the period of an axis

  __device__ __forceinline__ void put(const ColumnList& list, int32_t index,
                                      const int32_t (&at)[kMaxRank], int32_t column_part) {
    token[threadIdx.x] = list.token(at);
    part[threadIdx.x] = column_part;
    if (threadIdx.x % kWarpLanes == 0) {
      int32_t (&of)[kMaxRank] = phase[threadIdx.x / kWarpLanes];
      of[0] = index;
      of[1] = at[1] * list.length[2] + at[2];
      of[2] = at[2];
    }
  }
};

// x << by, 0 for shifts of 32 and more, as C++ does not promise.
__device__ __forceinline__ uint32_t shift_left(uint32_t x, int32_t by) {
  return __funnelshift_lc(0, x, by);
}

// The members of [lo, hi) among 0, .. 31.
__device__ __forceinline__ uint32_t interval_bits(int32_t lo, int32_t hi) {
  return shift_left(1, max(0, hi)) - shift_left(1, max(0, lo));
}

// The columns that one row sees, row l % 16 of its warp in lane l. On every axis they are an
// interval that comes again with every period.
struct ListView {
  int32_t begin[kMaxRank], end[kMaxRank];  // in the first period
  uint32_t again[kMaxRank];  // of the first 32 columns of a period, and of short ones after it

  template <int kRows>
  __device__ __forceinline__ void start(const RowTables<kRows>& tables, const TileGrid& grid,
                                        const ColumnList& list, int warp_row) {
    const int row = warp_row + threadIdx.x % 16;
    const bool exists = tables.row_token[row] != kNoToken;
    int32_t at[kMaxRank], coordinates = 0;
    grid.tile.point(row, at);
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const Interval seen = tables.interval[exists ? coordinates + at[a] : 0];
      coordinates += grid.tile.extent[a];
      const bool any = exists && seen.lo < seen.hi;
      const int32_t inner = a == kMaxRank - 1 ? 1 : list.period[a + 1];
      begin[a] = any ? (seen.lo - list.tokens.lo[a]) * inner : 0;
      end[a] = any ? (seen.hi - list.tokens.lo[a]) * inner : 0;
      again[a] = 0;
      if (a == 0) continue;  // has one period
      const uint32_t once = interval_bits(begin[a], end[a]);
#pragma unroll 1
      for (int32_t by = 0; by < kWarpLanes; by += list.period[a]) {
        again[a] |= shift_left(once, by);
      }
    }
  }

  // Those of the box of a table, as bits.
  template <int kColumns>
  __device__ __forceinline__ uint64_t columns(const ColumnList& list,
                                              const ColumnTable<kColumns>& table) const {
    // Each half of the warp takes 32 columns.
    const int lane = threadIdx.x % kWarpLanes;
    const int32_t (&phase)[kMaxRank] = table.phase[lane / 16 % table.kWords];
    uint32_t seen = ~0u;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      seen &= interval_bits(begin[a] - phase[a], end[a] - phase[a]) |
              shift_left(again[a], list.period[a] - phase[a]);
    }
    if constexpr (table.kWords == 1) return seen;
    const uint32_t other = __shfl_xor_sync(kFullWarp, seen, 16);
    return lane < 16 ? uint64_t{other} << 32 | seen : uint64_t{seen} << 32 | other;
  }
};

}  // namespace jax_na::cuda::gemm
