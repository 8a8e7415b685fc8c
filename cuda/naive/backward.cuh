// The backward pass, a kernel for each kind of output. All are gather kernels: a group of
// lanes or a block owns an output row or entry and sums over the pairs of a query and a key
// that it depends on, in an order that depends on nothing but the problem.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../ffi/problem.h"
#include "rows.cuh"

namespace jax_na::cuda {

// Each launches the kernel for its outputs, of which at least one is not null.
cudaError_t backward_naive_query(const BackwardCall& call, cudaStream_t stream);
cudaError_t backward_naive_key(const BackwardCall& call, cudaStream_t stream);
cudaError_t backward_naive_additional(const BackwardCall& call, cudaStream_t stream);
cudaError_t backward_naive_bias(const BackwardCall& call, cudaStream_t stream);

// Of one query and one key.
template <typename Accum>
struct PairGradient {
  Accum weight;  // P, the softmax weight
  Accum dscore;  // gradient of the score, after scaling
};

// `dweight` is dout . value. Where the pair is not `valid`, any argument may be garbage.
template <typename Accum>
__device__ __forceinline__ PairGradient<Accum> pair_gradient(Accum score, Accum lse,
                                                             Accum dweight, Accum delta,
                                                             bool valid) {
  const bool seen = valid && lse != -kInfinity<Accum>;
  const Accum weight = seen ? exp_weight(score - lse) : Accum(0);
  return {weight, seen ? weight * (dweight - delta) : Accum(0)};
}

}  // namespace jax_na::cuda
