// The parameters of the kernels, and the functions that launch them, one per compiled unit.
#pragma once

#include <cuda_runtime_api.h>

#include "geometry.cuh"

namespace jax_na::cuda::fused {

// How float32 is multiplied; half precision has one way.
enum class Precision {
  kDefault,  // TF32
  kHighest,  // three TF32 products: both operands are split in two TF32 numbers
};

struct ForwardPlan {
  ForwardCall call;
  TileGrid rows;
  ColumnBox columns;
  Divisor group, key_heads;
};

// For dQ and dbias the rows are queries; for dK and dV they are keys or, with a problem in
// which these are the key grid, additional keys.
struct BackwardPlan {
  BackwardCall call;
  TileGrid rows;
  ColumnBox columns;
  Divisor group, key_heads, one;

  // dbias: `bias_splits` CTAs share the visits of one table, and put what they find in
  // [bias_splits, tables, bias_size].
  int32_t bias_splits;
  int64_t tables;
  float* bias_partials;
  BoxOrder boxes;      // of a tile, the most that one has on every axis
  BoxOrder distances;  // of a column in its box from a row in its tile, counted from the least

  // Additional keys: `column_splits` CTAs share the queries of one tile and put what they
  // find in [column_splits, *shape of the gradient]; with one the gradient is final.
  int32_t column_splits;
  float* dkey_partials;
  float* dvalue_partials;
};

template <typename T, int kDim, int kRows, Precision kPrecision>
cudaError_t launch_forward(const ForwardPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_dquery(const BackwardPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_dbias(const BackwardPlan& plan, cudaStream_t stream);

template <typename T, int kDim, Precision kPrecision>
cudaError_t launch_dkey_dvalue(const BackwardPlan& plan, Side rows, cudaStream_t stream);

}  // namespace jax_na::cuda::fused
