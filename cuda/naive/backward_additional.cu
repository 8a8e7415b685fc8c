// The gradients of additional keys and values: a block for each row, because all queries
// see it. Its groups share the queries out among themselves and add up their sums.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../../ffi/problem.h"
#include "backward.cuh"
#include "layouts.cuh"
#include "rows.cuh"
#include "walk.cuh"

namespace jax_na::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kResidentBlocks = 2;  // on a multiprocessor; more would spill registers
constexpr int kRegisters = 8;       // of a row, in a lane

// Adds up the values of equal lanes of all groups of a block; the first group gets the
// sums. `partial`: shared memory.
template <class L>
__device__ __forceinline__ void sum_of_block(typename L::Accum (&values)[L::kElements],
                                             typename L::Accum (&partial)[kWarps][L::kSlab]) {
  const int warp = threadIdx.x / kWarpLanes, place = threadIdx.x % kWarpLanes;
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) values[e] = sum_of_groups<L>(values[e]);
  __syncthreads();  // all have read the sums of the call before
  if (place < L::kLanes) {
#pragma unroll
    for (int e = 0; e < L::kElements; ++e) partial[warp][e * L::kLanes + place] = values[e];
  }
  __syncthreads();
  if (threadIdx.x < L::kLanes) {
#pragma unroll
    for (int e = 0; e < L::kElements; ++e) {
      for (int w = 1; w < kWarps; ++w) values[e] += partial[w][e * L::kLanes + place];
    }
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_additional_kernel(const __grid_constant__ BackwardCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kGroups = kThreads / L::kLanes;
  __shared__ Accum partial[kWarps][L::kSlab];

  const Problem& p = call.problem;
  const Accum* lse_of_all = static_cast<const Accum*>(call.lse);
  const Accum* delta_of_all = static_cast<const Accum*>(call.delta);
  const Accum scale = static_cast<Accum>(p.scale);
  const int lane = threadIdx.x % L::kLanes;
  const int32_t group = p.heads / p.key_heads;  // of query heads that read one key head
  const int64_t rows = p.batch * p.additional * p.key_heads;
  const int64_t items = rows * L::slabs(max(p.head_dim, p.value_dim));

  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int32_t slab = L::kWide ? static_cast<int32_t>(item / rows) : 0;
    const Row at = row_at(item - slab * rows, p.additional, p.key_heads);
    const int64_t row = additional_row(p, at.batch, at.token, at.head);

    HeldRow<L> key, value;
    key.hold(static_cast<const T*>(call.in.additional_key) + row * p.head_dim, p.head_dim,
             lane, true);
    value.hold(static_cast<const T*>(call.in.additional_value) + row * p.value_dim,
               p.value_dim, lane, true);
    Accum dkey[L::kElements], dvalue[L::kElements];
    clear<L>(dkey);
    clear<L>(dvalue);

    for (int32_t g = 0; g < group; ++g) {
      const int32_t head = at.head * group + g;
      for (int64_t first = 0; first < p.query_tokens(); first += kGroups) {
        const int64_t token = first + threadIdx.x / L::kLanes;
        bool valid = token < p.query_tokens();
        if (valid && p.frame != nullptr) {
          valid = query_in_grid(p, at.batch, position_of(token, p.query_grid));
        }
        const int64_t query_index = query_row(p, at.batch, token, head);
        const T* query_at = static_cast<const T*>(call.in.query) + query_index * p.head_dim;
        const T* dout_at = static_cast<const T*>(call.dout) + query_index * p.value_dim;
        Fragment<L> query, dout;
        query.load(query_at, p.head_dim, slab, lane, valid);
        dout.load(dout_at, p.value_dim, slab, lane, valid);
        const Accum lse = valid ? __ldg(lse_of_all + query_index) : Accum(0);
        const Accum delta = valid ? __ldg(delta_of_all + query_index) : Accum(0);
        const Accum dot = group_sum<L>(key.dot(query, query_at, lane, valid));
        const Accum dweight = group_sum<L>(value.dot(dout, dout_at, lane, valid));
        const auto pair = pair_gradient(scale * dot, lse, dweight, delta, valid);
        add_row<L>(pair.dscore, query, dkey);
        add_row<L>(pair.weight, dout, dvalue);
      }
    }

    sum_of_block<L>(dkey, partial);
    sum_of_block<L>(dvalue, partial);
    if (threadIdx.x < L::kLanes && call.dadditional_key != nullptr) {
      store_row<L>(dkey, scale, static_cast<T*>(call.dadditional_key) + row * p.head_dim,
                   p.head_dim, slab, lane);
    }
    if (threadIdx.x < L::kLanes && call.dadditional_value != nullptr) {
      store_row<L>(dvalue, Accum(1),
                   static_cast<T*>(call.dadditional_value) + row * p.value_dim, p.value_dim,
                   slab, lane);
    }
  }
}

}  // namespace

cudaError_t backward_naive_additional(const BackwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const Inputs& in = call.in;
  const int64_t rows = p.batch * p.additional * p.key_heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned =
      aligned_for_vectors({in.query, in.additional_key, in.additional_value, call.dout,
                           call.dadditional_key, call.dadditional_value});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const int64_t items = rows * L::slabs(std::max(p.head_dim, p.value_dim));
    backward_additional_kernel<L><<<block_count(items, 1), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
