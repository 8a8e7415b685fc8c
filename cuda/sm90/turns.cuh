// Turns of warpgroups that share a pipeline.
#pragma once

#include "ptx.cuh"
#include "wgmma.cuh"

namespace jax_na::cuda::sm90 {

// Warpgroups take turns in giving work to the tensor cores, so that one does its elementwise part
// while another's products run. Every warpgroup has one turn per box, whether it sees it or not.
template <int kGroups>
struct Turns {
  static constexpr bool kTaken = kGroups == 2;
  static constexpr int kFirstName = 1 + kGroups;  // barriers of single warpgroups come before
  int group;

  __device__ __forceinline__ explicit Turns(int group) : group(group) {
    if constexpr (kTaken) {
      for (int g = 0; g < group; ++g) arrive(g);
    }
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kTaken) {
      ptx::named_barrier(kFirstName + group, kGroups * kGroupThreads);
    }
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (kTaken) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (g != group) arrive(g);
      }
    }
  }
  // The turn of a box that the warpgroup does not see.
  __device__ __forceinline__ void skip() const {
    wait();
    pass();
  }

 private:
  __device__ __forceinline__ void arrive(int g) const {
    ptx::named_barrier_arrive(kFirstName + g, kGroups * kGroupThreads);
  }
};

}  // namespace jax_na::cuda::sm90
