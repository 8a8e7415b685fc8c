// Unfused neighborhood attention: its three products, each of which is a gradient of the
// others. Plain CUDA C++, no XLA headers.
//
//   pair     slots[t, j]  = queries[t] . keys[key j of t]      0 where there is no such key
//   gather   queries[t]   = sum over j of slots[t, j] keys[key j of t]
//   scatter  keys[s]      = sum over t and j, where s is key j of t, of slots[t, j] queries[t]
//
// Key j of a query is that of slot j of its window: slot j of an axis is the j-th key of the
// window there, the last axis varies fastest. Slots without a key are not read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../ffi/problem.h"

namespace jax_na::cuda {

// Two of the arrays are read and one is written:
//   queries  [batch, *query_grid, heads, head_dim]
//   keys     [batch, *key_grid, key_heads, head_dim]
//   slots    [batch, *query_grid, heads, product(kernel_size)]
// value_dim is head_dim; there are no additional keys, no bias and no scale.
struct UnfusedCall {
  Problem problem;
  void* queries;
  void* keys;
  void* slots;
  bool wide_result;  // which has the accumulation type, not the element type

  JAX_NA_INLINE int64_t window_size() const {
    const AxisWindow* w = problem.window;
    return int64_t{w[0].kernel_size} * w[1].kernel_size * w[2].kernel_size;
  }
};

// As in kernels.h: launches only, complete outputs, zero sizes accepted. All are bitwise equal
// in every run.

// A few lanes of a warp per query or key, without tensor cores. Every type and shape.
cudaError_t pair_naive(const UnfusedCall& call, cudaStream_t stream);
cudaError_t gather_naive(const UnfusedCall& call, cudaStream_t stream);
cudaError_t scatter_naive(const UnfusedCall& call, cudaStream_t stream);

// How a product is cut: CTAs own tiles of rows, which are queries, or keys in scatter, and
// visit the others. Tokens of a tile belong to one residue class per axis, in which its extents
// count.
struct UnfusedTiling {
  int32_t row_tile[kMaxRank];
};

// Batched matrix products on tensor cores. Element types kF16, kBF16 and kF32; head_dim a
// multiple of 8 up to 256; fewer than 2^31 - 1 tokens per sample and 2^24 slots per query.
// `highest_precision` is for kF32: without it products are TF32. Arrays are aligned to 16 bytes.
// cudaErrorInvalidValue where a problem or a tiling is outside these bounds (tile sizes, and for
// scatter the slots that a tile spans: gemm/plans.cuh).
cudaError_t pair_gemm(const UnfusedCall& call, const UnfusedTiling& tiling,
                      bool highest_precision, cudaStream_t stream);
cudaError_t gather_gemm(const UnfusedCall& call, const UnfusedTiling& tiling,
                        bool highest_precision, cudaStream_t stream);
cudaError_t scatter_gemm(const UnfusedCall& call, const UnfusedTiling& tiling,
                         bool highest_precision, cudaStream_t stream);

}  // namespace jax_na::cuda
