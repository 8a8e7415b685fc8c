// Blocks of columns on their way from the copy engine to the consumers: a ring of slots in
// shared memory, each with a barrier for "full" and one for "empty". Positions count all blocks
// that ever went through the ring.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace jax_na::cuda::sm90 {

template <int kSlots>
struct Ring {
  uint64_t full[kSlots], empty[kSlots];

  static __device__ __forceinline__ uint32_t slot(uint32_t position) {
    return position % kSlots;
  }
  static __device__ __forceinline__ uint32_t parity(uint32_t position) {
    return position / kSlots % 2;
  }

  // `consumers` is the number of arrivals that empty a slot.
  __device__ __forceinline__ void init(int consumers) {
    for (int i = 0; i < kSlots; ++i) {
      ptx::barrier_init(&full[i], 1);
      ptx::barrier_init(&empty[i], consumers);
    }
  }

  // Producer. `expect` announces `bytes` and returns the barrier of their copies.
  __device__ __forceinline__ void wait_empty(uint32_t position) {
    ptx::barrier_wait(&empty[slot(position)], parity(position) ^ 1);
  }
  __device__ __forceinline__ uint64_t* expect(uint32_t position, uint32_t bytes) {
    uint64_t* barrier = &full[slot(position)];
    ptx::barrier_expect(barrier, bytes);
    return barrier;
  }

  // Consumers.
  __device__ __forceinline__ void wait(uint32_t position) {
    ptx::barrier_wait(&full[slot(position)], parity(position));
  }
  __device__ __forceinline__ void release(uint32_t position) {
    ptx::barrier_arrive(&empty[slot(position)]);
  }
};

}  // namespace jax_na::cuda::sm90
