// The parameters of the Hopper kernels, and the functions that launch them, one per unit.
#pragma once

#include <cuda_runtime_api.h>

#include "bias.cuh"
#include "sm90.h"
#include "tensor_map.h"
#include "tile.cuh"

namespace jax_na::cuda::sm90 {

// What the producers of a launch bring.
struct Streams {
  CUtensorMap row[2], column[2];
  CUtensorMap list[2];  // of additional keys and values
  int32_t dim[2];       // channels of a head in the first and in the second array
  Cut cut;
  Divisor group, key_heads;  // heads of rows per key head; key heads
  int32_t members;           // heads of columns per key head
  int32_t tiles;             // of all heads and samples
  // Pipelines below `step` begin with the tile of their own number. Where tiles are dealt out in
  // turn, the next one is so much further, in the same place of the grid if they stay; tiles from
  // `first_spare` on are dealt out to the other pipelines.
  int32_t step, first_spare;
  bool stays;
  // How many tiles were taken beyond the first of every pipeline; null where tiles are dealt out
  // in turn. And that of the next launch, to be cleared.
  int32_t* taken;
  int32_t* next_taken;
  BiasLayout bias;           // set by the launch of a kernel with a bias
};

struct ForwardPlan {
  Streams streams;
  ForwardCall call;
};
struct BackwardPlan {
  Streams streams;
  BackwardCall call;
};

struct GradientsPlan {
  Streams streams;
  BackwardCall call;
  CUtensorMap sums;  // of the gradient of queries, see sums.h
};

// Each launches the kernel that was compiled for the tiling's columns and groups;
// cudaErrorInvalidValue where there is none.
template <typename T, int kDim>
cudaError_t launch_forward(const ForwardPlan& plan, const HopperTiling& tiling,
                           cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_dquery(const BackwardPlan& plan, const HopperTiling& tiling,
                          cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_dkey_dvalue(const BackwardPlan& plan, const HopperTiling& tiling,
                               cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_gradients(const GradientsPlan& plan, const HopperTiling& tiling,
                             cudaStream_t stream);

}  // namespace jax_na::cuda::sm90
