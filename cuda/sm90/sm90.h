// The fused kernels for Hopper: warpgroup products and tensor copies, sm_90a only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../ffi/problem.h"

namespace jax_na::cuda {

// How a pass is cut. A pipeline owns a box of at most 64 rows per warpgroup, `groups` of them
// next to each other on the caller's first axis, and visits boxes of at most `columns` tokens. The
// kernel is the one that was compiled for these groups and columns (see variants.h).
struct HopperTiling {
  int32_t row_box[kMaxRank];     // of a warpgroup
  int32_t column_box[kMaxRank];
  int32_t groups;
  int32_t columns;
  bool masks_by_product;  // where that is possible (see mask_product.cuh)
};

// Element types kF16 and kBF16; head_dim and value_dim multiples of 8 up to 256; a bias table of
// at most 512 entries. Results are bitwise equal in every run. cudaErrorInvalidValue where a
// problem or a tiling is outside of what is compiled.
cudaError_t forward_sm90(const ForwardCall& call, const HopperTiling& tiling,
                         cudaStream_t stream);

struct HopperBackwardTiling {
  HopperTiling dquery;       // rows are queries, columns keys
  HopperTiling dkey_dvalue;  // rows are keys, columns queries
};

// dquery, dkey and dvalue, in gather form, and delta, if it is not given; head dimensions up to
// 128, and the bias tables of all heads of a group at most 512 entries. The other gradients of the
// call are left alone. `workspace` is scratch memory of so many floats.
int64_t backward_sm90_workspace(const BackwardCall& call);
cudaError_t backward_sm90(const BackwardCall& call, const HopperBackwardTiling& tiling,
                          float* workspace, cudaStream_t stream);

// All three gradients in one walk, those of the queries as sums in any order, so that reruns
// differ by rounding. delta is given. Head dimensions, bias and workspace as above; no additional
// keys.
int64_t gradients_sm90_workspace(const Problem& p);
cudaError_t gradients_sm90(const BackwardCall& call, const HopperTiling& tiling,
                           float* workspace, cudaStream_t stream);

}  // namespace jax_na::cuda
