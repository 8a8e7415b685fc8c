// Which tokens a CTA owns and which it visits.
//
// A CTA owns a tile of *row* tokens, one per row of its score matrix, and walks over boxes
// of *column* tokens of the other grid: queries own and keys are visited where gradients or
// outputs of queries are made, and the other way round for those of keys. Tiles and boxes
// hold tokens of one residue class modulo the dilation, so that all row tokens of a tile see
// columns of one class, and positions along an axis are counted in class steps.
//
// Row tokens see an interval of columns per axis. The boxes of a tile start exactly where the
// union of these intervals starts. *Relative* class indices, in which the intervals, the boxes
// and the rows of the relative positional bias are expressed, differ from the absolute ones by
// a constant per tile and axis (see Side), so no kernel divides by the dilation.
#pragma once

#include <cstdint>

#include "../../ffi/problem.h"
#include "../ptx.cuh"
#include "fused.h"

namespace jax_na::cuda::fused {

constexpr int kWarpLanes = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxColumns = 64;  // of a score tile: one bit each in a 64-bit set

// Division of non-negative int32 by a constant that the host knows.
struct Divisor {
  int32_t value;
  uint32_t multiplier, shift;

  Divisor() = default;
  explicit Divisor(int32_t divisor) : value(divisor), multiplier(0), shift(0) {
    if (divisor == 1) return;
    while ((int64_t{1} << shift) < divisor) ++shift;
    // ceil(2^(31 + shift) / divisor) fits 32 bits and is exact for numerators below 2^31.
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
    --shift;
  }

  __device__ __forceinline__ int32_t quotient(int32_t x) const {
    return value == 1 ? x : static_cast<int32_t>(__umulhi(x, multiplier) >> shift);
  }
  // Returns the quotient and leaves the remainder in x.
  __device__ __forceinline__ int32_t split(int32_t* x) const {
    const int32_t q = quotient(*x);
    *x -= q * value;
    return q;
  }
};

// Row-major order of the points of a box.
struct BoxOrder {
  int32_t extent[kMaxRank];
  Divisor divide_1, divide_2;  // by the extents of the last two axes
  int32_t size;

  BoxOrder() = default;
  explicit BoxOrder(const int32_t (&box)[kMaxRank])
      : extent{box[0], box[1], box[2]},
        divide_1(max_i32(box[1], 1)),
        divide_2(max_i32(box[2], 1)),
        size(box[0] * box[1] * box[2]) {}

  __device__ __forceinline__ void point(int32_t index, int32_t (&at)[kMaxRank]) const {
    at[2] = index;
    at[1] = divide_2.split(&at[2]);
    at[0] = divide_1.split(&at[1]);
  }
};

// Columns of an axis that so many neighbouring rows see together, at most.
inline int64_t most_columns(const AxisWindow& window, int32_t rows) {
  return int64_t{rows} + window.kernel_size + window.stride - 2;
}

// How one grid is cut in tiles: every residue class of every axis by itself. Neighbours in the
// order of tiles are neighbours on the last of `axes`.
struct TileGrid {
  BoxOrder tile;                   // of tokens
  BoxOrder order;                  // of tiles: classes, and in a class from its start
  int32_t axes[kMaxRank];          // of the grid, as `order` has them
  Divisor divide_size;             // by the number of tiles
  Divisor per_class[kMaxRank];     // tiles of one class of an axis

  TileGrid() = default;
  TileGrid(const int32_t (&grid)[kMaxRank], const AxisWindow (&window)[kMaxRank],
           const int32_t (&extent)[kMaxRank], const int32_t (&axes)[kMaxRank] = {0, 1, 2})
      : tile(extent), axes{axes[0], axes[1], axes[2]} {
    int32_t count[kMaxRank];
    for (int i = 0; i < kMaxRank; ++i) {
      const int a = axes[i];
      const int32_t d = window[a].dilation;
      const int32_t longest = (grid[a] + d - 1) / d;  // class
      const int32_t tiles = (longest + extent[a] - 1) / extent[a];
      per_class[a] = Divisor(max_i32(tiles, 1));
      count[i] = tiles * min_i32(d, grid[a]);
    }
    order = BoxOrder(count);
    divide_size = Divisor(max_i32(order.size, 1));
  }

  // The local index of the first token of tile `index` on every axis.
  __device__ __forceinline__ void first_token(int32_t index, const AxisWindow* window,
                                              int32_t (&first)[kMaxRank]) const {
    int32_t at[kMaxRank];
    order.point(index, at);
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      first[a] = axes[0] == a ? at[0] : axes[1] == a ? at[1] : at[2];
      const int32_t residue = per_class[a].split(&first[a]);
      first[a] = residue + window[a].dilation * tile.extent[a] * first[a];
    }
  }
};

// The columns of one box as bits, and the sets of them that an interval on an axis selects.
struct ColumnBox {
  BoxOrder order;
  int32_t inner[kMaxRank];    // columns between neighbours on an axis
  uint64_t repeat[kMaxRank];  // the columns where an axis and all after it are at their start

  ColumnBox() = default;
  explicit ColumnBox(const int32_t (&box)[kMaxRank])
      : order(box), inner{box[1] * box[2], box[2], 1}, repeat{1, 0, 0} {
    for (int z = 0; z < box[0]; ++z) repeat[1] |= uint64_t{1} << (z * inner[0]);
    for (int y = 0; y < box[0] * box[1]; ++y) repeat[2] |= uint64_t{1} << (y * inner[1]);
  }

  // The columns whose coordinate on `axis` lies in [lo, hi). The runs of one row of the box
  // do not overlap, so that a product with `repeat` is their union.
  __device__ __forceinline__ uint64_t columns(int axis, int32_t lo, int32_t hi) const {
    lo = max(0, min(lo, order.extent[axis]));
    hi = max(lo, min(hi, order.extent[axis]));
    return (ptx::shift_left(1, hi * inner[axis]) - ptx::shift_left(1, lo * inner[axis])) *
           repeat[axis];
  }
};

// The first `count` columns.
__device__ __forceinline__ uint64_t leading_columns(int32_t count) {
  return ptx::shift_left(1, max(0, count)) - 1;
}

// One coordinate of a tile: the interval of columns that its tokens see, in relative class
// indices; nothing where lo > hi.
constexpr int32_t kNoLo = 1 << 29, kNoHi = -(1 << 29);

struct Interval {
  int32_t lo, hi;

  // Of a token that belongs to the grid and sees nothing, and where there is no such token.
  static __device__ __forceinline__ Interval nothing(bool in_grid) {
    return {kNoLo, in_grid ? kNoHi : kNoHi - 1};
  }
  __device__ __forceinline__ bool in_grid() const { return hi >= kNoHi; }
};

// Which tokens own rows. Relative index 0 of a column is absolute class index p - (k - 1) for
// the keys and j + (k - 1) for the queries, where p or j is that of the tile's first row. The
// bias row is then (column - row) for keys and (row - column) for queries.
//
// Additional keys are a key grid of their own: [1, 1, additional], seen by every query of the
// grid, without dilation (the problem that the kernel gets says so).
enum class Side { kQueries, kKeys, kAdditional };

template <Side kRowsAre>
struct Sides {
  static constexpr int kSign = kRowsAre == Side::kQueries ? 1 : -1;

  static __device__ __forceinline__ const int32_t* row_grid(const Problem& p) {
    return kRowsAre == Side::kQueries ? p.query_grid : p.key_grid;
  }
  static __device__ __forceinline__ const int32_t* column_grid(const Problem& p) {
    return kRowsAre == Side::kQueries ? p.key_grid : p.query_grid;
  }

  static __device__ __forceinline__ bool in_grid(const AxisFrame& frame, int32_t token) {
    if constexpr (kRowsAre == Side::kAdditional) return true;
    const int32_t i =
        token + (kRowsAre == Side::kQueries ? frame.query_origin : frame.key_origin);
    return i >= 0 && i < frame.length;
  }

  // The interval of coordinate `i` of a tile whose first token has local index `first`.
  static __device__ __forceinline__ Interval interval(const Problem& p, const AxisFrame& frame,
                                                      int axis, int32_t first, int32_t i) {
    const AxisWindow& w = p.window[axis];
    const int32_t token = first + w.dilation * i;
    if (token >= row_grid(p)[axis]) return Interval::nothing(false);
    if constexpr (kRowsAre == Side::kAdditional) {
      const int32_t lo = max(0, -frame.query_origin);
      const int32_t hi = min(p.query_grid[axis], frame.length - frame.query_origin);
      return lo < hi ? Interval{lo, hi} : Interval::nothing(true);
    } else {
      const AxisRange range = kRowsAre == Side::kQueries ? keys_of_query(w, frame, token)
                                                         : queries_of_key(w, frame, token);
      if (range.count == 0) return Interval::nothing(in_grid(frame, token));
      const int32_t lo = i + kSign * range.bias_row;
      return {lo, lo + range.count};
    }
  }

  // The local index of the column with relative class index 0.
  static __device__ __forceinline__ int32_t origin(const Problem& p, const AxisFrame& frame,
                                                   int axis, int32_t first) {
    if constexpr (kRowsAre == Side::kAdditional) return 0;
    const AxisWindow& w = p.window[axis];
    const int32_t shift = frame.query_origin - frame.key_origin;
    return first + kSign * (shift - w.dilation * (w.kernel_size - 1));
  }
};

// A column as the copies see it: its token less that of the box's first column, and its
// coordinates in fields of 9 bits, of which the highest stays free.
struct alignas(8) ColumnEntry {
  int32_t token;
  uint32_t coordinates;
};
constexpr uint32_t kFieldGuards = 1u << 8 | 1u << 17 | 1u << 26;
constexpr uint32_t kNoColumn = 1u << 8;  // in the lowest field: larger than every limit

__device__ __forceinline__ uint32_t pack_fields(int32_t z, int32_t y, int32_t x) {
  return static_cast<uint32_t>(z) << 18 | static_cast<uint32_t>(y) << 9 |
         static_cast<uint32_t>(x);
}

// Those of a box: from a table, or columns that are a list.
struct ColumnEntries {
  const ColumnEntry* table;  // none for a list

  __device__ __forceinline__ bool in_list() const { return table == nullptr; }
  __device__ __forceinline__ ColumnEntry operator[](int32_t column) const {
    return in_list() ? ColumnEntry{column, pack_fields(0, 0, column)} : table[column];
  }
};

// Whether every coordinate is at most its limit: a field that is larger borrows its guard bit.
__device__ __forceinline__ bool within(uint32_t coordinates, uint32_t guarded_limits) {
  return ((guarded_limits - coordinates) & kFieldGuards) == kFieldGuards;
}

// The token of a row: `t` where it is in the grid, `~t` where it is outside (what it holds is
// not read, what it is given is zeros), kNoToken where a row has none.
constexpr int32_t kNoToken = INT32_MIN;

// What all threads of a CTA know about the rows of its tile, in shared memory.
template <int kRows>
struct RowTables {
  Interval interval[kRows + 2];  // of the coordinates of axis 0, then 1, then 2
  int32_t origin[kMaxRank];
  int32_t row_token[kRows];      // or ~token, or kNoToken
};

// The same, and the columns of a box.
template <int kRows, int kColumns>
struct TileTables : RowTables<kRows> {
  ColumnEntry column[kColumns];
};

// jax_na/_shared_memory.py counts with these sizes.
static_assert(sizeof(RowTables<64>) == 796 && sizeof(TileTables<64, 32>) == 1056);

// Fills the tables; the caller synchronises. `first` is the tile's first token.
template <Side kRowsAre, int kRows, int kThreads>
__device__ __forceinline__ void fill_row_tables(RowTables<kRows>* tables, const Problem& p,
                                                const TileGrid& grid, int64_t batch,
                                                const int32_t (&first)[kMaxRank]) {
  using S = Sides<kRowsAre>;
  const int thread = threadIdx.x;
  const int32_t(&extent)[kMaxRank] = grid.tile.extent;
  for (int e = thread; e < extent[0] + extent[1] + extent[2]; e += kThreads) {
    const int axis = e < extent[0] ? 0 : e < extent[0] + extent[1] ? 1 : 2;
    const int i = axis == 0 ? e : axis == 1 ? e - extent[0] : e - extent[0] - extent[1];
    const int32_t start = axis == 0 ? first[0] : axis == 1 ? first[1] : first[2];
    const AxisFrame frame = p.axis_frame(batch, axis);
    tables->interval[e] = S::interval(p, frame, axis, start, i);
    if (i == 0) tables->origin[axis] = S::origin(p, frame, axis, start);
  }
  for (int row = thread; row < kRows; row += kThreads) {
    int32_t at[kMaxRank], token = 0;
    grid.tile.point(row, at);
    bool exists = row < grid.tile.size, inside = true;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      at[a] = first[a] + p.window[a].dilation * at[a];
      exists = exists && at[a] < S::row_grid(p)[a];
      inside = inside && S::in_grid(p.axis_frame(batch, a), at[a]);
      token = token * S::row_grid(p)[a] + at[a];
    }
    tables->row_token[row] = !exists ? kNoToken : inside ? token : ~token;
  }
}

template <Side kRowsAre, int kRows, int kThreads, int kColumns>
__device__ __forceinline__ void fill_tables(TileTables<kRows, kColumns>* tables,
                                            const Problem& p, const TileGrid& grid,
                                            const ColumnBox& box, int64_t batch,
                                            const int32_t (&first)[kMaxRank]) {
  using S = Sides<kRowsAre>;
  fill_row_tables<kRowsAre, kRows, kThreads>(tables, p, grid, batch, first);
  for (int column = kThreads - 1 - threadIdx.x; column < kColumns; column += kThreads) {
    int32_t at[kMaxRank], token = 0;
    box.order.point(column, at);
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      token = token * S::column_grid(p)[a] + p.window[a].dilation * at[a];
    }
    const bool exists = column < box.order.size;
    tables->column[column] = {token, exists ? pack_fields(at[0], at[1], at[2]) : kNoColumn};
  }
}

// The walk over the boxes of a tile, last axis fastest, then over the list of additional
// columns in pieces of kMaxColumns or fewer.
struct Walk {
  // Of the union of the intervals: its first relative class index, its length, the local
  // token there and the tokens between neighbours. Nothing to visit: length[0] == 0.
  int32_t lo[kMaxRank], length[kMaxRank];
  int32_t first_token, step[kMaxRank];
  int32_t additional, list_step;

  int32_t at[kMaxRank];  // of the box at hand, from the start of the union
  bool in_list;
  int32_t list_at;

  template <Side kRowsAre, int kRows>
  __device__ __forceinline__ void start(const RowTables<kRows>& tables, const Problem& p,
                                        const TileGrid& grid, int32_t additional_columns,
                                        int32_t columns_at_once) {
    using S = Sides<kRowsAre>;
    const int lane = threadIdx.x % kWarpLanes;
    int32_t begin = 0, any = 1;
    bool in_grid = true;
    first_token = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      int32_t low = kNoLo, high = kNoHi, inside = 0;
#pragma unroll 1
      for (int i = lane; i < grid.tile.extent[a]; i += kWarpLanes) {
        const Interval& interval = tables.interval[begin + i];
        low = min(low, interval.lo);
        high = max(high, interval.hi);
        inside |= interval.in_grid();
      }
      begin += grid.tile.extent[a];
      lo[a] = ptx::warp_min(low);
      length[a] = max(0, ptx::warp_max(high) - lo[a]);
      any = min(any, length[a]);
      in_grid = in_grid && __any_sync(kFullWarp, inside);
      const int32_t d = p.window[a].dilation;
      first_token = first_token * S::column_grid(p)[a] + tables.origin[a] + d * lo[a];
      at[a] = 0;
    }
    if (any == 0) length[0] = 0;
    step[2] = p.window[2].dilation;
    step[1] = p.window[1].dilation * S::column_grid(p)[2];
    step[0] = p.window[0].dilation * S::column_grid(p)[1] * S::column_grid(p)[2];
    additional = in_grid ? additional_columns : 0;
    in_list = length[0] == 0;
    list_at = 0;
    list_step = columns_at_once;
  }

  __device__ __forceinline__ bool more() const { return !in_list || list_at < additional; }

  __device__ __forceinline__ void advance(const int32_t (&extent)[kMaxRank]) {
    if (in_list) {
      list_at += list_step;
      return;
    }
    at[2] += extent[2];
    if (at[2] < length[2]) return;
    at[2] = 0;
    at[1] += extent[1];
    if (at[1] < length[1]) return;
    at[1] = 0;
    at[0] += extent[0];
    in_list = at[0] >= length[0];
  }

  // Token of the first column at hand, and the limits of what exists from there on.
  __device__ __forceinline__ int32_t token() const {
    return in_list ? list_at
                   : first_token + at[0] * step[0] + at[1] * step[1] + at[2] * step[2];
  }
  __device__ __forceinline__ uint32_t guarded_limits() const {
    constexpr int32_t kLargest = 255;
    const uint32_t limits =
        in_list ? pack_fields(kLargest, kLargest, min(kLargest, additional - 1 - list_at))
                : pack_fields(min(kLargest, length[0] - 1 - at[0]),
                              min(kLargest, length[1] - 1 - at[1]),
                              min(kLargest, length[2] - 1 - at[2]));
    return limits | kFieldGuards;
  }
};

// The columns that one row sees of the box at hand. The set of an axis changes only when the
// walk has moved along it.
struct RowView {
  int32_t interval[kMaxRank];  // of the row's coordinates, in the tables
  bool sees_grid, sees_list;
  uint64_t set[kMaxRank];
  int32_t at[kMaxRank];  // where the walk was then

  template <int kRows>
  __device__ __forceinline__ void start(const RowTables<kRows>& tables, const TileGrid& grid,
                                        int row) {
    int32_t point[kMaxRank];
    grid.tile.point(row, point);
    sees_grid = tables.row_token[row] != kNoToken;
    sees_list = sees_grid;
    int32_t begin = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      interval[a] = sees_grid ? begin + point[a] : 0;
      begin += grid.tile.extent[a];
      sees_list = sees_list && tables.interval[interval[a]].in_grid();
      set[a] = 0;
      at[a] = -1;
    }
  }

  template <int kRows>
  __device__ __forceinline__ uint64_t columns(const RowTables<kRows>& tables, const Walk& walk,
                                              const ColumnBox& box) {
    if (walk.in_list) return sees_list ? leading_columns(walk.additional - walk.list_at) : 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (walk.at[a] == at[a]) continue;
      at[a] = walk.at[a];
      const int32_t start = walk.lo[a] + walk.at[a];
      const Interval& seen = tables.interval[interval[a]];
      set[a] = sees_grid ? box.columns(a, seen.lo - start, seen.hi - start) : 0;
    }
    return set[0] & set[1] & set[2];
  }
};

}  // namespace jax_na::cuda::fused
