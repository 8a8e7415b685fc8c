// What delta is a sum of.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jax_na::cuda::fused {

// What 16 bytes of two arrays contribute to their dot product.
template <typename T>
__device__ __forceinline__ float unit_dot(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      sum += __uint_as_float(x[i]) * __uint_as_float(y[i]);
    } else {
      float2 p, q;
      if constexpr (std::is_same_v<T, __half>) {
        p = __half22float2(reinterpret_cast<const __half2&>(x[i]));
        q = __half22float2(reinterpret_cast<const __half2&>(y[i]));
      } else {
        p = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x[i]));
        q = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(y[i]));
      }
      sum += p.x * q.x + p.y * q.y;
    }
  }
  return sum;
}

}  // namespace jax_na::cuda::fused
