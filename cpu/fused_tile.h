// The inner loops of the fused kernels. Included once per instruction set, after
// JAX_NA_VECTOR_BYTES is defined; see fused.h for tiles, lanes and rows.
//
// All products take one of two forms, with the tile's tokens transposed (one SIMD lane
// each) and the visited tokens as rows whose elements are broadcast:
//   dot_rows         scores[row][lane]  = sum_d lanes[d][lane] * rows[row][d]
//   accumulate_rows  sums[d][lane]     += sum_row weights[row][lane] * rows[row][d]
// So neither the head dimension nor the window needs to fit the SIMD width, the softmax
// needs no sums across lanes, and masks are lane-wise selects. Rows are visited in chunks
// that fit the first-level cache, converted to the accumulation type.
//
// Scores are kept in units of ln 2, so that weights are powers of two.
#pragma once

#include <cmath>
#include <new>

#include "fused.h"
#include "naive.h"
#include "simd.h"

namespace jax_na::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

#if JAX_NA_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Register blocks: kRowBlock x V accumulators in dot_rows, kColumnBlock x V in
// accumulate_rows.
template <int V>
constexpr int kRowBlock = kRegisters == 32 ? (V == 1 ? 12 : 16 / V) : 8 / V;
template <int V>
constexpr int kColumnBlock = kRegisters / 2 / V;

template <typename T>
inline T round_up(T n, T multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
template <typename T>
inline T min_of(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
inline T max_of(T a, T b) {
  return a > b ? a : b;
}

// Uninitialised scratch memory, aligned to cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// The tokens of one sample and head in an array: `dim` elements at offset + token * pitch.
template <typename Void>
struct HeadArrayOf {
  ElementType type;
  Void* data;
  int64_t offset;
  int64_t pitch;
  int32_t dim;
};
using HeadArray = HeadArrayOf<const void>;
using MutableHeadArray = HeadArrayOf<void>;

template <typename Void>
inline HeadArrayOf<Void> head_array(ElementType type, Void* data, int64_t batch, int64_t tokens,
                                    int32_t heads, int32_t head, int32_t dim) {
  const int64_t pitch = int64_t(heads) * dim;
  return {type, data, batch * tokens * pitch + int64_t(head) * dim, pitch, dim};
}

inline int64_t product(const int32_t* grid) { return int64_t(grid[0]) * grid[1] * grid[2]; }

// Calls fn(Element{}) for the element types that are accumulated in T.
template <typename T, typename Fn>
inline void with_stored(ElementType type, const Fn& fn) {
  if constexpr (std::is_same_v<T, double>) {
    fn(F64{});
  } else if (type == ElementType::kF32) {
    fn(F32{});
  } else if (type == ElementType::kBF16) {
    fn(BF16{});
  } else {
    fn(F16{});
  }
}

// The rows a tile visits: a strided box in a grid, in row-major order.
struct Box {
  int64_t first_token;
  int64_t step[kMaxRank];  // tokens from one row to the next on an axis
  int32_t count[kMaxRank];

  int64_t size() const { return product(count); }
};

// Splits rows [begin, end) of a box into runs along the last axis:
// fn(z, y, first x, last x + 1, rows before the run).
template <typename Fn>
inline void for_each_run(const Box& box, int64_t begin, int64_t end, const Fn& fn) {
  int64_t line = begin / box.count[2];
  int32_t x = static_cast<int32_t>(begin - line * box.count[2]);
  int32_t z = static_cast<int32_t>(line / box.count[1]);
  int32_t y = static_cast<int32_t>(line - int64_t(z) * box.count[1]);
  for (int64_t row = begin; row < end;) {
    const int32_t x_end =
        static_cast<int32_t>(min_of<int64_t>(box.count[2], x + (end - row)));
    fn(z, y, x, x_end, row - begin);
    row += x_end - x;
    x = 0;
    if (++y == box.count[1]) {
      y = 0;
      ++z;
    }
  }
}

// The tokens of one tile, their windows, and the rows they see.
template <typename T, int V>
struct Tile {
  static constexpr int kLanes = V * kWidth<T>;

  Box box;
  int64_t token[kLanes];   // -1: no token
  bool in_grid[kLanes];    // inside the frame's grid
  alignas(64) IntLane<T> begin[kMaxRank][kLanes];
  alignas(64) IntLane<T> count[kMaxRank][kLanes];
  alignas(64) IntLane<T> bias[kLanes];
};

// The lanes that see the rows of one run: row x where (unsigned)(x - begin) < count.
template <typename T, int V>
struct RunMask {
  IntVec<T> begin[V];
  UIntVec<T> count[V];

  RunMask(const Tile<T, V>& tile, int32_t z, int32_t y) {
    for (int v = 0; v < V; ++v) {
      const int lane = v * kWidth<T>;
      const auto sees = [&](int axis, int32_t row) {
        return bit_cast<UIntVec<T>>(row - load<IntVec<T>>(&tile.begin[axis][lane])) <
               load<UIntVec<T>>(&tile.count[axis][lane]);
      };
      begin[v] = load<IntVec<T>>(&tile.begin[2][lane]);
      count[v] = load<UIntVec<T>>(&tile.count[2][lane]) &
                 bit_cast<UIntVec<T>>(sees(0, z) & sees(1, y));
    }
  }
  IntVec<T> sees(int v, int32_t x) const {
    return bit_cast<UIntVec<T>>(x - begin[v]) < count[v];
  }
};

// The bias of one head, as the lanes of a tile look it up.
template <typename T>
struct BiasTable {
  const T* table;  // null: none
  int64_t size;
  int64_t pitch[kMaxRank];  // of the table, negative where a row is a query

  IntLane<T> row_offset(int32_t z, int32_t y, int32_t x) const {
    return static_cast<IntLane<T>>(z * pitch[0] + y * pitch[1] + x * pitch[2]);
  }
  // Indices of lanes that do not see the row may lie anywhere; they are clamped.
  IntVec<T> index(const IntLane<T>* lane_bias, IntLane<T> offset) const {
    const IntLane<T> last = static_cast<IntLane<T>>(size - 1);
    IntVec<T> i = load<IntVec<T>>(lane_bias) + offset;
    i = i < 0 ? IntVec<T>{} : i;
    return i > last ? splat_int<T>(last) : i;
  }
  Vec<T> gather(const IntLane<T>* lane_bias, IntLane<T> offset) const {
    const IntVec<T> i = index(lane_bias, offset);
    Vec<T> values;
#pragma GCC unroll 16
    for (int lane = 0; lane < kWidth<T>; ++lane) values[lane] = table[i[lane]];
    return values;
  }
};

template <typename T>
inline BiasTable<T> bias_table(const Problem& p, const void* bias, int64_t bias_size,
                               int64_t batch, int32_t head, int sign) {
  const int64_t lines = sign * (2 * int64_t(p.window[2].kernel_size) - 1);
  const int64_t planes = lines * (2 * int64_t(p.window[1].kernel_size) - 1);
  const T* table = static_cast<const T*>(bias);
  if (table != nullptr) table += batch * p.bias_batch_stride + head * bias_size;
  return {table, bias_size, {planes, lines, sign}};
}

template <typename T, int V>
void set_tile(const Problem& p, const TilePlan& plan, int64_t batch, const int32_t* tile_index,
              const int32_t* lane_grid, const int32_t* row_grid, const BiasTable<T>& bias,
              Tile<T, V>* tile) {
  const AxisTiles* axes = plan.frames + batch * plan.frame_stride;
  const LaneSlot* slots[kMaxRank];
  int64_t row_step = 1;
  tile->box.first_token = 0;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    slots[a] = axes[a].slots + int64_t(tile_index[a]) * plan.extent[a];
    const RowSpan rows = axes[a].rows[tile_index[a]];
    tile->box.first_token += rows.first * row_step;
    tile->box.step[a] = p.window[a].dilation * row_step;
    tile->box.count[a] = rows.count;
    row_step *= row_grid[a];
  }
  for (int lane = 0; lane < Tile<T, V>::kLanes; ++lane) {
    bool exists = lane < plan.lanes, in_grid = exists;
    int64_t token = 0;
    IntLane<T> bias_index = 0;
    for (int a = 0; a < kMaxRank; ++a) {
      const LaneSlot& slot = slots[a][exists ? plan.lane[a][lane] : 0];
      exists = exists && slot.position >= 0;
      in_grid = in_grid && slot.in_grid != 0;
      token = token * lane_grid[a] + slot.position;
      tile->begin[a][lane] = slot.begin;
      tile->count[a][lane] = exists ? slot.count : 0;
      bias_index += static_cast<IntLane<T>>(slot.bias * (bias.pitch[a] < 0 ? -bias.pitch[a]
                                                                           : bias.pitch[a]));
    }
    tile->token[lane] = exists ? token : -1;
    tile->in_grid[lane] = exists && in_grid;
    tile->bias[lane] = bias_index;
  }
}

// Rows [begin, end) of the box, converted, `pitch` apart. Writes up to a vector beyond
// the last row's end.
template <typename T>
void pack_rows(const HeadArray& array, const Box& box, int64_t begin, int64_t end, T* packed,
               int64_t pitch) {
  with_stored<T>(array.type, [&](auto e) {
    using E = decltype(e);
    constexpr int kN = kWidth<T>;
    const auto* data = static_cast<const typename E::Storage*>(array.data) + array.offset;
    for_each_run(box, begin, end, [&](int32_t z, int32_t y, int32_t x, int32_t x_end,
                                      int64_t offset) {
      const int64_t token =
          box.first_token + z * box.step[0] + y * box.step[1] + x * box.step[2];
      const auto* row = data + token * array.pitch;
      T* out = packed + offset * pitch;
      for (; x < x_end; ++x) {
        int32_t d = 0;
        for (; d + kN <= array.dim; d += kN) store(out + d, load_vector<E>(row + d));
        if (d < array.dim) store(out + d, load_part<E>(row + d, array.dim - d));
        row += box.step[2] * array.pitch;
        out += pitch;
      }
    });
  });
}

// lanes[d][lane] = factor * token of the lane, 0 for lanes without one. `lanes` has
// array.dim rows rounded up to a full vector.
template <typename T, int V>
void load_lanes(const HeadArray& array, const int64_t* tokens, const bool* wanted, T factor,
                T* lanes) {
  with_stored<T>(array.type, [&](auto e) {
    using E = decltype(e);
    constexpr int kN = kWidth<T>;
    const auto* data = static_cast<const typename E::Storage*>(array.data) + array.offset;
    for (int v = 0; v < V; ++v) {
      for (int32_t d = 0; d < array.dim; d += kN) {
        Vec<T> rows[kN];
        for (int i = 0; i < kN; ++i) {
          const int lane = v * kN + i;
          const auto* row = data + tokens[lane] * array.pitch + d;
          rows[i] = !wanted[lane]            ? Vec<T>{}
                    : d + kN <= array.dim    ? load_vector<E>(row)
                                             : load_part<E>(row, array.dim - d);
        }
        transpose<T>(rows);
        for (int i = 0; i < kN; ++i) {
          store(lanes + ((d + i) * V + v) * kN, rows[i] * factor);
        }
      }
    }
  });
}

// Tokens of the lanes = factors * sums[d][lane], the inverse of load_lanes.
template <typename T, int V>
void store_lanes(const MutableHeadArray& array, const int64_t* tokens, const Vec<T>* factors,
                 const T* sums) {
  with_stored<T>(array.type, [&](auto e) {
    using E = decltype(e);
    constexpr int kN = kWidth<T>;
    auto* data = static_cast<typename E::Storage*>(array.data) + array.offset;
    for (int v = 0; v < V; ++v) {
      for (int32_t d = 0; d < array.dim; d += kN) {
        Vec<T> rows[kN];
        for (int i = 0; i < kN; ++i) {
          rows[i] = load<Vec<T>>(sums + ((d + i) * V + v) * kN) * factors[v];
        }
        transpose<T>(rows);
        for (int i = 0; i < kN; ++i) {
          const int64_t token = tokens[v * kN + i];
          if (token < 0) continue;
          auto* row = data + token * array.pitch + d;
          if (d + kN <= array.dim) {
            store_vector<E>(row, rows[i]);
          } else {
            store_part<E>(row, rows[i], array.dim - d);
          }
        }
      }
    }
  });
}

// scores[row][lane] = sum_d lanes[d][lane] * rows[row][d] for n rows, n rounded up to a
// block: the surplus rows are computed from whatever lies there.
template <typename T, int V>
void dot_rows(const T* __restrict lanes, const T* __restrict rows, int64_t pitch, int64_t n,
              int32_t dim, T* __restrict scores) {
  constexpr int kBlock = kRowBlock<V>, kN = kWidth<T>;
  for (int64_t row = 0; row < n; row += kBlock) {
    Vec<T> sums[kBlock][V] = {};
    const T* block = rows + row * pitch;
    for (int32_t d = 0; d < dim; ++d) {
      Vec<T> lane[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) lane[v] = load<Vec<T>>(lanes + (d * V + v) * kN);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) {
        const T element = block[i * pitch + d];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[i][v] += lane[v] * element;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(scores + ((row + i) * V + v) * kN, sums[i][v]);
    }
  }
}

template <typename T, int V, int kColumns>
inline void accumulate_columns(const T* __restrict weights, const T* __restrict rows,
                               int64_t pitch, int64_t n, const Vec<T>* keep,
                               T* __restrict sums) {
  constexpr int kN = kWidth<T>;
  Vec<T> sum[kColumns][V];
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = load<Vec<T>>(sums + (i * V + v) * kN) * keep[v];
  }
  for (int64_t row = 0; row < n; ++row) {
    Vec<T> weight[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) weight[v] = load<Vec<T>>(weights + (row * V + v) * kN);
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) {
      const T element = rows[row * pitch + i];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += weight[v] * element;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + (i * V + v) * kN, sum[i][v]);
  }
}

// sums[d][lane] = keep * sums[d][lane] + sum_row weights[row][lane] * rows[row][d], with
// the columns d rounded up to a block.
template <typename T, int V>
void accumulate_rows(const T* weights, const T* rows, int64_t pitch, int64_t n, int32_t dim,
                     const Vec<T>* keep, T* sums) {
  constexpr int kColumns = kColumnBlock<V>;
  for (int32_t d = 0; d < dim; d += kColumns) {
    T* block = sums + d * V * kWidth<T>;
    if (dim - d > kColumns / 2) {
      accumulate_columns<T, V, kColumns>(weights, rows + d, pitch, n, keep, block);
    } else {
      accumulate_columns<T, V, kColumns / 2>(weights, rows + d, pitch, n, keep, block);
    }
  }
}

template <typename T, int V>
bool all_finite(const T* sums, int32_t dim) {
  Vec<T> zeros = {};
  for (int32_t i = 0; i < dim * V; ++i) zeros += load<Vec<T>>(sums + i * kWidth<T>) * T(0);
  for (int lane = 0; lane < kWidth<T>; ++lane) {
    if (!(zeros[lane] == 0)) return false;
  }
  return true;
}

// Sizes of a task's scratch arrays for rows of `dim_a` and `dim_b` elements.
template <typename T, int V>
struct Sizes {
  static constexpr int kLanes = V * kWidth<T>;

  Sizes(int32_t dim_a, int32_t dim_b) : pitch_a(padded(dim_a)), pitch_b(padded(dim_b)) {
    constexpr int64_t kChunkBytes = 24 << 10;
    const int64_t fitting = kChunkBytes / int64_t(max_of(pitch_a, pitch_b) * sizeof(T));
    chunk = round_up<int64_t>(max_of<int64_t>(16, min_of<int64_t>(192, fitting)), kRowBlock<V>);
  }
  static int64_t padded(int32_t dim) {
    return round_up<int64_t>(max_of(dim, 1), max_of(kColumnBlock<V>, kWidth<T>));
  }
  int64_t lanes(int64_t pitch) const { return pitch * kLanes; }
  int64_t rows(int64_t pitch) const { return chunk * pitch + kWidth<T>; }
  int64_t scores() const { return chunk * kLanes; }
  // Chunks of about equal length.
  int64_t chunk_of(int64_t rows) const {
    const int64_t chunks = max_of<int64_t>(1, (rows + chunk - 1) / chunk);
    return round_up<int64_t>(max_of<int64_t>(1, (rows + chunks - 1) / chunks), kRowBlock<V>);
  }

  int64_t pitch_a, pitch_b;  // elements per packed row, and rows of a transposed tile
  int64_t chunk;             // rows at a time
};

template <typename T, int V>
struct Softmax {
  Vec<T> largest[V], total[V];
};

// Calls fn(index of the tile on each axis) for the tiles of one task.
template <typename Fn>
void for_each_tile(const TilePlan& plan, int64_t task, const Fn& fn) {
  int32_t first[kMaxRank], last[kMaxRank], tile[kMaxRank];
  for (int a = kMaxRank - 1; a >= 0; --a) {
    first[a] = static_cast<int32_t>(task % plan.regions[a]) * plan.region[a];
    last[a] = min_of(first[a] + plan.region[a], plan.tiles[a]);
    task /= plan.regions[a];
  }
  for (tile[0] = first[0]; tile[0] < last[0]; ++tile[0]) {
    for (tile[1] = first[1]; tile[1] < last[1]; ++tile[1]) {
      for (tile[2] = first[2]; tile[2] < last[2]; ++tile[2]) fn(tile);
    }
  }
}

// Additional keys as the rows of a box, seen by all lanes with a query in the grid.
template <typename T, int V>
Tile<T, V> additional_tile(const Tile<T, V>& tile, int32_t additional) {
  Tile<T, V> result = tile;
  result.box = {0, {0, 0, 1}, {1, 1, additional}};
  for (int lane = 0; lane < Tile<T, V>::kLanes; ++lane) {
    for (int a = 0; a < kMaxRank; ++a) {
      result.begin[a][lane] = 0;
      result.count[a][lane] = tile.in_grid[lane] ? result.box.count[a] : 0;
    }
  }
  return result;
}

template <typename T, int V>
class ForwardTask {
 public:
  ForwardTask(const ForwardCall& call, const TilePlan& plan, int64_t batch, int32_t head)
      : call_(call),
        p_(call.problem),
        plan_(plan),
        batch_(batch),
        head_(head),
        size_(p_.head_dim, p_.value_dim),
        bias_(bias_table<T>(p_, call.in.bias, plan.bias_size, batch, head, 1)),
        query_(size_.lanes(size_.pitch_a)),
        sums_(size_.lanes(size_.pitch_b)),
        scores_(size_.scores()),
        rows_(size_.rows(max_of(size_.pitch_a, size_.pitch_b))) {}

  void run(int64_t task) {
    for_each_tile(plan_, task, [&](const int32_t* tile) { tile_at(tile); });
  }

 private:
  static constexpr int kN = kWidth<T>, kLanes = V * kN;

  void tile_at(const int32_t* index) {
    const int64_t query_tokens = product(p_.query_grid), key_tokens = product(p_.key_grid);
    const int32_t key_head = head_ / (p_.heads / p_.key_heads);
    set_tile(p_, plan_, batch_, index, p_.query_grid, p_.key_grid, bias_, &tile_);
    load_lanes<T, V>(head_array(p_.element_type, call_.in.query, batch_, query_tokens, p_.heads,
                                head_, p_.head_dim),
                     tile_.token, tile_.in_grid, static_cast<T>(p_.scale * kLog2E),
                     query_.get());
    Softmax<T, V> softmax;
    for (int v = 0; v < V; ++v) {
      softmax.largest[v] = splat<T>(-INFINITY);
      softmax.total[v] = Vec<T>{};
    }
    for (int64_t i = 0; i < size_.lanes(size_.pitch_b); ++i) sums_.get()[i] = 0;

    const auto keys = [&](const void* data, int64_t tokens, int32_t dim) {
      return head_array(p_.element_type, data, batch_, tokens, p_.key_heads, key_head, dim);
    };
    visit(tile_, keys(call_.in.key, key_tokens, p_.head_dim),
          keys(call_.in.value, key_tokens, p_.value_dim), bias_, &softmax);
    if (p_.additional > 0) {
      visit(additional_tile(tile_, p_.additional),
            keys(call_.in.additional_key, p_.additional, p_.head_dim),
            keys(call_.in.additional_value, p_.additional, p_.value_dim), BiasTable<T>{},
            &softmax);
    }
    finish(query_tokens, softmax);
  }

  void visit(const Tile<T, V>& tile, const HeadArray& key, const HeadArray& value,
             const BiasTable<T>& bias, Softmax<T, V>* softmax) {
    const int64_t size = tile.box.size(), chunk = size_.chunk_of(size);
    for (int64_t begin = 0; begin < size; begin += chunk) {
      const int64_t end = min_of(begin + chunk, size);
      pack_rows(key, tile.box, begin, end, rows_.get(), size_.pitch_a);
      dot_rows<T, V>(query_.get(), rows_.get(), size_.pitch_a, end - begin, p_.head_dim,
                     scores_.get());
      Vec<T> keep[V];
      weigh(tile, begin, end, bias, softmax, keep);
      pack_rows(value, tile.box, begin, end, rows_.get(), size_.pitch_b);
      accumulate_rows<T, V>(scores_.get(), rows_.get(), size_.pitch_b, end - begin,
                            p_.value_dim, keep, sums_.get());
    }
  }

  // Masks the scores, turns them into weights relative to the largest score so far, and
  // says by which factor the earlier sums shrink.
  void weigh(const Tile<T, V>& tile, int64_t begin, int64_t end, const BiasTable<T>& bias,
             Softmax<T, V>* softmax, Vec<T>* keep) {
    T* scores = scores_.get();
    Vec<T> largest[V];
    for (int v = 0; v < V; ++v) largest[v] = softmax->largest[v];
    for_each_run(tile.box, begin, end, [&](int32_t z, int32_t y, int32_t x, int32_t x_end,
                                           int64_t offset) {
      const RunMask<T, V> mask(tile, z, y);
      for (T* row = scores + offset * kLanes; x < x_end; ++x, row += kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          Vec<T> s = load<Vec<T>>(row + v * kN);
          if (bias.table != nullptr) {
            s += bias.gather(tile.bias + v * kN, bias.row_offset(z, y, x)) * T(kLog2E);
          }
          s = mask.sees(v, x) ? s : splat<T>(-INFINITY);
          store(row + v * kN, s);
          largest[v] = s > largest[v] ? s : largest[v];
        }
      }
    });
    Vec<T> subtract[V], total[V];
    for (int v = 0; v < V; ++v) {
      // All weights are 0 where nothing is visible yet; avoid inf - inf.
      subtract[v] = largest[v] == -INFINITY ? Vec<T>{} : largest[v];
      keep[v] = exp2<T>(softmax->largest[v] - subtract[v]);
      softmax->largest[v] = largest[v];
      total[v] = softmax->total[v] * keep[v];
    }
    for (T* row = scores; row < scores + (end - begin) * kLanes; row += kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> weight = exp2<T>(load<Vec<T>>(row + v * kN) - subtract[v]);
        store(row + v * kN, weight);
        total[v] += weight;
      }
    }
    for (int v = 0; v < V; ++v) softmax->total[v] = total[v];
  }

  void finish(int64_t query_tokens, const Softmax<T, V>& softmax) {
    if (!all_finite<T, V>(sums_.get(), p_.value_dim)) {
      // 0 * inf may have reached lanes that do not see it.
      for (int64_t token : tile_.token) {
        if (token >= 0) forward_naive_query(call_, batch_, token, head_);
      }
      return;
    }
    Vec<T> factors[V];
    T* lse = static_cast<T*>(call_.lse) + batch_ * query_tokens * p_.heads + head_;
    for (int v = 0; v < V; ++v) {
      factors[v] = softmax.total[v] == 0 ? Vec<T>{} : 1 / softmax.total[v];
      for (int i = 0; i < kN; ++i) {
        const int64_t token = tile_.token[v * kN + i];
        if (token < 0) continue;
        const T total = softmax.total[v][i];
        lse[token * p_.heads] =
            total == 0 ? T(-INFINITY) : softmax.largest[v][i] * T(kLn2) + ln(total);
      }
    }
    store_lanes<T, V>(head_array(p_.element_type, call_.out, batch_, query_tokens, p_.heads,
                                 head_, p_.value_dim),
                      tile_.token, factors, sums_.get());
  }

  static float ln(float x) { return ::logf(x); }
  static double ln(double x) { return ::log(x); }

  const ForwardCall& call_;
  const Problem& p_;
  const TilePlan& plan_;
  const int64_t batch_;
  const int32_t head_;
  const Sizes<T, V> size_;
  const BiasTable<T> bias_;
  Tile<T, V> tile_;
  Scratch<T> query_;   // [head_dim][lane], scaled
  Scratch<T> sums_;    // [value_dim][lane], weights x values
  Scratch<T> scores_;  // [row][lane], then weights
  Scratch<T> rows_;    // keys, then values, of one chunk
};

// The lse to subtract from scores in units of ln 2. Where it is -inf nothing is visible
// and every weight must be 0.
template <typename T>
inline T lse_in_log2(T lse) {
  return lse == T(-INFINITY) ? T(INFINITY) : lse * T(kLog2E);
}

// dquery and dbias: queries as lanes, keys as rows.
template <typename T, int V>
class QueryGradientTask {
 public:
  QueryGradientTask(const BackwardCall& call, const TilePlan& plan, int64_t batch, int32_t head,
                    T* dbias)
      : call_(call),
        p_(call.problem),
        plan_(plan),
        batch_(batch),
        head_(head),
        dbias_(dbias),
        size_(p_.head_dim, p_.value_dim),
        bias_(bias_table<T>(p_, call.in.bias, plan.bias_size, batch, head, 1)),
        query_(size_.lanes(size_.pitch_a)),
        dout_(size_.lanes(size_.pitch_b)),
        sums_(size_.lanes(size_.pitch_a)),
        scores_(size_.scores()),
        dweights_(size_.scores()),
        keys_(size_.rows(size_.pitch_a)),
        values_(size_.rows(size_.pitch_b)) {}

  void run(int64_t task) {
    for_each_tile(plan_, task, [&](const int32_t* tile) { tile_at(tile); });
  }

 private:
  static constexpr int kN = kWidth<T>, kLanes = V * kN;

  void tile_at(const int32_t* index) {
    const int64_t query_tokens = product(p_.query_grid), key_tokens = product(p_.key_grid);
    const int32_t key_head = head_ / (p_.heads / p_.key_heads);
    set_tile(p_, plan_, batch_, index, p_.query_grid, p_.key_grid, bias_, &tile_);
    const auto queries = [&](auto* data, int32_t dim) {
      return head_array(p_.element_type, data, batch_, query_tokens, p_.heads, head_, dim);
    };
    load_lanes<T, V>(queries(call_.in.query, p_.head_dim), tile_.token, tile_.in_grid,
                     static_cast<T>(p_.scale * kLog2E), query_.get());
    load_lanes<T, V>(queries(call_.dout, p_.value_dim), tile_.token, tile_.in_grid, 1,
                     dout_.get());
    const int64_t first = batch_ * query_tokens * p_.heads + head_;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool wanted = tile_.in_grid[lane];
      const int64_t row = first + tile_.token[lane] * p_.heads;
      lse_[lane] = wanted ? lse_in_log2(static_cast<const T*>(call_.lse)[row]) : T(INFINITY);
      delta_[lane] = wanted ? static_cast<const T*>(call_.delta)[row] : 0;
    }
    for (int64_t i = 0; i < size_.lanes(size_.pitch_a); ++i) sums_.get()[i] = 0;

    const auto keys = [&](const void* data, int64_t tokens, int32_t dim) {
      return head_array(p_.element_type, data, batch_, tokens, p_.key_heads, key_head, dim);
    };
    visit(tile_, keys(call_.in.key, key_tokens, p_.head_dim),
          keys(call_.in.value, key_tokens, p_.value_dim), bias_, dbias_);
    if (call_.dquery == nullptr) return;
    if (p_.additional > 0) {
      visit(additional_tile(tile_, p_.additional),
            keys(call_.in.additional_key, p_.additional, p_.head_dim),
            keys(call_.in.additional_value, p_.additional, p_.value_dim), BiasTable<T>{},
            nullptr);
    }
    if (!all_finite<T, V>(sums_.get(), p_.head_dim)) {
      for (int64_t token : tile_.token) {
        if (token >= 0) backward_naive_query(call_, batch_, token, head_);
      }
      return;
    }
    Vec<T> factors[V];
    for (int v = 0; v < V; ++v) factors[v] = splat<T>(static_cast<T>(p_.scale));
    store_lanes<T, V>(queries(call_.dquery, p_.head_dim), tile_.token, factors, sums_.get());
  }

  void visit(const Tile<T, V>& tile, const HeadArray& key, const HeadArray& value,
             const BiasTable<T>& bias, T* dbias) {
    Vec<T> keep[V];
    for (int v = 0; v < V; ++v) keep[v] = splat<T>(1);
    const int64_t size = tile.box.size(), chunk = size_.chunk_of(size);
    for (int64_t begin = 0; begin < size; begin += chunk) {
      const int64_t end = min_of(begin + chunk, size), n = end - begin;
      pack_rows(key, tile.box, begin, end, keys_.get(), size_.pitch_a);
      pack_rows(value, tile.box, begin, end, values_.get(), size_.pitch_b);
      dot_rows<T, V>(query_.get(), keys_.get(), size_.pitch_a, n, p_.head_dim, scores_.get());
      dot_rows<T, V>(dout_.get(), values_.get(), size_.pitch_b, n, p_.value_dim,
                     dweights_.get());
      differentiate(tile, begin, end, bias, dbias);
      if (call_.dquery != nullptr) {
        accumulate_rows<T, V>(scores_.get(), keys_.get(), size_.pitch_a, n, p_.head_dim, keep,
                              sums_.get());
      }
    }
  }

  // scores = P * (dP - delta), 0 where masked.
  void differentiate(const Tile<T, V>& tile, int64_t begin, int64_t end,
                     const BiasTable<T>& bias, T* dbias) {
    for_each_run(tile.box, begin, end, [&](int32_t z, int32_t y, int32_t x, int32_t x_end,
                                           int64_t offset) {
      const RunMask<T, V> mask(tile, z, y);
      for (int64_t i = offset * kLanes; x < x_end; ++x, i += kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const int lane = v * kN;
          Vec<T> s = load<Vec<T>>(scores_.get() + i + lane);
          const IntLane<T> bias_offset = bias_.row_offset(z, y, x);
          if (bias.table != nullptr) {
            s += bias.gather(tile.bias + lane, bias_offset) * T(kLog2E);
          }
          const Vec<T> weight = exp2<T>(s - load<Vec<T>>(lse_ + lane));
          const Vec<T> dweight = load<Vec<T>>(dweights_.get() + i + lane);
          Vec<T> dscore = weight * (dweight - load<Vec<T>>(delta_ + lane));
          dscore = mask.sees(v, x) ? dscore : Vec<T>{};
          store(scores_.get() + i + lane, dscore);
          if (dbias != nullptr) {
            const IntVec<T> entry = bias_.index(tile.bias + lane, bias_offset);
#pragma GCC unroll 16
            for (int l = 0; l < kN; ++l) dbias[entry[l]] += dscore[l];
          }
        }
      }
    });
  }

  const BackwardCall& call_;
  const Problem& p_;
  const TilePlan& plan_;
  const int64_t batch_;
  const int32_t head_;
  T* const dbias_;
  const Sizes<T, V> size_;
  const BiasTable<T> bias_;
  Tile<T, V> tile_;
  alignas(64) T lse_[kLanes];  // in units of ln 2
  alignas(64) T delta_[kLanes];
  Scratch<T> query_, dout_;         // [dim][lane]
  Scratch<T> sums_;                 // [head_dim][lane], dquery
  Scratch<T> scores_, dweights_;    // [row][lane]
  Scratch<T> keys_, values_;        // [row][dim] of one chunk
};

// dkey and dvalue: keys as lanes, queries as rows, summed over the heads of a group.
template <typename T, int V>
class KeyGradientTask {
 public:
  KeyGradientTask(const BackwardCall& call, int64_t batch, int32_t key_head, bool wants_key,
                  bool wants_value)
      : call_(call),
        p_(call.problem),
        batch_(batch),
        key_head_(key_head),
        wants_key_(wants_key),
        wants_value_(wants_value),
        size_(p_.head_dim, p_.value_dim),
        key_(size_.lanes(size_.pitch_a)),
        value_(size_.lanes(size_.pitch_b)),
        dkey_(size_.lanes(size_.pitch_a)),
        dvalue_(size_.lanes(size_.pitch_b)),
        weights_(size_.scores()),
        dweights_(size_.scores()),
        query_(size_.rows(size_.pitch_a)),
        dout_(size_.rows(size_.pitch_b)),
        lse_(size_.chunk),
        delta_(size_.chunk) {}

  // One task of a plan over the keys.
  void run(const TilePlan& plan, int64_t task) {
    const int64_t key_tokens = product(p_.key_grid);
    for_each_tile(plan, task, [&](const int32_t* index) {
      set_tile(p_, plan, batch_, index, p_.key_grid, p_.query_grid,
               bias(plan.bias_size, 0), &tile_);
      const auto keys = [&](auto* data, int32_t dim) {
        return head_array(p_.element_type, data, batch_, key_tokens, p_.key_heads, key_head_,
                          dim);
      };
      start(keys(call_.in.key, p_.head_dim), keys(call_.in.value, p_.value_dim));
      const int32_t group = p_.heads / p_.key_heads;
      for (int32_t h = key_head_ * group; h < (key_head_ + 1) * group; ++h) {
        visit(h, 0, tile_.box.size(), bias(plan.bias_size, h));
      }
      if ((wants_key_ && !all_finite<T, V>(dkey_.get(), p_.head_dim)) ||
          (wants_value_ && !all_finite<T, V>(dvalue_.get(), p_.value_dim))) {
        for (int64_t token : tile_.token) {
          if (token >= 0) backward_naive_key(call_, batch_, token, key_head_);
        }
        return;
      }
      finish(keys(call_.dkey, p_.head_dim), keys(call_.dvalue, p_.value_dim));
    });
  }

  // The additional keys as lanes, and a slab of queries.
  void run_additional(const QuerySlab& slab, T* partial) {
    tile_.box.first_token = 0;
    int64_t step = 1;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      tile_.box.first_token += slab.first[a] * step;
      tile_.box.step[a] = step;
      tile_.box.count[a] = slab.count[a];
      step *= p_.query_grid[a];
    }
    const auto keys = [&](const void* data, int32_t dim) {
      return head_array(p_.element_type, data, batch_, p_.additional, p_.key_heads, key_head_,
                        dim);
    };
    const auto sums = [&](int64_t offset, int32_t dim) {
      constexpr auto kType = std::is_same_v<T, double> ? ElementType::kF64 : ElementType::kF32;
      return MutableHeadArray{kType, partial, offset, int64_t(p_.head_dim) + p_.value_dim, dim};
    };
    for (int32_t first = 0; first < p_.additional; first += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool exists = first + lane < p_.additional;
        tile_.token[lane] = exists ? first + lane : -1;
        tile_.in_grid[lane] = exists;
        for (int a = 0; a < kMaxRank; ++a) {
          tile_.begin[a][lane] = 0;
          tile_.count[a][lane] = exists ? slab.count[a] : 0;
        }
      }
      start(keys(call_.in.additional_key, p_.head_dim),
            keys(call_.in.additional_value, p_.value_dim));
      const int32_t group = p_.heads / p_.key_heads;
      for (int32_t h = key_head_ * group; h < (key_head_ + 1) * group; ++h) {
        visit(h, slab.begin, slab.end, BiasTable<T>{});
      }
      finish(sums(0, p_.head_dim), sums(p_.head_dim, p_.value_dim));
    }
  }

 private:
  static constexpr int kN = kWidth<T>, kLanes = V * kN;

  BiasTable<T> bias(int64_t bias_size, int32_t head) const {
    return bias_table<T>(p_, call_.in.bias, bias_size, batch_, head, -1);
  }

  void start(const HeadArray& key, const HeadArray& value) {
    load_lanes<T, V>(key, tile_.token, tile_.in_grid, static_cast<T>(p_.scale * kLog2E),
                     key_.get());
    if (wants_key_) load_lanes<T, V>(value, tile_.token, tile_.in_grid, 1, value_.get());
    for (int64_t i = 0; i < size_.lanes(size_.pitch_a); ++i) dkey_.get()[i] = 0;
    for (int64_t i = 0; i < size_.lanes(size_.pitch_b); ++i) dvalue_.get()[i] = 0;
  }

  void finish(const MutableHeadArray& dkey, const MutableHeadArray& dvalue) {
    Vec<T> factors[V];
    if (wants_key_) {
      for (int v = 0; v < V; ++v) factors[v] = splat<T>(static_cast<T>(p_.scale));
      store_lanes<T, V>(dkey, tile_.token, factors, dkey_.get());
    }
    if (wants_value_) {
      for (int v = 0; v < V; ++v) factors[v] = splat<T>(1);
      store_lanes<T, V>(dvalue, tile_.token, factors, dvalue_.get());
    }
  }

  void visit(int32_t head, int64_t first, int64_t last, const BiasTable<T>& bias) {
    const int64_t query_tokens = product(p_.query_grid);
    const auto queries = [&](const void* data, int32_t dim) {
      return head_array(p_.element_type, data, batch_, query_tokens, p_.heads, head, dim);
    };
    const HeadArray query = queries(call_.in.query, p_.head_dim);
    const HeadArray dout = queries(call_.dout, p_.value_dim);
    Vec<T> keep[V];
    for (int v = 0; v < V; ++v) keep[v] = splat<T>(1);
    const int64_t chunk = size_.chunk_of(last - first);
    for (int64_t begin = first; begin < last; begin += chunk) {
      const int64_t end = min_of(begin + chunk, last), n = end - begin;
      pack_rows(query, tile_.box, begin, end, query_.get(), size_.pitch_a);
      pack_rows(dout, tile_.box, begin, end, dout_.get(), size_.pitch_b);
      load_statistics(head, query_tokens, begin, end);
      dot_rows<T, V>(key_.get(), query_.get(), size_.pitch_a, n, p_.head_dim, weights_.get());
      if (wants_key_) {
        dot_rows<T, V>(value_.get(), dout_.get(), size_.pitch_b, n, p_.value_dim,
                       dweights_.get());
      }
      differentiate(begin, end, bias);
      if (wants_key_) {
        accumulate_rows<T, V>(dweights_.get(), query_.get(), size_.pitch_a, n, p_.head_dim,
                              keep, dkey_.get());
      }
      if (wants_value_) {
        accumulate_rows<T, V>(weights_.get(), dout_.get(), size_.pitch_b, n, p_.value_dim, keep,
                              dvalue_.get());
      }
    }
  }

  void load_statistics(int32_t head, int64_t query_tokens, int64_t begin, int64_t end) {
    const int64_t offset = batch_ * query_tokens * p_.heads + head;
    const T* lse = static_cast<const T*>(call_.lse) + offset;
    const T* delta = static_cast<const T*>(call_.delta) + offset;
    const Box& box = tile_.box;
    for_each_run(box, begin, end, [&](int32_t z, int32_t y, int32_t x, int32_t x_end,
                                      int64_t i) {
      const int64_t line = box.first_token + z * box.step[0] + y * box.step[1];
      for (; x < x_end; ++x, ++i) {
        const int64_t row = (line + x * box.step[2]) * p_.heads;
        lse_.get()[i] = lse_in_log2(lse[row]);
        delta_.get()[i] = delta[row];
      }
    });
  }

  // weights = P and dweights = P * (dP - delta), 0 where masked.
  void differentiate(int64_t begin, int64_t end, const BiasTable<T>& bias) {
    for_each_run(tile_.box, begin, end, [&](int32_t z, int32_t y, int32_t x, int32_t x_end,
                                            int64_t row) {
      const RunMask<T, V> mask(tile_, z, y);
      for (; x < x_end; ++x, ++row) {
        const T lse = lse_.get()[row], delta = delta_.get()[row];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const int64_t i = row * kLanes + v * kN;
          Vec<T> s = load<Vec<T>>(weights_.get() + i);
          if (bias.table != nullptr) {
            s += bias.gather(tile_.bias + v * kN, bias.row_offset(z, y, x)) * T(kLog2E);
          }
          const IntVec<T> sees = mask.sees(v, x);
          const Vec<T> weight = exp2<T>(s - lse);
          store(weights_.get() + i, sees ? weight : Vec<T>{});
          if (wants_key_) {
            const Vec<T> dscore = weight * (load<Vec<T>>(dweights_.get() + i) - delta);
            store(dweights_.get() + i, sees ? dscore : Vec<T>{});
          }
        }
      }
    });
  }

  const BackwardCall& call_;
  const Problem& p_;
  const int64_t batch_;
  const int32_t key_head_;
  const bool wants_key_, wants_value_;
  const Sizes<T, V> size_;
  Tile<T, V> tile_;
  Scratch<T> key_, value_;           // [dim][lane]
  Scratch<T> dkey_, dvalue_;         // [dim][lane]
  Scratch<T> weights_, dweights_;    // [row][lane]
  Scratch<T> query_, dout_;          // [row][dim] of one chunk
  Scratch<T> lse_, delta_;           // [row]
};

#if JAX_NA_VECTOR_BYTES == 16
constexpr int kSmallVectors = 2, kLargeVectors = 4;
#else
constexpr int kSmallVectors = 1, kLargeVectors = 2;
#endif

// Calls fn(T{}, V) for the accumulation type and the tile's number of vectors.
template <typename Fn>
void with_tile_type(const Problem& p, int32_t vectors, const Fn& fn) {
  using Small = std::integral_constant<int, kSmallVectors>;
  using Large = std::integral_constant<int, kLargeVectors>;
  const bool large = vectors == kLargeVectors;
  if (p.element_type == ElementType::kF64) {
    large ? fn(double{}, Large{}) : fn(double{}, Small{});
  } else {
    large ? fn(float{}, Large{}) : fn(float{}, Small{});
  }
}

void forward_task(const ForwardCall& call, const TilePlan& plan, int64_t batch, int32_t head,
                  int64_t task) {
  with_tile_type(call.problem, plan.vectors, [&](auto t, auto v) {
    ForwardTask<decltype(t), decltype(v)::value>(call, plan, batch, head).run(task);
  });
}

void backward_queries_task(const BackwardCall& call, const TilePlan& plan, int64_t batch,
                           int32_t head, int64_t task, void* dbias) {
  with_tile_type(call.problem, plan.vectors, [&](auto t, auto v) {
    using T = decltype(t);
    QueryGradientTask<T, decltype(v)::value>(call, plan, batch, head, static_cast<T*>(dbias))
        .run(task);
  });
}

void backward_keys_task(const BackwardCall& call, const TilePlan& plan, int64_t batch,
                        int32_t key_head, int64_t task) {
  with_tile_type(call.problem, plan.vectors, [&](auto t, auto v) {
    KeyGradientTask<decltype(t), decltype(v)::value>(call, batch, key_head,
                                                     call.dkey != nullptr,
                                                     call.dvalue != nullptr)
        .run(plan, task);
  });
}

void backward_additional_task(const BackwardCall& call, int64_t batch, int32_t key_head,
                              const QuerySlab& slab, void* partial) {
  with_tile_type(call.problem, kSmallVectors, [&](auto t, auto v) {
    using T = decltype(t);
    KeyGradientTask<T, decltype(v)::value>(call, batch, key_head, true, true)
        .run_additional(slab, static_cast<T*>(partial));
  });
}

constexpr FusedKernels fused_kernels(const char* name) {
  return {name,
          JAX_NA_VECTOR_BYTES,
          kSmallVectors,
          kLargeVectors,
          forward_task,
          backward_queries_task,
          backward_keys_task,
          backward_additional_task};
}

}  // namespace
}  // namespace jax_na::cpu
