// Tensor maps: how the copy engine finds boxes of tokens of one residue class in an array
// [batch, *grid, heads, channels] of 2-byte elements, without any permutation of tokens.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "../../ffi/problem.h"

namespace jax_na::cuda::sm90 {

// Boxes of `extent` tokens, `dilation` apart, times `channels` channels.
struct TokenBox {
  int32_t extent[kMaxRank];
  int32_t dilation[kMaxRank];
  int32_t channels;
};

// Channels that one copy brings: rows of 128 bytes, or of 64 where those would not fit.
inline int32_t channels_of_block(int padded_dim) {
  return padded_dim % 64 == 0 ? 64 : 32;
}

// Maps of two arrays over one grid, with head_dim and value_dim channels; null arrays and empty
// grids are passed over. cudaErrorInvalidValue where the copy engine cannot fetch such boxes.
cudaError_t make_tensor_maps(const Problem& p, const int32_t (&grid)[kMaxRank], int32_t heads,
                             const void* const (&arrays)[2], const TokenBox& box,
                             CUtensorMap (&maps)[2]);

// The map of sums [batch, *query_grid, heads, channels] of float32, see sums.h.
cudaError_t make_sum_map(const Problem& p, int32_t channels, const float* sums,
                         const TokenBox& box, CUtensorMap* map);

}  // namespace jax_na::cuda::sm90
