// Element types: how they are stored, in what they are accumulated, and the conversions
// between the two. Everything here has internal linkage, because translation units are
// compiled for different instruction sets and must not share code.
#pragma once

#include <cstdint>
#include <cstring>

#include "../ffi/problem.h"

namespace jax_na::cpu {

struct F16 {
  using Storage = uint16_t;
  using Accum = float;
};
struct BF16 {
  using Storage = uint16_t;
  using Accum = float;
};
struct F32 {
  using Storage = float;
  using Accum = float;
};
struct F64 {
  using Storage = double;
  using Accum = double;
};

// Calls fn(Element{}) for the run-time type.
template <typename Fn>
static inline void with_element(ElementType type, const Fn& fn) {
  switch (type) {
    case ElementType::kF16:
      return fn(F16{});
    case ElementType::kBF16:
      return fn(BF16{});
    case ElementType::kF32:
      return fn(F32{});
    case ElementType::kF64:
      return fn(F64{});
  }
}

static inline int64_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::kF16:
    case ElementType::kBF16:
      return 2;
    case ElementType::kF32:
      return 4;
    case ElementType::kF64:
      return 8;
  }
  return 0;
}

template <typename To, typename From>
static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The four conversions below work on one number or on SIMD vectors of them: F is float or
// a vector of float, U the unsigned integer of the same shape, whose low 16 bits hold the
// half-precision pattern. They round to nearest even, keep infinities, quiet NaNs, and
// need no subnormal float32 (threads may flush those to zero).

template <typename F, typename U>
static inline F bf16_bits_to_f32(U bits) {
  return bit_cast<F>(bits << 16);
}

template <typename U, typename F>
static inline U f32_to_bf16_bits(F value) {
  const U u = bit_cast<U>(value);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U quiet_nan = (u >> 16) | 0x40u;
  return (u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <typename F, typename U>
static inline F f16_bits_to_f32(U bits) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  constexpr float kSmallestNormal = 6.103515625e-05f;  // 2^-14
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = (bits & 0x7fffu) << 13;
  const U normal = magnitude + kRebias;
  const U infinite_or_nan = normal + kRebias;
  // m * 2^-24, as the difference of two normal numbers.
  const U subnormal = bit_cast<U>(bit_cast<F>(normal + (1u << 23)) - kSmallestNormal);
  const U exponent = magnitude & (0x1fu << 23);
  const U wide = exponent == (0x1fu << 23) ? infinite_or_nan : normal;
  return bit_cast<F>((exponent == 0u ? subnormal : wide) | sign);
}

template <typename U, typename F>
static inline U f32_to_f16_bits(F value) {
  const U u = bit_cast<U>(value);
  const U sign = (u >> 16) & 0x8000u;
  const U magnitude = u & 0x7fffffffu;
  const U normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the subnormal's bits, rounded, at the low end of the mantissa.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - (126u << 23);
  const U zeros = u ^ u;
  const U finite = magnitude < (113u << 23) ? subnormal : normal;
  const U overflow = magnitude > 0x7f800000u ? zeros + 0x7e00u : zeros + 0x7c00u;
  return (magnitude >= (143u << 23) ? overflow : finite) | sign;
}

// One element at index i of a typed array.
template <typename E>
static inline typename E::Accum load_element(const void* array, int64_t i) {
  return static_cast<const typename E::Storage*>(array)[i];
}
template <>
inline float load_element<F16>(const void* array, int64_t i) {
  return f16_bits_to_f32<float>(uint32_t{static_cast<const uint16_t*>(array)[i]});
}
template <>
inline float load_element<BF16>(const void* array, int64_t i) {
  return bf16_bits_to_f32<float>(uint32_t{static_cast<const uint16_t*>(array)[i]});
}

template <typename E>
static inline void store_element(void* array, int64_t i, typename E::Accum value) {
  static_cast<typename E::Storage*>(array)[i] = value;
}
template <>
inline void store_element<F16>(void* array, int64_t i, float value) {
  static_cast<uint16_t*>(array)[i] = static_cast<uint16_t>(f32_to_f16_bits<uint32_t>(value));
}
template <>
inline void store_element<BF16>(void* array, int64_t i, float value) {
  static_cast<uint16_t*>(array)[i] = static_cast<uint16_t>(f32_to_bf16_bits<uint32_t>(value));
}

}  // namespace jax_na::cpu
