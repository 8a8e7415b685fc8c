// The fused kernels on tensor cores: `mma.sync` and asynchronous copies, sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../ffi/problem.h"

namespace jax_na::cuda {

// How a pass is cut: the tokens of a tile belong to one residue class per axis, and its extents
// count in that class. Tiles of the tokens that CTAs own hold at most the rows of a kernel (see
// variants.h), those of the tokens that they visit at most 64.
struct Tiling {
  int32_t query_tile[kMaxRank];
  int32_t key_tile[kMaxRank];
};

struct BackwardTiling {
  Tiling dquery;              // CTAs own queries
  Tiling dbias;               // CTAs own pairs of both
  Tiling dkey_dvalue;         // CTAs own keys; its query tile is also used for additional keys
  int32_t bias_splits;        // CTAs that share what reads one table
  int32_t additional_splits;  // CTAs that share the queries of 64 additional keys
};

// Element types kF16, kBF16 and kF32; head_dim and value_dim multiples of 8 up to 256; fewer
// than 2^31 - 1 tokens per sample. `highest_precision` is for kF32: without it products are
// TF32. Results are bitwise equal in every run. cudaErrorInvalidValue where a problem or a
// tiling is outside these bounds.
cudaError_t forward_fused(const ForwardCall& call, const Tiling& tiling, bool highest_precision,
                          cudaStream_t stream);

// Makes delta of `out` and `dlse`, for the element types of the others.
cudaError_t make_delta(const BackwardCall& call, cudaStream_t stream);

// delta is given. `workspace` holds backward_fused_workspace(call, tiling) floats and may be null for none.
cudaError_t backward_fused(const BackwardCall& call, const BackwardTiling& tiling,
                           bool highest_precision, float* workspace, cudaStream_t stream);

// bias_splits * (size of dbias), if dbias is wanted and bias_splits > 1, and
// additional_splits * (sizes of the wanted gradients of additional keys and values), if
// additional_splits > 1.
int64_t backward_fused_workspace(const BackwardCall& call, const BackwardTiling& tiling);

}  // namespace jax_na::cuda
