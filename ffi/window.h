// The neighborhood window of one grid axis: which keys a query sees, and which
// queries see a key. The only statement of the formula in C++, shared by the CPU
// and the CUDA kernels; jax_na/_window.py is its twin in Python, and
// docs/window.md explains it with drawings.
//
// All positions are *global*: they count from the start of the whole grid, of which
// the local arrays may be a piece (a shard with a halo, a padded sample, a chunk of
// queries against a cache). An AxisFrame says where the piece lies.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_NA_INLINE __host__ __device__ __forceinline__
#else
#define JAX_NA_INLINE inline
#endif

namespace jax_na {

// The static parameters of one axis.
struct AxisWindow {
  int32_t kernel_size;
  int32_t stride;
  int32_t dilation;
  bool is_causal;
};

// Where the local query and key arrays lie on one axis of the global grid.
struct AxisFrame {
  int32_t length;  // of the global grid
  int32_t query_origin, query_length;
  int32_t key_origin, key_length;
};

// Local indices `first + dilation * t` for 0 <= t < count. `bias_row` is the row of
// the relative positional bias that belongs to t = 0; it grows by one with every t
// where the range holds the keys of a query, and shrinks by one where it holds the
// queries of a key.
struct AxisRange {
  int32_t first;
  int32_t count;
  int32_t bias_row;
};

// Of a >= 0. Most windows have neither stride nor dilation, and division is slow.
JAX_NA_INLINE int32_t quotient(int32_t a, int32_t b) { return b == 1 ? a : a / b; }

// C++ division truncates; indices before the start of the grid need the floor.
JAX_NA_INLINE int32_t floor_div(int32_t a, int32_t b) {
  if (b == 1) return a;
  const int32_t q = a / b;
  return q - (a % b != 0 && (a < 0) != (b < 0));
}

JAX_NA_INLINE int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
JAX_NA_INLINE int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

// A half-open interval of indices within one residue class modulo the dilation.
struct ClassInterval {
  int32_t begin, end;
};

// The keys [lo, hi) that query `p` of a class of `n` tokens sees.
JAX_NA_INLINE ClassInterval class_keys_of_query(const AxisWindow& w, int32_t p, int32_t n) {
  const int32_t k = w.kernel_size, s = w.stride;
  const int32_t base = quotient(p, s) * s;
  if (w.is_causal) {
    const int32_t leader = min_i32(base + s - 1, n - 1);
    return {max_i32(leader - k + 1, 0), p + 1};
  }
  const int32_t leader = min_i32(base + s / 2, n - 1);
  const int32_t lo = max_i32(0, min_i32(leader - k / 2, n - k));
  return {lo, min_i32(lo + k, n)};
}

// The queries [q0, q1) that see key `j` of a class of `n` tokens: always one interval.
JAX_NA_INLINE ClassInterval class_queries_of_key(const AxisWindow& w, int32_t j, int32_t n) {
  const int32_t k = w.kernel_size, s = w.stride;
  ClassInterval q;
  if (w.is_causal) {
    q.begin = j;
    q.end = j + k >= n ? n : quotient(j + k, s) * s;
  } else {
    q.begin = j < k ? 0 : floor_div(j - (k - 1 - k / 2) + (s - s / 2 - 1), s) * s;
    q.end = j >= n - k ? n : quotient(j + k / 2 + (s - s / 2), s) * s;
  }
  q.begin = max_i32(q.begin, 0);
  q.end = min_i32(q.end, n);
  return q;
}

// Clips the class interval to a local array that starts at `origin` and turns it into
// local indices; bias_row is left to the caller.
JAX_NA_INLINE AxisRange to_local(ClassInterval interval, int32_t residue, int32_t dilation,
                                 int32_t origin, int32_t length, int32_t* first_index) {
  // First and last class index whose local position lies in [0, length).
  const int32_t begin = max_i32(interval.begin, -floor_div(residue - origin, dilation));
  const int32_t end =
      min_i32(interval.end, floor_div(length - 1 - residue + origin, dilation) + 1);
  *first_index = begin;
  return {residue + dilation * begin - origin, max_i32(end - begin, 0), 0};
}

// Whether a local query belongs to the grid at all. One that does not gets out = 0 and
// lse = -inf, even where additional keys exist, and its cotangents are ignored.
JAX_NA_INLINE bool query_in_grid(const AxisFrame& f, int32_t query) {
  const int32_t i = f.query_origin + query;
  return i >= 0 && i < f.length;
}

// The local keys that local query `query` sees; empty for a query outside the grid.
JAX_NA_INLINE AxisRange keys_of_query(const AxisWindow& w, const AxisFrame& f, int32_t query) {
  const int32_t i = f.query_origin + query;
  if (i < 0 || i >= f.length) return {0, 0, 0};
  const int32_t p = quotient(i, w.dilation), residue = i - p * w.dilation;
  const int32_t n = quotient(f.length - residue + w.dilation - 1, w.dilation);
  int32_t first;
  AxisRange r = to_local(class_keys_of_query(w, p, n), residue, w.dilation, f.key_origin,
                         f.key_length, &first);
  r.bias_row = first - p + w.kernel_size - 1;
  return r;
}

// The bias row of the first key of a query's window, be it in the local array or not. Slot j
// of the window (jax_na.na_qk) belongs to bias row first_bias_row + j. Any number for a query
// outside the grid.
JAX_NA_INLINE int32_t first_bias_row(const AxisWindow& w, const AxisFrame& f, int32_t query) {
  const int32_t i = f.query_origin + query;
  if (i < 0 || i >= f.length) return 0;
  const int32_t p = quotient(i, w.dilation), residue = i - p * w.dilation;
  const int32_t n = quotient(f.length - residue + w.dilation - 1, w.dilation);
  return class_keys_of_query(w, p, n).begin - p + w.kernel_size - 1;
}

// The local queries that see local key `key`; empty for a key outside the grid.
JAX_NA_INLINE AxisRange queries_of_key(const AxisWindow& w, const AxisFrame& f, int32_t key) {
  const int32_t i = f.key_origin + key;
  if (i < 0 || i >= f.length) return {0, 0, 0};
  const int32_t j = quotient(i, w.dilation), residue = i - j * w.dilation;
  const int32_t n = quotient(f.length - residue + w.dilation - 1, w.dilation);
  int32_t first;
  AxisRange r = to_local(class_queries_of_key(w, j, n), residue, w.dilation, f.query_origin,
                         f.query_length, &first);
  r.bias_row = j - first + w.kernel_size - 1;
  return r;
}

}  // namespace jax_na
