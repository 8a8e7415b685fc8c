// The CUDA kernels: plain CUDA C++, no XLA headers. ffi/ adapts XLA's calls.
#pragma once

#include <cuda_runtime_api.h>

#include "../ffi/problem.h"

namespace jax_na::cuda {

// Every function launches on the given stream and returns at once with the status of its
// launches; it allocates nothing, waits for nothing and keeps no state, so that it can be
// captured in a CUDA graph. It writes every element of every output that is not null and
// accepts zero sizes. All pointers in a call are device memory.

// A few lanes of a warp per query or key, a block per bias entry or additional key, without
// tensor cores. Every type, shape and feature; bitwise equal results in every run.
cudaError_t forward_naive(const ForwardCall& call, cudaStream_t stream);
cudaError_t backward_naive(const BackwardCall& call, cudaStream_t stream);

}  // namespace jax_na::cuda
