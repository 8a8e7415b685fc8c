// The PTX instructions of the Hopper kernels (sm_90a) beside those of cuda/ptx.cuh: barriers in
// shared memory, tensor copies (TMA), warpgroup registers. Products are in wgmma.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../ptx.cuh"

namespace jax_na::cuda::ptx {

// ---- mbarrier --------------------------------------------------------------------------

// mbarrier.init
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// fence.mbarrier_init: makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and has the phase wait for so many bytes.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity, until the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra passed;\n"
      "bra again;\n"
      "passed:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- Tensor copies ---------------------------------------------------------------------

// prefetch.tensormap: so that the first copy does not wait for the map.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.5d: a box from global to shared memory; completes on `barrier`. What
// lies outside the tensor becomes zeros.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int32_t channel, const int32_t (&at)[3],
                                         int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];\n" ::"r"(shared_address(to)),
      "l"(map), "r"(channel), "r"(at[2]), "r"(at[1]), "r"(at[0]), "r"(batch),
      "r"(shared_address(barrier))
      : "memory");
}

// fence.proxy.async: ordinary accesses of shared memory before, those of the tensor cores and
// of the copy engine after.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// stmatrix.x4: four 8x8 matrices of 16-bit elements, as load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b,
                                               uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                   address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// cp.reduce.async.bulk.tensor.5d.add: adds a box of floats in shared memory to one in global
// memory, in any order. The box may end outside the tensor but has to begin inside.
__device__ __forceinline__ void add_box(const CUtensorMap* map, uint32_t from, int32_t channel,
                                        const int32_t (&at)[3], int32_t batch) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group "
      "[%0, {%1, %2, %3, %4, %5}], [%6];\n" ::"l"(map),
      "r"(channel), "r"(at[2]), "r"(at[1]), "r"(at[0]), "r"(batch), "r"(from)
      : "memory");
}

// cp.async.bulk.commit_group and wait_group.read: the thread's additions so far have read their
// shared memory.
__device__ __forceinline__ void additions_commit() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ __forceinline__ void additions_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

// st.shared.v4.f32
__device__ __forceinline__ void store_shared(uint32_t address, float a, float b, float c,
                                             float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
}

// ld.shared.v2.f32
__device__ __forceinline__ float2 load_shared_64(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
               : "=f"(value.x), "=f"(value.y)
               : "r"(address));
  return value;
}

// st.global.v4.b32: a store that the compiler might take apart.
__device__ __forceinline__ void store_global(void* to, const uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(word[0]),
               "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// ---- Bits ------------------------------------------------------------------------------

// bmsk.clamp: bits [first, first + count), of which those above 31 are lost.
__device__ __forceinline__ uint32_t bit_run(uint32_t first, uint32_t count) {
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, %1, %2;\n" : "=r"(bits) : "r"(first), "r"(count));
  return bits;
}

// shf.r.wrap: the lowest bits become the highest ones; by `count` modulo 32.
__device__ __forceinline__ uint32_t rotate_right(uint32_t x, int32_t count) {
  return __funnelshift_r(x, x, count);
}

// prmt: every byte filled with its highest bit.
__device__ __forceinline__ uint32_t signs_of_bytes(uint32_t x) {
  uint32_t signs;
  asm("prmt.b32 %0, %1, %1, 0xba98;\n" : "=r"(signs) : "r"(x));
  return signs;
}

// rcp.approx.ftz
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- Warpgroups ------------------------------------------------------------------------

// bar.sync: waits for `threads` threads at the named barrier; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(name), "r"(threads) : "memory");
}

// bar.arrive: counts at the named barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(name), "r"(threads) : "memory");
}

// setmaxnreg: registers per thread of this warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace jax_na::cuda::ptx
