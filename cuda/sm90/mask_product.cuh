// Masks by a product: scores begin at 0 where a row sees a column, and at -57344^2 or less where
// it does not, and the tensor cores make that from two thin matrices of bytes (e5m2). Both have
// an *entry* per coordinate of the box of columns, those of its axes one after the other:
//
//   of a column   57344 at its own coordinate of every axis, and 0 elsewhere
//   of a row      -57344 at the coordinates that it does not see, and 0 elsewhere
//
// The columns' matrix is the same for all boxes and stays in shared memory; the rows' is made
// in registers, some thirty instructions instead of two or three for every score.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

constexpr int kMaskEntries = 32;

// Columns of an axis, up to the end of the last box: 64 where registers allow for that.
template <int kDim>
constexpr int kMostSeen = kDim <= 64 ? 32 : 64;

// What is not seen gets this, once per axis. Scores that are seen are to be above half of it.
constexpr float kMaskedScore = -57344.0f * 57344.0f;
constexpr uint8_t kMaskByte = 0x7b;          // 57344 as e5m2
constexpr uint32_t kMaskBytes = 0xfbfbfbfb;  // -57344, four times

// Where entry e stands in a row of either matrix: a lane of wgmma holds bytes
// 16 m + 4 (l % 4) + i, which are entries 8 i + 4 m + l % 4, as these are easily made of bits.
__device__ __forceinline__ int mask_place(int e) {
  return e % 8 / 4 * 16 + e % 4 * 4 + e / 8;
}

// What is no column of the box has a byte at the last entry, which no row sees.
template <int kColumns>
struct MaskColumns {
  // Rows of 64 bytes, of which the first half is used.
  using Rows = Block<32, kColumns>;
  alignas(1024) uint8_t rows[Rows::kAllBytes];

  // To be called by all `threads` of a CTA, who then synchronise.
  __device__ __forceinline__ void fill(const Cut& cut, int threads) {
    for (int column = threadIdx.x; column < kColumns; column += threads) {
      for (int unit = 0; unit < 2; ++unit) {
        *reinterpret_cast<uint4*>(rows + Rows::offset(column, unit)) = make_uint4(0, 0, 0, 0);
      }
      const auto set = [&](int entry) {
        const int place = mask_place(entry);
        rows[Rows::offset(column, place / 16) + place % 16] = kMaskByte;
      };
      int32_t at[kMaxRank];
      cut.columns.point(column, at);
      if (column >= cut.columns.size) {
        set(kMaskEntries - 1);
      } else {
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) {
          if (a >= cut.group_axis) set(cut.first_entry[a] + at[a]);
        }
      }
    }
    ptx::fence_async_proxy();
  }
};

// What the two rows of a lane see, a bit per coordinate from the start of the union.
template <int kDim>
struct SeenBits {
  static constexpr bool kWide = kMostSeen<kDim> > 32;
  std::conditional_t<kWide, uint64_t, uint32_t> bits[2][kMaxRank];

  // `exists` tells of both rows whether they see anything.
  template <int kGroups>
  __device__ __forceinline__ void read(const TileTable<kGroups>& table, const RowView& view,
                                       const Cut& cut,
                                       const bool (&exists)[2] = {true, true}) {
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (a < cut.group_axis) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Seen seen = table.seen[view.entry[h][a]];
        const auto from = [&](int32_t first) {  // 32 of them
          const int32_t lo = max(seen.lo - first, 0);
          return exists[h] ? ptx::bit_run(lo, max(seen.hi - first - lo, 0)) : 0;
        };
        bits[h][a] = from(0);
        if constexpr (kWide) bits[h][a] |= uint64_t{from(32)} << 32;
      }
    }
  }

  // 32 of them, with that of coordinate `at` at place `first`. Other places than those of the
  // box may hold anything.
  __device__ __forceinline__ uint32_t place(int h, int a, int32_t at, int32_t first) const {
    if constexpr (kWide) {
      return static_cast<uint32_t>(bits[h][a] >> at) << first;
    } else {
      return ptx::rotate_right(bits[h][a], at - first);
    }
  }
};

// Whether scores can be masked by a product: bits are enough up to the end of the last box, a
// box has few enough coordinates, scores stay masked when they are scaled, and what is masked is
// a number. Where columns are missing in a box, one entry more is needed.
inline bool can_mask_by_product(const Problem& p, const Cut& cut, int columns, int most_seen) {
  const auto scale = static_cast<float>(p.scale);
  if (p.frame != nullptr || !(scale > 0x1p-20f && scale < 0x1p20f)) return false;
  int64_t entries = cut.columns.size < columns ? 1 : 0;
  bool fits = true;
  for (int a = cut.group_axis; a < kMaxRank; ++a) {
    const AxisWindow& window = p.window[a];
    const int64_t extent = cut.columns.extent[a];
    const int64_t most = fused::most_columns(window, cut.ctas.tile.extent[a]);
    fits = fits && (most + extent - 1) / extent * extent <= most_seen;
    entries += extent;
  }
  return fits && entries <= kMaskEntries;
}

// The rows' operand, in the order of wgmma's registers: lane l has rows l / 4 and l / 4 + 8 of
// its warp.
struct MaskRows {
  uint32_t operand[kMaskEntries / 8];

  // For the box at hand; none of it is masked where not `in_grid`.
  template <int kDim>
  __device__ __forceinline__ void make(const SeenBits<kDim>& seen, const BoxWalk& walk,
                                       const Cut& cut, bool in_grid) {
    uint32_t entries[2] = {0, 0};  // that are seen
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (a < cut.group_axis) continue;
      const int32_t first = cut.first_entry[a];
      const uint32_t own = ptx::bit_run(first, cut.columns.extent[a]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        entries[h] |= seen.place(h, a, walk.at[a], first) & own;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t unseen = in_grid ? ~entries[h] : 0;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        // The highest bits of bytes become those of the entries, and then all of the bytes.
        const uint32_t bits = unseen << (7 - 4 * m - threadIdx.x % 4);
        operand[2 * m + h] = ptx::signs_of_bytes(bits) & kMaskBytes;
      }
    }
  }

  // Begins scores of the box, or masks what they begin with; the products of its keys are to be
  // added.
  template <bool kBegun, int kColumns>
  __device__ __forceinline__ void mask_scores(float (&scores)[kColumns / 2],
                                              const MaskColumns<kColumns>& columns) const {
    using Rows = typename MaskColumns<kColumns>::Rows;
    Product<kColumns>::template add_bytes<kBegun>(
        scores, operand, Rows::by_channels(ptx::shared_address(columns.rows)));
  }
};

}  // namespace jax_na::cuda::sm90
