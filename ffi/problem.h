// One call as the kernels see it: sizes, window, and raw pointers. Decoded once from
// the XLA FFI call frame (ffi/decode.h); kernels decide nothing twice.
//
// Memory is always row-major in the public layout:
//   query, out, dout, dquery   [batch, *query_grid, heads, head_dim or value_dim]
//   key, value, dkey, dvalue   [batch, *key_grid, key_heads, head_dim or value_dim]
//   additional_key / _value    [batch, additional, key_heads, head_dim or value_dim]
//   lse, delta                 [batch, *query_grid, heads]
//   bias, dbias                [batch or 1, heads, *(2 * kernel_size - 1)]
//   frame                      int32 [batch or 1, 3, rank]: length, query_origin, key_origin
// Query head h reads key head h / (heads / key_heads). Grids of rank 1 and 2 gain
// leading axes of length 1, so that every kernel sees three axes.
//
// lse, delta, bias and dbias have the accumulation type of the element type: double
// for double, float otherwise.
#pragma once

#include <cstdint>

#include "window.h"

namespace jax_na {

constexpr int kMaxRank = 3;

enum class ElementType : int32_t { kF16, kBF16, kF32, kF64 };

struct Problem {
  ElementType element_type;
  int64_t batch;
  int32_t query_grid[kMaxRank];
  int32_t key_grid[kMaxRank];
  int32_t heads;
  int32_t key_heads;
  int32_t head_dim;
  int32_t value_dim;
  int32_t additional;  // keys that every query sees
  AxisWindow window[kMaxRank];
  double scale;

  // `frame` points at [.., 3, rank] int32 or is null (the arrays are the whole grid).
  const int32_t* frame;
  int32_t rank;
  int64_t frame_batch_stride;  // in elements; 0 where one frame serves the batch
  int64_t bias_batch_stride;   // in elements; 0 where one table serves the batch

  JAX_NA_INLINE int64_t query_tokens() const {
    return int64_t(query_grid[0]) * query_grid[1] * query_grid[2];
  }
  JAX_NA_INLINE int64_t key_tokens() const {
    return int64_t(key_grid[0]) * key_grid[1] * key_grid[2];
  }
  JAX_NA_INLINE int32_t bias_extent(int axis) const { return 2 * window[axis].kernel_size - 1; }
  JAX_NA_INLINE int64_t bias_size() const {  // of one head's table
    return int64_t(bias_extent(0)) * bias_extent(1) * bias_extent(2);
  }

  // The placement of sample `b` on `axis`. Reads device memory on a GPU.
  JAX_NA_INLINE AxisFrame axis_frame(int64_t b, int axis) const {
    AxisFrame f{query_grid[axis], 0, query_grid[axis], 0, key_grid[axis]};
    const int own = axis - (kMaxRank - rank);  // axis among the caller's own
    if (frame != nullptr && own >= 0) {
      const int32_t* fields = frame + b * frame_batch_stride;
      f.length = fields[own];
      f.query_origin = fields[rank + own];
      f.key_origin = fields[2 * rank + own];
    }
    return f;
  }
};

struct Inputs {
  const void* query;
  const void* key;
  const void* value;
  const void* bias;              // null when absent
  const void* additional_key;    // null when absent
  const void* additional_value;  // null when absent
};

struct ForwardCall {
  Problem problem;
  Inputs in;
  void* out;
  void* lse;
};

// delta = rowsum(dout * out) - dlse, so that dscore = P * (dout . value - delta). It is given, or
// `out` is and, unless it is zero, `dlse`, and delta is to be made of them.
// A gradient that nobody asked for is null.
struct BackwardCall {
  Problem problem;
  Inputs in;
  const void* dout;
  const void* lse;
  const void* out;   // null where delta is given
  const void* dlse;  // null for zeros
  void* delta;
  void* dquery;
  void* dkey;
  void* dvalue;
  void* dbias;  // [batch or 1, heads, *table] as the bias itself
  void* dadditional_key;
  void* dadditional_value;

  // Scratch memory, of the size that the caller's plan asks for; null where it asks for none.
  float* workspace;
  int64_t workspace_size;  // in elements
};

}  // namespace jax_na
