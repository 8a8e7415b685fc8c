// Masks by a product: scores begin at 0 where a row sees a column, and at -2^100 or less where it
// does not, and the tensor cores make that from two thin matrices. Both have an *entry* per
// coordinate of the box of columns, those of its axes one after the other:
//
//   of a column   1 at its own coordinate of every axis, and 0 elsewhere
//   of a row      -2^100 at the coordinates that it does not see, and 0 elsewhere
//
// The columns' matrix is the same for all boxes and stays in shared memory; the rows' is made in
// registers, some fifty instructions instead of two or three for every score.
#pragma once

#include <cstdint>

#include "ptx.cuh"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

constexpr int kMaskEntries = 32;
constexpr float kMaskedScore = -0x1p100f;

// What is no column of the box has a 1 at the last entry, which no row sees.
template <int kColumns>
struct MaskColumns {
  using Rows = Block<kMaskEntries, kColumns>;
  alignas(1024) uint8_t rows[Rows::kAllBytes];

  __device__ __forceinline__ void fill(const Cut& cut, int threads) {
    for (int column = threadIdx.x; column < kColumns; column += threads) {
      for (int unit = 0; unit < kMaskEntries / 8; ++unit) {
        *reinterpret_cast<uint4*>(rows + Rows::offset(column, unit)) = make_uint4(0, 0, 0, 0);
      }
      const auto set = [&](int entry) {
        auto* unit = reinterpret_cast<uint16_t*>(rows + Rows::offset(column, entry / 8));
        unit[entry % 8] = 0x3f80;  // 1 as bfloat16
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
  }
};

// What the two rows of a lane see, a bit per coordinate from the start of the union.
struct SeenBits {
  uint32_t bits[2][kMaxRank];

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
        const int32_t lo = max(seen.lo, 0);
        bits[h][a] = exists[h] ? ptx::bit_run(lo, max(seen.hi - lo, 0)) : 0;
      }
    }
  }
};

// Whether scores can be masked by a product: bits are enough up to the end of the last box, a box
// has few enough coordinates, scores stay masked when they are scaled, and what is masked is a
// number. Where columns are missing in a box, one entry more is needed.
inline bool can_mask_by_product(const Problem& p, const Cut& cut, int columns) {
  const auto scale = static_cast<float>(p.scale);
  if (p.frame != nullptr || !(scale > 0x1p-60f && scale < 0x1p20f)) return false;
  int64_t entries = cut.columns.size < columns ? 1 : 0;
  bool fits = true;
  for (int a = cut.group_axis; a < kMaxRank; ++a) {
    const AxisWindow& window = p.window[a];
    const int64_t extent = cut.columns.extent[a];
    const int64_t rows = cut.ctas.tile.extent[a];
    const int64_t most = rows + window.kernel_size + window.stride - 2;
    fits = fits && (most + extent - 1) / extent * extent <= 32;
    entries += extent;
  }
  return fits && entries <= kMaskEntries;
}

// The rows' operand, in the order of wgmma's registers: lane l has rows l / 4 and l / 4 + 8 of
// its warp, and of every 8 entries 2 (l % 4) and the next.
struct MaskRows {
  uint32_t operand[kMaskEntries / 4];

  // For the box at hand; none of it is masked where not `in_grid`.
  __device__ __forceinline__ void make(const SeenBits& seen, const BoxWalk& walk,
                                       const Cut& cut, bool in_grid) {
    uint32_t entries[2] = {0, 0};  // that are seen
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      if (a < cut.group_axis) continue;
      const int32_t first = cut.first_entry[a];
      const uint32_t own = ptx::bit_run(first, cut.columns.extent[a]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // The coordinate at the start of the box goes to the first entry.
        entries[h] |= ptx::rotate_right(seen.bits[h][a], walk.at[a] - first) & own;
      }
    }
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t unseen = in_grid ? ~entries[h] : 0;
      // The two entries of byte j become its highest bits, and then all bits of a half.
      const uint32_t even = unseen << (7 - pair), odd = unseen << (6 - pair);
#pragma unroll
      for (int j = 0; j < kMaskEntries / 8; ++j) {
        operand[2 * j + h] = ptx::signs_of_byte(even, odd, j) & 0xf180f180;  // -2^100, twice
      }
    }
  }
};

}  // namespace jax_na::cuda::sm90
