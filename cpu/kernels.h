// The CPU kernels: plain C++, no XLA headers. ffi/ adapts XLA's calls and its thread pool.
#pragma once

#include <cstdint>
#include <functional>

#include "../ffi/problem.h"

namespace jax_na::cpu {

// Runs fn(i) for every i in [0, n), in any order and on any threads, and returns when all
// are done.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& fn)>;

// Every function writes every element of every output that is not null, accepts zero
// sizes, and gives bitwise equal results whatever the number of threads.

// One query, key or bias entry after the other, straight from the definition.
void forward_naive(const ForwardCall& call, const ParallelFor& parallel_for);
void backward_naive(const BackwardCall& call, const ParallelFor& parallel_for);

// Tiles of tokens, one token per SIMD lane; the instruction set is chosen at run time.
void forward_fused(const ForwardCall& call, const ParallelFor& parallel_for);
void backward_fused(const BackwardCall& call, const ParallelFor& parallel_for);

// The instruction set that the fused kernels use on this machine: "avx512", "avx2" or
// "baseline" (SSE2, NEON or whatever the compiler targets by default). The environment
// variable JAX_NA_CPU_ISA, read at the first call, names the widest one to use.
const char* fused_instruction_set();

}  // namespace jax_na::cpu
