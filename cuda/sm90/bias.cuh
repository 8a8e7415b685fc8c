// The relative positional bias: the index in a head's table is linear in the coordinates of row
// and column, so that it is a sum of a part of the row, one of the column and one of the box.
//
// Where masks are products, scores *begin* with the bias, in units in which products come, and
// the products are added. Otherwise it is added to scores and what is not seen is replaced.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "softmax.cuh"

namespace jax_na::cuda::sm90 {

// Where the entries of tables lie in shared memory, and how many there may be.
//
// Scores that begin with the bias read it in pairs of columns, which are neighbours in a row of
// the table: rows have an even pitch, and there is a second copy of all, shifted by one, for
// pairs that begin at odd entries. What a row does not see is read, too; it is masked
// afterwards, but has to be a number, so the tables lie among zeros.
struct BiasLayout {
  Divisor row;             // entries of a table's last axis
  int32_t step[kMaxRank];  // entries between neighbours on an axis
  int32_t size;            // entries of one table
  int32_t first;           // entry of the first table
  int32_t padding;         // entries after a row

  BiasLayout() = default;
  // `begins`: whether scores begin with the bias. `tables` are those of a tile.
  BiasLayout(const Problem& p, const Cut& cut, bool rows_are_keys, bool begins)
      : row(p.bias_extent(2)), first(0), padding(begins ? 1 : 0) {
    step[2] = 1;
    step[1] = p.bias_extent(2) + padding;
    step[0] = p.bias_extent(1) * step[1];
    size = p.bias_extent(0) * step[0];
    if (!begins) return;
    for (int a = 0; a < kMaxRank; ++a) {
      first += step[a] * (cut.ctas.tile.extent[a] - 1);
      if (rows_are_keys) first += step[a] * (cut.columns.extent[a] - 1);
    }
    first += first % 2;
  }

  // The entries up to the last one that is read where scores begin with the bias.
  int64_t extent(const Cut& cut, int32_t tables) const {
    int64_t entries = int64_t{first} + int64_t{tables} * size;
    for (int a = 0; a < kMaxRank; ++a) {
      entries += step[a] * (cut.ctas.tile.extent[a] + cut.columns.extent[a] - 2);
    }
    return entries;
  }

  __device__ __forceinline__ int32_t index(const int32_t (&at)[kMaxRank]) const {
    return at[0] * step[0] + at[1] * step[1] + at[2];
  }
};

// Whether scores of a box can begin with the bias.
inline bool can_begin_with_bias(const Problem& p, const Cut& cut, bool rows_are_keys,
                                int32_t tables, int32_t entries) {
  const BiasLayout layout(p, cut, rows_are_keys, true);
  return cut.columns.extent[kMaxRank - 1] % 2 == 0 && layout.extent(cut, tables) <= entries;
}

// The tables of a tile in shared memory. kEntries is a multiple of 2.
template <int kEntries, bool kBegins>
struct BiasTables {
  alignas(8) float entry[kBegins ? 2 : 1][kEntries];
  const float* from;  // where they come from

  // No tables, and zeros around those that come; by all `threads` of a CTA.
  __device__ __forceinline__ void clear(int threads) {
    if (threadIdx.x == 0) from = nullptr;
    if constexpr (kBegins) {
      for (int i = threadIdx.x; i < kEntries; i += threads) entry[0][i] = entry[1][i] = 0;
    }
  }

  // Brings `count` entries of neighbouring tables, times `factor`; one warp.
  __device__ __forceinline__ void bring(const float* tables, int32_t count, float factor,
                                        const BiasLayout& layout) {
    __syncwarp();
    from = tables;
#pragma unroll 4
    for (int i = threadIdx.x % kWarpLanes; i < count; i += kWarpLanes) {
      if constexpr (kBegins) {
        const int to = layout.first + i + layout.row.quotient(i);
        const float x = tables[i] * factor;
        entry[0][to] = x;
        if (to > 0) entry[1][to - 1] = x;
      } else {
        entry[0][i] = tables[i];
      }
    }
  }
};

// The part of every column of a box, in bytes; kSign is that of the rows' side (fused::Sides).
// What is no column reads as the first one does.
template <int kSign, int kColumns>
struct BiasColumns {
  int32_t offset[kColumns];

  __device__ __forceinline__ void fill(const BiasLayout& layout, const BoxOrder& box,
                                       int threads) {
    for (int column = threadIdx.x; column < kColumns; column += threads) {
      int32_t at[kMaxRank];
      box.point(column < box.size ? column : 0, at);
      offset[column] = kSign * layout.index(at) * int{sizeof(float)};
    }
  }
};

// Of the tables of a tile that of one head, for the box at hand.
template <int kSign>
struct BiasView {
  int32_t row[2];  // entry of a row of the lane and column 0

  // `table` is the number of the head's table; `lo` is where the union begins, in relative
  // class indices.
  __device__ __forceinline__ BiasView(const BiasLayout& layout, int32_t table,
                                      const RowView& view, const int32_t (&lo)[kMaxRank],
                                      const BoxWalk& walk) {
    const int32_t box = layout.index(lo) + layout.index(walk.at);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = layout.first + table * layout.size +
               kSign * (box - layout.index(view.point[h]));
    }
  }

  // scores = bias, of all columns whether seen or not.
  template <int kEntries, int kColumns>
  __device__ __forceinline__ void begin(float (&scores)[kColumns / 2],
                                        const BiasTables<kEntries, true>& tables,
                                        const BiasColumns<kSign, kColumns>& columns) const {
    const int lane = threadIdx.x % kWarpLanes;
    uint32_t address[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Of a pair the entry that comes first, which for keys is that of the second column.
      const int32_t entry = row[h] - (kSign < 0 ? 1 : 0);
      const int32_t odd = entry % 2;
      address[h] = ptx::shared_address(tables.entry[odd]) +
                   (entry - odd) * static_cast<int32_t>(sizeof(float));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const int32_t column = columns.offset[8 * n + lane % 4 * 2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 pair = ptx::load_shared_64(address[h] + column);
        scores[4 * n + 2 * h] = kSign < 0 ? pair.y : pair.x;
        scores[4 * n + 2 * h + 1] = kSign < 0 ? pair.x : pair.y;
      }
    }
  }

  // Scales scores and adds the bias; what a row does not see becomes -inf.
  template <int kEntries, int kColumns>
  __device__ __forceinline__ void add(float (&scores)[kColumns / 2], float scale,
                                      const LaneMask<kColumns>& mask,
                                      const BiasTables<kEntries, false>& tables,
                                      const BiasColumns<kSign, kColumns>& columns) const {
    const int lane = threadIdx.x % kWarpLanes;
    uint32_t address[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      address[h] = ptx::shared_address(tables.entry[0]) +
                   row[h] * static_cast<int32_t>(sizeof(float));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const int2 column = *reinterpret_cast<const int2*>(&columns.offset[8 * n + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t at = address[e / 2] + (e % 2 == 0 ? column.x : column.y);
        float& score = scores[4 * n + e];
        score = mask.test(n, e / 2, e % 2)
                    ? score * scale + __uint_as_float(ptx::load_shared_32(at))
                    : -kInfinity;
      }
    }
  }
};

}  // namespace jax_na::cuda::sm90
