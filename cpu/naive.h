// The naive kernels for one token and head. The fused kernels redo a tile with these when
// it meets a non-finite number, which must reach only the tokens that see it.
#pragma once

#include <cstdint>

#include "../ffi/problem.h"

namespace jax_na::cpu {

// `token` is a row-major index in the local query or key grid of sample `batch`.
void forward_naive_query(const ForwardCall& call, int64_t batch, int64_t token, int32_t head);
void backward_naive_query(const BackwardCall& call, int64_t batch, int64_t token, int32_t head);
void backward_naive_key(const BackwardCall& call, int64_t batch, int64_t token,
                        int32_t key_head);

}  // namespace jax_na::cpu
