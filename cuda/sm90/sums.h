// The gradient of queries as sums of float32 in memory: [batch, *query_grid, heads, channels],
// without the scale. Channels come in groups of 16, in the order in which a lane of a product
// has them: those that lane l holds of a row, 2 q and 2 q + 1, 8 + 2 q and 8 + 2 q + 1 with
// q = l % 4, are next to each other, so that it adds them by one instruction.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../ffi/problem.h"

namespace jax_na::cuda::sm90 {

constexpr int32_t kSumChannels = 16;

// Of a row.
JAX_NA_INLINE int32_t sum_channels(int32_t head_dim) {
  return (head_dim + kSumChannels - 1) / kSumChannels * kSumChannels;
}

// dquery = scale sums, in the element type and order of queries.
cudaError_t round_sums(const Problem& p, const float* sums, void* dquery, cudaStream_t stream);

}  // namespace jax_na::cuda::sm90
