// What is compiled: columns of a score tile and consumer warpgroups per CTA, by padded head
// dimension. jax_na/_tiling.py holds the same table.
#pragma once

#include "../../ffi/problem.h"

namespace jax_na::cuda::sm90 {

struct Variant {
  int columns, groups;
};

template <int kDim>
struct Forward;
template <>
struct Forward<32> {
  static constexpr Variant kVariants[] = {{64, 1}, {96, 1}, {112, 1}, {128, 1}};
};
template <>
struct Forward<64> {
  static constexpr Variant kVariants[] = {{64, 1}, {80, 1}, {96, 1}, {112, 1}, {128, 1}, {128, 2}};
};
template <>
struct Forward<96> {
  static constexpr Variant kVariants[] = {{80, 2}, {128, 2}};
};
template <>
struct Forward<128> {
  static constexpr Variant kVariants[] = {{64, 3}, {80, 2}, {128, 2}, {144, 2}, {176, 2}};
};
template <>
struct Forward<192> {
  static constexpr Variant kVariants[] = {{80, 2}};
};
template <>
struct Forward<256> {
  static constexpr Variant kVariants[] = {{48, 2}};
};

// Head and value dimensions are padded to one of these; 0 where they are too large.
inline int padded_dim(const Problem& p) {
  const int dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  for (const int padded : {32, 64, 96, 128, 192, 256}) {
    if (dim <= padded) return padded;
  }
  return 0;
}

}  // namespace jax_na::cuda::sm90
