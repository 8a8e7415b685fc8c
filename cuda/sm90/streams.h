// The host's side of what producers bring: cuts of the grids and tensor maps.
#pragma once

#include <cuda_runtime_api.h>

#include "plans.cuh"
#include "variants.h"

namespace jax_na::cuda::sm90 {

// Two arrays of the same tokens: queries and output gradients, or keys and values.
struct TokenPair {
  const void* first;
  const void* second;  // may be null
};

// Whether kernels exist for the types and head dimensions of a problem.
bool supported(const Problem& p);

// Rows are queries, columns are keys and then additional keys.
cudaError_t make_query_streams(const Problem& p, const HopperTiling& tiling,
                               const TokenPair& queries, const Inputs& in, Streams* streams);

// Rows are keys, columns are the queries of every head of a group.
cudaError_t make_key_streams(const Problem& p, const HopperTiling& tiling, const Inputs& in,
                             const TokenPair& queries, Streams* streams);

// Deals out tiles to so many pipelines: as they come, or so that each stays in its place of the
// grid, if that is possible and takes no longer, and with its head, if `keeps_head`.
void deal_tiles(int32_t pipelines, Streams* streams);
void deal_tiles_in_place(const Problem& p, int32_t pipelines, bool keeps_head, Streams* streams);

template <typename T, int kPaddedDim>
struct TypeAndDim {
  using Type = T;
  static constexpr int kDim = kPaddedDim;
};

// Calls launch(TypeAndDim) for the element type and padded head dimension of a problem, which
// is one of kDims; cudaErrorInvalidValue if not.
template <int... kDims, class Launch>
cudaError_t with_type_and_dim(const Problem& p, const Launch& launch) {
  const auto with_type = [&](auto type) {
    cudaError_t status = cudaErrorInvalidValue;
    const auto attempt = [&](auto candidate) {
      if (decltype(candidate)::kDim == padded_dim(p)) status = launch(candidate);
    };
    (attempt(TypeAndDim<decltype(type), kDims>{}), ...);
    return status;
  };
  return p.element_type == ElementType::kBF16 ? with_type(__nv_bfloat16{})
                                              : with_type(__half{});
}

}  // namespace jax_na::cuda::sm90
