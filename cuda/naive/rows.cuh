// Rows of head_dim or value_dim elements, each worked on by a group of neighbouring lanes
// of a warp. All lanes of a warp go through the same steps, with nothing to do where a
// group has come to its end: shuffles and votes always involve the whole warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace jax_na::cuda {

constexpr int kWarpLanes = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename Accum>
constexpr Accum kInfinity = std::numeric_limits<Accum>::infinity();

// In what an element type is accumulated.
template <typename T>
using AccumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <typename T>
__device__ __forceinline__ T narrow(AccumOf<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// exp for softmax weights: of differences, so that the argument is small wherever the
// result matters, and the fast float version is as good as the slow one.
__device__ __forceinline__ float exp_weight(float x) { return __expf(x); }
__device__ __forceinline__ double exp_weight(double x) { return exp(x); }

// How a row lies in the registers of a group of `kLanes` lanes. A lane holds `kLoads`
// vectors of `kVector` elements; neighbouring lanes hold neighbouring vectors. That makes
// a slab of kSlab elements. Rows are one slab, or, where `kWide`, any number of them: then
// a dot product reads both of its rows anew, and every slab of an output is work of its
// own.
template <typename Element_, int kVector_, int kLoads_, int kLanes_, bool kWide_>
struct RowLayout {
  using Element = Element_;
  using Accum = AccumOf<Element_>;
  static constexpr int kVector = kVector_;
  static constexpr int kLoads = kLoads_;
  static constexpr int kLanes = kLanes_;
  static constexpr bool kWide = kWide_;
  static constexpr int kElements = kVector * kLoads;
  static constexpr int kSlab = kElements * kLanes;
  static_assert(kVector == 1 || kVector * sizeof(Element) == 16);

  // Where in a slab the vector lies that `lane` of the group loads.
  static __device__ __forceinline__ int32_t index(int lane, int load) {
    return (load * kLanes + lane) * kVector;
  }
  static __host__ __device__ __forceinline__ int32_t slabs(int32_t dim) {
    return kWide ? (dim - 1) / kSlab + 1 : 1;
  }
};

// A lane's part of one slab of a row, as it lies in memory.
template <class L>
struct Fragment {
  using Element = typename L::Element;
  using Accum = typename L::Accum;
  using Vector = std::conditional_t<L::kVector == 1, Element, uint4>;

  Vector vector[L::kLoads];

  // Zeros past the end of the row, and everywhere where the row is not `valid`.
  __device__ __forceinline__ void load(const Element* row, int32_t dim, int32_t slab, int lane,
                                       bool valid) {
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
      const int32_t i = slab * L::kSlab + L::index(lane, load);
      vector[load] = valid && i < dim ? __ldg(reinterpret_cast<const Vector*>(row + i)) : Vector{};
    }
  }

  __device__ __forceinline__ void widen_to(Accum (&values)[L::kElements]) const {
#pragma unroll
    for (int load = 0; load < L::kLoads; ++load) {
      Element elements[L::kVector];
      memcpy(elements, &vector[load], sizeof(elements));
#pragma unroll
      for (int i = 0; i < L::kVector; ++i) values[load * L::kVector + i] = widen(elements[i]);
    }
  }
};

template <class L>
__device__ __forceinline__ void clear(typename L::Accum (&values)[L::kElements]) {
#pragma unroll
  for (int i = 0; i < L::kElements; ++i) values[i] = 0;
}

// sum += weight * row
template <class L>
__device__ __forceinline__ void add_row(typename L::Accum weight, const Fragment<L>& row,
                                        typename L::Accum (&sum)[L::kElements]) {
  typename L::Accum values[L::kElements];
  row.widen_to(values);
#pragma unroll
  for (int i = 0; i < L::kElements; ++i) sum[i] += weight * values[i];
}

// row = factor * values
template <class L>
__device__ __forceinline__ void store_row(const typename L::Accum (&values)[L::kElements],
                                          typename L::Accum factor, typename L::Element* row,
                                          int32_t dim, int32_t slab, int lane) {
  using Vector = typename Fragment<L>::Vector;
#pragma unroll
  for (int load = 0; load < L::kLoads; ++load) {
    const int32_t i = slab * L::kSlab + L::index(lane, load);
    typename L::Element elements[L::kVector];
#pragma unroll
    for (int e = 0; e < L::kVector; ++e) {
      elements[e] = narrow<typename L::Element>(factor * values[load * L::kVector + e]);
    }
    Vector vector;
    memcpy(&vector, elements, sizeof(vector));
    if (i < dim) *reinterpret_cast<Vector*>(row + i) = vector;
  }
}

// The sum over the lanes of a group, bit for bit the same in all of them.
template <class L>
__device__ __forceinline__ typename L::Accum group_sum(typename L::Accum x) {
#pragma unroll
  for (int offset = L::kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

// The same over equal lanes of all groups of a warp.
template <class L>
__device__ __forceinline__ typename L::Accum sum_of_groups(typename L::Accum x) {
#pragma unroll
  for (int offset = kWarpLanes / 2; offset >= L::kLanes; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

// A lane's part of the dot product of values in registers and a row.
template <class L>
__device__ __forceinline__ typename L::Accum lane_dot(
    const typename L::Accum (&values)[L::kElements], const Fragment<L>& row) {
  typename L::Accum other[L::kElements], sum = 0;
  row.widen_to(other);
#pragma unroll
  for (int i = 0; i < L::kElements; ++i) sum += values[i] * other[i];
  return sum;
}

// The same of two rows in memory.
template <class L>
__device__ __forceinline__ typename L::Accum lane_dot(const typename L::Element* a,
                                                      const typename L::Element* b, int32_t dim,
                                                      int lane, bool valid) {
  typename L::Accum sum = 0;
#pragma unroll 1
  for (int32_t slab = 0; slab < L::slabs(dim); ++slab) {
    Fragment<L> fragment_a, fragment_b;
    fragment_a.load(a, dim, slab, lane, valid);
    fragment_b.load(b, dim, slab, lane, valid);
    typename L::Accum values[L::kElements];
    fragment_a.widen_to(values);
    sum += lane_dot<L>(values, fragment_b);
  }
  return sum;
}

// A row that many others are multiplied with: it stays in registers, unless it is wide.
template <class L>
struct HeldRow {
  using Element = typename L::Element;
  using Accum = typename L::Accum;

  const Element* row;
  int32_t dim;
  Accum values[L::kWide ? 1 : L::kElements];

  __device__ __forceinline__ void hold(const Element* held, int32_t held_dim, int lane,
                                       bool valid) {
    row = held;
    dim = held_dim;
    if constexpr (!L::kWide) {
      Fragment<L> fragment;
      fragment.load(row, dim, 0, lane, valid);
      fragment.widen_to(values);
    }
  }

  // This lane's part of the dot product with another row. Unless rows are wide, the caller
  // has loaded that already, as `fragment`.
  __device__ __forceinline__ Accum dot(const Fragment<L>& fragment, const Element* other,
                                       int lane, bool valid) const {
    if constexpr (L::kWide) {
      return lane_dot<L>(row, other, dim, lane, valid);
    } else {
      return lane_dot<L>(values, fragment);
    }
  }
};

}  // namespace jax_na::cuda
