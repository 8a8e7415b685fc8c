// The gradient of queries as sums of float32 in memory: [batch, *query_grid, heads, padded
// head_dim], without the scale. Channels come in groups of 32, which are 128 bytes, in an order
// that suits the lanes of a product: lane l has channels 16 j + 8 n + 2 q + i of a row, with
// q = l % 4 and all j, n and i below 2, and they are in places 8 q + 4 j + 2 n + i.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../ffi/problem.h"

namespace jax_na::cuda::sm90 {

constexpr int32_t kSumChannels = 32;  // of a group

// dquery = scale sums, in the element type and order of queries.
cudaError_t round_sums(const Problem& p, const float* sums, void* dquery, cudaStream_t stream);

}  // namespace jax_na::cuda::sm90
