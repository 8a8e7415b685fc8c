// Blocks of columns on their way from the copy engine to the consumers: a ring of slots in shared
// memory, each with a barrier for "full" and one for "empty". Positions count all blocks that
// ever went through the ring.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace jax_na::cuda::sm90 {

template <int kSlots>
struct Ring {
  uint64_t full[kSlots], empty[kSlots];

  static __device__ __forceinline__ uint32_t slot(uint32_t position) { return position % kSlots; }
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

  // Producer: waits for the slot and announces `bytes`. Returns the barrier of the copies.
  __device__ __forceinline__ uint64_t* begin_copy(uint32_t position, uint32_t bytes) {
    const uint32_t at = slot(position);
    ptx::barrier_wait(&empty[at], parity(position) ^ 1);
    ptx::barrier_expect(&full[at], bytes);
    return &full[at];
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
