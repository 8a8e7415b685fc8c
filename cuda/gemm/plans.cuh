// What the unfused kernels share: their sizes, their parameters, and the functions that launch
// them, one per compiled unit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../fused/geometry.cuh"
#include "../fused/plans.cuh"
#include "../fused/staging.cuh"
#include "../fused/variants.h"
#include "../unfused.h"

namespace jax_na::cuda::gemm {

using namespace fused;

// A warp has 16 rows of a product. Rows are as many as the fused kernels have, so that the
// planner knows one table; of wide heads fewer columns, for two stages of them.
template <typename T_, int kDim_, Precision kPrecision_>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim, padded
  static constexpr Precision kPrecision = kPrecision_;

  using Layout = RowLayout<kDim * sizeof(T)>;
  static constexpr int kRows = backward_rows(kDim, sizeof(T));
  static constexpr int kColumns = Layout::kRowBytes <= 256 ? 64 : 32;
  static constexpr int kWarps = warps_of(kDim, sizeof(T));
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = 16;
  static_assert(kRows == kWarps * kWarpRows && kRows <= 2 * kColumns);

  // CTAs per multiprocessor whose registers fit, and shared memory on an H100.
  static constexpr int kResident = Layout::kRowBytes <= 64    ? 5
                                   : Layout::kRowBytes <= 128 ? 4
                                   : kDim <= 128              ? 3
                                                              : 2;
};

// Slots of one query between those of the first and of the last key of a tile, both included,
// that scatter_kernel has room for.
constexpr int most_spanned(int element_bytes) { return 224 / element_bytes; }

struct UnfusedPlan {
  UnfusedCall call;
  TileGrid rows;
  Divisor one;
  Divisor group;       // query heads of a key head
  int32_t cta_heads;   // which one CTA works on, one after the other: of keys in scatter
  Divisor head_parts;  // into which that cuts the heads
  BoxOrder window;     // of slots
  int32_t slot_step[kMaxRank];  // slots between neighbours on an axis
};

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_pair(const UnfusedPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_gather(const UnfusedPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_scatter(const UnfusedPlan& plan, cudaStream_t stream);

}  // namespace jax_na::cuda::gemm
