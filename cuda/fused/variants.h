// What is compiled, by padded dimension and bytes of an element. The planner,
// jax_na/_tiling.py, knows the same table.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "../../ffi/problem.h"

namespace jax_na::cuda::fused {

// Rows of the arrays are padded with zeros in shared memory to one of these lengths.
inline int32_t padded_dim(const Problem& p) {
  const int32_t dim = max_i32(p.head_dim, p.value_dim);
  for (const int32_t padded : {32, 64, 96, 128, 192, 256}) {
    if (dim <= padded) return padded;
  }
  return 0;
}

// Calls launch with the padded dimension of a problem as a type, which has it as `value`.
template <class Launch>
cudaError_t with_padded_dim(const Problem& p, const Launch& launch) {
  switch (padded_dim(p)) {
    case 32:
      return launch(std::integral_constant<int, 32>{});
    case 64:
      return launch(std::integral_constant<int, 64>{});
    case 96:
      return launch(std::integral_constant<int, 96>{});
    case 128:
      return launch(std::integral_constant<int, 128>{});
    case 192:
      return launch(std::integral_constant<int, 192>{});
    case 256:
      return launch(std::integral_constant<int, 256>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Shared memory that a CTA can have on every GPU: those of compute capability 8.6, 8.9 and 12.x
// have no more.
constexpr int64_t kSharedBytes = 99 * 1024;

// A warp has 16 rows or, in the kernels of 128 rows, 32: these read half as much shared memory
// for a product, where their sums fit the registers. Rows of more than 512 bytes leave shared
// memory for half a tile either way.
constexpr int warps_of(int padded_dim, int element_bytes) {
  return padded_dim * element_bytes <= 512 ? 4 : 2;
}

// The tokens that a CTA owns, at most, with 16 rows per warp.
constexpr int backward_rows(int padded_dim, int element_bytes) {
  return 16 * warps_of(padded_dim, element_bytes);
}

// The tokens that are visited at once, at most: in the forward pass, where keys and values of
// those and queries are in shared memory, and for gradients, with one block of rows more.
constexpr int forward_columns(int padded_dim, int element_bytes) {
  return padded_dim * element_bytes <= 512 ? 64 : 32;
}
constexpr int backward_columns(int padded_dim, int element_bytes) {
  return padded_dim * element_bytes <= 384 ? 64 : padded_dim * element_bytes <= 768 ? 32 : 16;
}

// With 32 rows per warp, where there is such a kernel, and what it visits at once.
constexpr int forward_rows(int padded_dim, int element_bytes) {
  return backward_rows(padded_dim, element_bytes) *
         (element_bytes == 2 && padded_dim <= 128 ? 2 : 1);
}
constexpr int dquery_rows(int padded_dim, int element_bytes) {
  return backward_rows(padded_dim, element_bytes) *
         (element_bytes == 2 && padded_dim > 64 && padded_dim <= 128 ? 2 : 1);
}
constexpr int dquery_columns(int padded_dim, int element_bytes, int rows) {
  return rows > backward_rows(padded_dim, element_bytes)
             ? 32
             : backward_columns(padded_dim, element_bytes);
}

// Pairs of warps that make gradients of keys and values have weights in shared memory, too.
constexpr int dkey_columns(int padded_dim, int element_bytes) {
  return element_bytes == 2 && padded_dim == 128 ? 32
                                                 : backward_columns(padded_dim, element_bytes);
}

// The kernels for the bias's gradient keep all of a visit's tokens, and their scores.
constexpr int dbias_rows(int padded_dim, int element_bytes) {
  return padded_dim * element_bytes <= 256 ? 64 : 32;
}
constexpr int dbias_columns(int padded_dim, int element_bytes) {
  return padded_dim * element_bytes <= 512 ? dbias_rows(padded_dim, element_bytes) : 16;
}

inline int64_t box_size(const int32_t (&box)[kMaxRank]) {
  for (const int32_t extent : box) {
    if (extent < 1) return 0;
  }
  return int64_t{box[0]} * box[1] * box[2];
}

inline int element_bytes(const Problem& p) { return p.element_type == ElementType::kF32 ? 4 : 2; }

inline bool supported(const Problem& p) {
  return p.element_type != ElementType::kF64 && p.head_dim % 8 == 0 && p.value_dim % 8 == 0 &&
         p.head_dim > 0 && p.value_dim > 0 && padded_dim(p) > 0 &&
         p.query_tokens() < INT32_MAX && p.key_tokens() < INT32_MAX &&
         p.bias_size() < INT32_MAX;
}

// Whether a kernel of so many rows can own the one box and, of so many columns, visit the other.
inline bool fits(const int32_t (&owned)[kMaxRank], int rows, const int32_t (&visited)[kMaxRank],
                 int columns) {
  return box_size(owned) >= 1 && box_size(owned) <= rows && box_size(visited) >= 1 &&
         box_size(visited) <= columns;
}

}  // namespace jax_na::cuda::fused
