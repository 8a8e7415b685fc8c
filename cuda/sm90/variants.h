// What is compiled, by padded head dimension: columns of a score tile, consumer warpgroups that
// share a pipeline, pipelines of a CTA. jax_na/_tiling_sm90.py holds the same table.
#pragma once

#include "../../ffi/problem.h"

namespace jax_na::cuda::sm90 {

struct Variant {
  int columns, groups, pipelines;
};

// Entries of the tables of relative positional bias that a CTA holds at once: one table for
// queries, one per head of the group for keys.
constexpr int kLargestBias = 512;

// Entries for tables with which scores begin, among zeros (see bias.cuh).
template <int kDim>
constexpr int kBiasEntries = kDim <= 32 ? 1024 : 512;

template <int kDim>
struct Forward;
template <>
struct Forward<32> {
  static constexpr Variant kList[] = {{64, 1, 4}, {112, 1, 3}};
};
template <>
struct Forward<64> {
  static constexpr Variant kList[] = {{64, 1, 3}, {80, 1, 3}, {96, 1, 3}, {112, 1, 3}};
};
template <>
struct Forward<96> {
  static constexpr Variant kList[] = {{80, 2, 1}, {128, 2, 1}};
};
template <>
struct Forward<128> {
  static constexpr Variant kList[] = {{80, 2, 1}, {128, 2, 1}};
};
template <>
struct Forward<192> {
  static constexpr Variant kList[] = {{64, 2, 1}};
};
template <>
struct Forward<256> {
  static constexpr Variant kList[] = {{48, 2, 1}};
};

template <int kDim>
struct DQuery;
template <>
struct DQuery<32> {
  static constexpr Variant kList[] = {{64, 1, 3}, {80, 1, 3}};
};
template <>
struct DQuery<64> {
  static constexpr Variant kList[] = {{80, 1, 2}, {96, 1, 2}};
};
template <>
struct DQuery<96> {
  static constexpr Variant kList[] = {{64, 2, 1}};
};
template <>
struct DQuery<128> {
  static constexpr Variant kList[] = {{64, 2, 1}};
};

template <int kDim>
struct DKey;
template <>
struct DKey<32> {
  static constexpr Variant kList[] = {{64, 1, 3}};
};
template <>
struct DKey<64> {
  static constexpr Variant kList[] = {{48, 1, 3}, {80, 1, 2}};
};
template <>
struct DKey<96> {
  static constexpr Variant kList[] = {{64, 2, 1}};
};
template <>
struct DKey<128> {
  static constexpr Variant kList[] = {{64, 2, 1}};
};

template <int kDim>
struct Gradients;
template <>
struct Gradients<32> {
  static constexpr Variant kList[] = {{64, 1, 3}};
};
template <>
struct Gradients<64> {
  static constexpr Variant kList[] = {{64, 1, 2}, {64, 2, 1}};
};
template <>
struct Gradients<128> {
  static constexpr Variant kList[] = {{64, 2, 1}};
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
