// Weights on their way from the warp that makes them to another one with the same rows.
#pragma once

#include <cuda_fp16.h>

#include "gemm.cuh"
#include "geometry.cuh"

namespace jax_na::cuda::fused {

// One lane writes what the same lane of the other warp reads, whatever the layout of a product.
// In float16, since weights are at most 1: rounded to bfloat16, they would add as large an error
// to dS as its own rounding does.
template <int kMTiles, int kNTiles>
struct WeightExchange {
  static_assert(kNTiles % 2 == 0);
  alignas(16) uint4 at[kMTiles][kNTiles / 2][kWarpLanes];

  __device__ __forceinline__ void put(const Accumulator (&weights)[kMTiles][kNTiles]) {
    for_each_pair([&](int m, int n, uint4& words) {
      const Accumulator &left = weights[m][n], &right = weights[m][n + 1];
      words = make_uint4(pack<__half>(left[0], left[1]), pack<__half>(left[2], left[3]),
                         pack<__half>(right[0], right[1]), pack<__half>(right[2], right[3]));
    });
  }

  // d *= weights
  __device__ __forceinline__ void multiply(Accumulator (&d)[kMTiles][kNTiles]) {
    for_each_pair([&](int m, int n, const uint4& packed) {
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 weight = __half22float2(reinterpret_cast<const __half2&>(words[w]));
        d[m][n + w / 2][w % 2 * 2] *= weight.x;
        d[m][n + w / 2][w % 2 * 2 + 1] *= weight.y;
      }
    });
  }

 private:
  template <class Fn>
  __device__ __forceinline__ void for_each_pair(const Fn& fn) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kNTiles / 2; ++j) fn(m, 2 * j, at[m][j][lane]);
    }
  }
};

}  // namespace jax_na::cuda::fused
