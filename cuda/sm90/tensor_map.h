// Tensor maps: how the copy engine finds boxes of tokens of one residue class in an array
// [batch, *grid, heads, dim] of 2-byte (or, for sums, 4-byte) elements, without any permutation
// of tokens.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "../../ffi/problem.h"

namespace jax_na::cuda::sm90 {

struct TokenArray {
  const void* data;
  ElementType type;
  int64_t batch;
  int32_t grid[kMaxRank];
  int32_t heads, dim;
};

// Boxes of `extent` tokens, `dilation` apart, times `channels` channels.
struct TokenBox {
  int32_t extent[kMaxRank];
  int32_t dilation[kMaxRank];
  int32_t channels;
};

// Whether the copy engine can fetch such boxes.
bool box_is_copyable(const TokenBox& box);

// Rows of 128 bytes are swizzled by 128, shorter ones by 64.
cudaError_t make_tensor_map(const TokenArray& array, const TokenBox& box, CUtensorMap* map);

}  // namespace jax_na::cuda::sm90
