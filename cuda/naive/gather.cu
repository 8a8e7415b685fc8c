// Sums of the keys of every window, weighted slot by slot, by a group of lanes for each query.
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
    gather_kernel(const __grid_constant__ UnfusedCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kItems = kThreads / L::kLanes;  // of a block at a time

  const Problem& p = call.problem;
  const int lane = threadIdx.x % L::kLanes;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  const int64_t items = rows * L::slabs(p.head_dim);
  const int64_t window = call.window_size();

  for (int64_t item = int64_t(blockIdx.x) * kItems + threadIdx.x / L::kLanes; item < items;
       item += int64_t(gridDim.x) * kItems) {
    const int32_t slab = L::kWide ? static_cast<int32_t>(item / rows) : 0;
    const Row at = row_at(item - slab * rows, p.query_tokens(), p.heads);
    const int64_t row = query_row(p, at.batch, at.token, at.head);

    const T* weights = static_cast<const T*>(call.slots) + row * window;
    const T* keys = static_cast<const T*>(call.keys) +
                    key_row(p, at.batch, 0, key_head_of(p, at.head)) * p.head_dim;
    Accum sum[L::kElements];
    clear<L>(sum);
    SlotWalk walk(p, at.batch, position_of(at.token, p.query_grid));
    for (int64_t slot = 0; slot < window; ++slot, walk.next(p)) {
      const bool valid = walk.held();
      const T weight = valid ? __ldg(weights + slot) : T{};
      Fragment<L> key;
      key.load(keys + walk.key() * p.key_heads * p.head_dim, p.head_dim, slab, lane, valid);
      add_row<L>(widen(weight), key, sum);
    }
    store_result<L>(sum, call, call.queries, row, slab, lane);
  }
}

}  // namespace

cudaError_t gather_naive(const UnfusedCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned = aligned_for_vectors({call.queries, call.keys});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = block_count(rows * L::slabs(p.head_dim), kThreads / L::kLanes);
    gather_kernel<L><<<blocks, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
