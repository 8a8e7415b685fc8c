// Where the elements of a product lie among the slots of windows, and how they come there.
//
// On every axis a slot is the bias row of its query and key less that of the window's first
// key, and bias rows are differences of relative class indices (fused/geometry.cuh). So the
// index of a slot is a sum: a part of the query and a part of the key.
//
// Slots travel between global and shared memory in runs, one of every query: from the slot of
// the first key at hand to that of the last one. An *image* has a row for every query and a
// run in it, without change, so that the place of an element in it is a sum of two parts as
// well. Elements are taken out of an image, or put in it, one by one, where their row sees
// their column; what else a run may hold has no key.
#pragma once

#include <cstdint>

#include "../fused/gemm.cuh"
#include "../fused/geometry.cuh"
#include "../fused/softmax.cuh"
#include "../fused/staging.cuh"
#include "../fused/stream.cuh"
#include "columns.cuh"
#include "plans.cuh"

namespace jax_na::cuda::gemm {

__device__ __forceinline__ int32_t slot_offset(const UnfusedPlan& plan,
                                               const int32_t (&at)[kMaxRank]) {
  return at[0] * plan.slot_step[0] + at[1] * plan.slot_step[1] + at[2] * plan.slot_step[2];
}

// The index of the first slot of a query and head.
__device__ __forceinline__ int64_t first_slot(const UnfusedPlan& plan, int64_t batch,
                                              int32_t token, int32_t head) {
  const Problem& p = plan.call.problem;
  return ((batch * p.query_tokens() + token) * p.heads + head) * plan.window.size;
}

// ---- Runs and images -----------------------------------------------------------------

struct alignas(16) Run {
  int64_t first;  // slot
  int32_t count;
  int32_t image;  // the query's part of the place of a slot in the image, in bytes
};

// One run per row, of elements of a type. Where kWholeChunks, runs begin at the chunk of 16
// bytes that has their first slot, as asynchronous copies want it. An odd number of chunks per
// row spreads the rows over the banks.
template <typename T_, int kSlots, bool kWholeChunks>
struct Image {
  using T = T_;
  static constexpr int kBytes = sizeof(T);
  static constexpr int kPerChunk = kChunkBytes / kBytes;
  static constexpr int kChunks = kSlots / kPerChunk + 1;  // of a row
  static constexpr int kRowBytes = kChunks * kChunkBytes;
  static_assert(kSlots % kPerChunk == 0 && kChunks % 2 == 1);

  // `part` is the key's part of the place of the first slot.
  static __device__ __forceinline__ Run run(int row, int64_t first, int32_t count,
                                            int32_t part) {
    const int32_t lead = kWholeChunks ? static_cast<uint32_t>(first) % kPerChunk : 0;
    return {first - lead, lead + count, row * kRowBytes + lead * kBytes - part};
  }
};

// Starts to copy kCount runs to the rows of an image from `row` on.
template <class Image, int kCount>
__device__ __forceinline__ void copy_runs(uint32_t image, int row, const Run* runs,
                                          const typename Image::T* slots) {
  constexpr int kLanes = 8;  // of a run
  constexpr int kRunsPerPass = kWarpLanes / kLanes;
  const int lane = threadIdx.x % kLanes;
  row += threadIdx.x % kWarpLanes / kLanes;
  slots += lane * Image::kPerChunk;
  image += row * Image::kRowBytes + lane * kChunkBytes;
#pragma unroll
  for (int pass = 0; pass < kCount / kRunsPerPass; ++pass) {
    const Run run = runs[row + pass * kRunsPerPass];
    const int32_t bytes = run.count * Image::kBytes - lane * kChunkBytes;
#pragma unroll
    for (int chunk = 0; chunk < Image::kChunks; chunk += kLanes) {
      ptx::copy_async_16_if(
          bytes > chunk * kChunkBytes,
          image + pass * kRunsPerPass * Image::kRowBytes + chunk * kChunkBytes,
          slots + run.first + chunk * Image::kPerChunk,
          min(bytes - chunk * kChunkBytes, kChunkBytes));
    }
  }
}

// Calls fn(element, place, seen) for the elements of a product of one warp, with their places
// in an image. Parts of places are those of this lane's rows l / 4 and l / 4 + 8, and of all
// columns.
template <int kNTiles, class Fn>
__device__ __forceinline__ void for_each_place(Accumulator (&product)[1][kNTiles],
                                               const int32_t (&row_part)[2],
                                               const int32_t* column_part,
                                               const LaneMask<1>& mask, const Fn& fn) {
  const auto* parts = reinterpret_cast<const int2*>(column_part) + threadIdx.x % 4;
  for_each_element(product, [&](float& element, int m, int half, int n, int i) {
    const int2 pair = parts[4 * n];
    fn(element, row_part[half] + (i == 0 ? pair.x : pair.y), mask.test(m, half, n, i));
  });
}

// Two images of weights, of the box at hand and of the next one. Rows count through both of
// them, so that places do not depend on the box.
template <class Image_, int kRows_>
struct WeightImages {
  using Image = Image_;
  static constexpr int kRows = kRows_;
  alignas(16) uint8_t rows[2 * kRows][Image::kRowBytes];
  uint8_t zeros[kChunkBytes];  // where the weights are that a row does not see

  __device__ __forceinline__ void start() {
    if (threadIdx.x < kChunkBytes) zeros[threadIdx.x] = 0;
  }

  // The weights of a warp's elements. All are loaded, so that none waits for another.
  template <int kNTiles>
  __device__ __forceinline__ void get(Accumulator (&to)[1][kNTiles],
                                      const int32_t (&row_part)[2], const int32_t* column_part,
                                      const LaneMask<1>& mask) const {
    for_each_place(to, row_part, column_part, mask, [&](float& weight, int32_t at, bool seen) {
      const int32_t place = seen ? at : int32_t{sizeof(rows)};
      const auto* from = reinterpret_cast<const uint8_t*>(this) + place;
      weight = static_cast<float>(*reinterpret_cast<const typename Image::T*>(from));
    });
  }
};

// ---- Rows are queries ----------------------------------------------------------------

// Lane l knows row l % 16 of its warp.
struct QueryRow {
  int32_t start[kMaxRank];  // relative class index of the window's first key
  int64_t first;            // slot of the window
  int64_t part;             // of the index of a slot

  __device__ __forceinline__ QueryRow(const UnfusedPlan& plan, const TilePlace& place,
                                      int32_t head, const int32_t* row_token, int warp_row) {
    const Problem& p = plan.call.problem;
    const int own = warp_row + threadIdx.x % 16;
    plan.rows.tile.point(own, start);
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int32_t query = place.first[a] + p.window[a].dilation * start[a];
      start[a] += first_bias_row(p.window[a], p.axis_frame(place.batch, a), query);
    }
    const int32_t token = max(row_token[own], ~row_token[own]);
    first = first_slot(plan, place.batch, token, head);
    part = first - slot_offset(plan, start);
  }

  // To the next head.
  __device__ __forceinline__ void advance(const UnfusedPlan& plan) {
    first += plan.window.size;
    part += plan.window.size;
  }

  // Notes the runs of the warp's rows, of the columns that they see; `warp_row` is the first
  // of the image.
  template <class Image, int kColumns>
  __device__ __forceinline__ void put_run(Run* runs, int warp_row, uint64_t columns,
                                          const ColumnTable<kColumns>& table) const {
    const int own = warp_row + threadIdx.x % 16;
    if (threadIdx.x % kWarpLanes < 16) {
      Run run = {0, 0, 0};
      if (columns != 0) {
        const int32_t from = table.part[__ffsll(columns) - 1];
        const int32_t to = table.part[63 - __clzll(columns)];
        run = Image::run(own, part + from / Image::kBytes, (to - from) / Image::kBytes + 1,
                         from);
      }
      runs[own] = run;
    }
    __syncwarp();
  }
};

// Columns are keys: their parts of slots, and of their places in images of elements of a size.
template <int kColumns>
__device__ __forceinline__ void put_keys(ColumnTable<kColumns>* table, const UnfusedPlan& plan,
                                         const ColumnList& list, int32_t first_column,
                                         int32_t element_bytes) {
  if (threadIdx.x >= kColumns) return;
  int32_t at[kMaxRank];
  list.point(first_column + threadIdx.x, at);
  const int32_t relative[kMaxRank] = {list.tokens.lo[0] + at[0], list.tokens.lo[1] + at[1],
                                      list.tokens.lo[2] + at[2]};
  table->put(list, first_column + threadIdx.x, at,
             slot_offset(plan, relative) * element_bytes);
}

// As many keys of every axis but the first as a window has: the slots of a box are then not
// more than its columns.
struct LeastKeys {
  int32_t count[kMaxRank];
  __device__ __forceinline__ explicit LeastKeys(const Problem& p)
      : count{1, p.window[1].kernel_size, p.window[2].kernel_size} {}
};

}  // namespace jax_na::cuda::gemm
