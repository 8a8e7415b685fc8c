// One row of delta.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "geometry.cuh"

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

// delta of a row, by kLanes neighbouring lanes of which each gets it; all lanes of the warp
// call it.
template <typename T, int kLanes>
__device__ __forceinline__ float row_delta(const BackwardCall& call, int64_t row, bool exists) {
  const int units = call.problem.value_dim * int{sizeof(T)} / int{sizeof(uint4)};
  const auto* dout = static_cast<const uint4*>(call.dout) + row * units;
  const auto* out = static_cast<const uint4*>(call.out) + row * units;
  float sum = 0;
  if (exists) {
#pragma unroll 2
    for (int unit = threadIdx.x % kLanes; unit < units; unit += kLanes) {
      sum += unit_dot<T>(__ldg(dout + unit), __ldg(out + unit));
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  }
  if (exists && call.dlse != nullptr) sum -= static_cast<const float*>(call.dlse)[row];
  return sum;
}

}  // namespace jax_na::cuda::fused
