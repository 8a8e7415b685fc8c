// SIMD vectors of JAX_NA_VECTOR_BYTES bytes, written with the vector extensions of GCC and
// Clang: the same source serves AVX-512, AVX2, SSE2 and NEON.
//
// Each translation unit that includes this header defines JAX_NA_VECTOR_BYTES and is
// compiled for its own instruction set, so everything has internal linkage: a function
// that the linker could share would smuggle instructions into another unit.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "elements.h"

#ifndef JAX_NA_VECTOR_BYTES
#error "define JAX_NA_VECTOR_BYTES before including simd.h"
#endif

namespace jax_na::cpu {
namespace {

template <typename T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Real __attribute__((vector_size(JAX_NA_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(JAX_NA_VECTOR_BYTES)));
  typedef uint32_t UInt __attribute__((vector_size(JAX_NA_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(JAX_NA_VECTOR_BYTES / 2)));
  using IntLane = int32_t;
};
template <>
struct VectorTypes<double> {
  typedef double Real __attribute__((vector_size(JAX_NA_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(JAX_NA_VECTOR_BYTES)));
  typedef uint64_t UInt __attribute__((vector_size(JAX_NA_VECTOR_BYTES)));
  using IntLane = int64_t;
};

template <typename T>
using Vec = typename VectorTypes<T>::Real;
template <typename T>
using IntVec = typename VectorTypes<T>::Int;
template <typename T>
using UIntVec = typename VectorTypes<T>::UInt;
template <typename T>
using IntLane = typename VectorTypes<T>::IntLane;

template <typename T>
constexpr int kWidth = JAX_NA_VECTOR_BYTES / sizeof(T);

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void store(T* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}

// Every lane x. (x - 0 is x, signed zeros included, and costs nothing.)
template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <typename T>
inline IntVec<T> splat_int(IntLane<T> x) {
  return x - IntVec<T>{};
}

// 2^x by x = n + r with n an integer and |r| <= 1/2. Below 2^-126 (2^-1022) the result
// is 0; x must lie below 127 (1023). NaN stays NaN, and integers give exact powers. For
// float a minimax polynomial of degree 6 (relative error 2.5e-9 before rounding), for
// double the Taylor series of degree 13.
template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kSmallest = -126;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  static constexpr uint32_t kExponentBias = 127, kMantissaBits = 23;
  static constexpr float kCoefficients[] = {1.0f,
                                            0.6931472067f,
                                            0.2402265092f,
                                            0.05550327227f,
                                            0.009618056679f,
                                            0.001340042818f,
                                            0.0001546144469f};
};
template <>
struct Exp2<double> {
  static constexpr double kSmallest = -1022;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr uint64_t kExponentBias = 1023, kMantissaBits = 52;
  static constexpr double kCoefficients[] = {  // ln(2)^i / i!
      1.0,
      0.6931471805599453,
      0.2402265069591007,
      0.055504108664821576,
      0.009618129107628477,
      0.0013333558146428441,
      0.00015403530393381606,
      1.5252733804059838e-05,
      1.3215486790144305e-06,
      1.0178086009239696e-07,
      7.054911620801121e-09,
      4.44553827187081e-10,
      2.5678435993488196e-11,
      1.3691488853904124e-12};
};

template <typename T>
inline Vec<T> exp2(Vec<T> x) {
  using E = Exp2<T>;
  constexpr int kDegree = sizeof(E::kCoefficients) / sizeof(T) - 1;
  const Vec<T> shifted = x + E::kRound;
  const Vec<T> r = x - (shifted - E::kRound);
  Vec<T> poly = splat<T>(E::kCoefficients[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) poly = poly * r + E::kCoefficients[i];
  const UIntVec<T> n = bit_cast<UIntVec<T>>(shifted) + E::kExponentBias;
  const Vec<T> result = poly * bit_cast<Vec<T>>(n << E::kMantissaBits);
  return x < E::kSmallest ? Vec<T>{} : result;
}

// The lower (upper) halves of a and b, interleaved.
template <typename T, int kFirst, int... kLane>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b, (kFirst + kLane / 2 + (kLane % 2) * static_cast<int>(sizeof...(kLane)))...);
}

// Transposes a square of kWidth rows: log2(kWidth) perfect shuffles.
template <typename T>
inline void transpose(Vec<T>* rows) {
  constexpr int kN = kWidth<T>;
  constexpr auto kLanes = std::make_integer_sequence<int, kN>();
#pragma GCC unroll 8
  for (int round = 1; round < kN; round *= 2) {
    Vec<T> shuffled[kN];
#pragma GCC unroll 16
    for (int i = 0; i < kN / 2; ++i) {
      shuffled[2 * i] = interleave<T, 0>(rows[i], rows[i + kN / 2], kLanes);
      shuffled[2 * i + 1] = interleave<T, kN / 2>(rows[i], rows[i + kN / 2], kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) rows[i] = shuffled[i];
  }
}

// A vector from kWidth stored elements, and back.
template <typename E>
inline Vec<typename E::Accum> load_vector(const typename E::Storage* p) {
  using T = typename E::Accum;
  if constexpr (sizeof(typename E::Storage) == 2) {
    const auto half = load<typename VectorTypes<T>::Half>(p);
    const UIntVec<T> bits = __builtin_convertvector(half, UIntVec<T>);
    if constexpr (std::is_same_v<E, F16>) {
      return f16_bits_to_f32<Vec<T>>(bits);
    } else {
      return bf16_bits_to_f32<Vec<T>>(bits);
    }
  } else {
    return load<Vec<T>>(p);
  }
}

template <typename E>
inline void store_vector(typename E::Storage* p, Vec<typename E::Accum> v) {
  using T = typename E::Accum;
  if constexpr (sizeof(typename E::Storage) == 2) {
    UIntVec<T> bits;
    if constexpr (std::is_same_v<E, F16>) {
      bits = f32_to_f16_bits<UIntVec<T>>(v);
    } else {
      bits = f32_to_bf16_bits<UIntVec<T>>(v);
    }
    store(p, __builtin_convertvector(bits, typename VectorTypes<T>::Half));
  } else {
    store(p, v);
  }
}

// The same for the first n < kWidth elements; the other lanes are 0.
template <typename E>
inline Vec<typename E::Accum> load_part(const typename E::Storage* p, int n) {
  typename E::Storage buffer[kWidth<typename E::Accum>] = {};
  std::memcpy(buffer, p, n * sizeof(*p));
  return load_vector<E>(buffer);
}

template <typename E>
inline void store_part(typename E::Storage* p, Vec<typename E::Accum> v, int n) {
  typename E::Storage buffer[kWidth<typename E::Accum>];
  store_vector<E>(buffer, v);
  std::memcpy(p, buffer, n * sizeof(*p));
}

}  // namespace
}  // namespace jax_na::cpu
