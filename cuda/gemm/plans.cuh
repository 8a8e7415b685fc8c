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

// A warp has 16 rows of a product. Rows and columns are as many as the fused kernels have, so
// that the planner knows one table.
template <typename T_, int kDim_, Precision kPrecision_>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim, padded
  static constexpr Precision kPrecision = kPrecision_;

  using Layout = RowLayout<kDim * sizeof(T)>;
  static constexpr int kRows = backward_rows(kDim, sizeof(T));
  static constexpr int kColumns = columns_of(kDim, sizeof(T));
  static constexpr int kWarps = warps_of(kDim, sizeof(T));
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = 16;
  static_assert(kRows == kWarps * kWarpRows && kRows <= kColumns);

  // CTAs per multiprocessor whose registers fit.
  static constexpr int kResident = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;
};

struct UnfusedPlan {
  UnfusedCall call;
  TileGrid rows;
  ColumnBox columns;
  Divisor group, key_heads, one;
  BoxOrder window;              // of slots
  int32_t slot_step[kMaxRank];  // slots between neighbours on an axis
};

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_pair(const UnfusedPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_gather(const UnfusedPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_scatter(const UnfusedPlan& plan, cudaStream_t stream);

}  // namespace jax_na::cuda::gemm
