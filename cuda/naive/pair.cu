// Products of every query and the keys of its window, by a group of lanes for each query.
#include <cuda_runtime.h>

#include <cstdint>

#include "../unfused.h"
#include "layouts.cuh"
#include "rows.cuh"
#include "slots.cuh"
#include "walk.cuh"

namespace jax_na::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRegisters = 16;  // of a row, in a lane

template <class L>
__global__ void __launch_bounds__(kThreads)
    pair_kernel(const __grid_constant__ UnfusedCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kItems = kThreads / L::kLanes;  // of a block at a time

  const Problem& p = call.problem;
  const int lane = threadIdx.x % L::kLanes;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  const int64_t window = call.window_size();

  for (int64_t first = int64_t(blockIdx.x) * kItems; first < rows;
       first += int64_t(gridDim.x) * kItems) {
    const int64_t item = first + threadIdx.x / L::kLanes;
    const bool exists = item < rows;
    const Row at = row_at(exists ? item : 0, p.query_tokens(), p.heads);
    const int64_t row = query_row(p, at.batch, at.token, at.head);

    HeldRow<L> query;
    query.hold(static_cast<const T*>(call.queries) + row * p.head_dim, p.head_dim, lane, exists);
    const T* keys = static_cast<const T*>(call.keys) +
                    key_row(p, at.batch, 0, key_head_of(p, at.head)) * p.head_dim;
    SlotWalk walk(p, at.batch, position_of(at.token, p.query_grid));
    for (int64_t slot = 0; slot < window; ++slot, walk.next(p)) {
      const bool valid = exists && walk.held();
      const T* key_at = keys + walk.key() * p.key_heads * p.head_dim;
      Fragment<L> key;
      if constexpr (!L::kWide) key.load(key_at, p.head_dim, 0, lane, valid);
      const Accum dot = group_sum<L>(query.dot(key, key_at, lane, valid));
      if (!exists || lane != 0) continue;
      const Accum product = valid ? dot : Accum(0);
      if (call.wide_result) {
        static_cast<Accum*>(call.slots)[row * window + slot] = product;
      } else {
        static_cast<T*>(call.slots)[row * window + slot] = narrow<T>(product);
      }
    }
  }
}

}  // namespace

cudaError_t pair_naive(const UnfusedCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned = aligned_for_vectors({call.queries, call.keys});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    pair_kernel<L><<<block_count(rows, kThreads / L::kLanes), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
