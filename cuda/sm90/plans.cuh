// The parameters of the Hopper kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_map.h"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

struct ForwardPlan {
  CUtensorMap query, key, value, additional_key, additional_value;
  ForwardCall call;
  Cut cut;
  Divisor group, key_heads;  // query heads per key head; key heads
  int32_t tiles;             // of all heads and samples
};

// Launches the kernel that was compiled for these columns and groups; cudaErrorInvalidValue where
// there is none.
template <typename T, int kDim>
cudaError_t launch_forward(const ForwardPlan& plan, int columns, int groups,
                           cudaStream_t stream);

}  // namespace jax_na::cuda::sm90
