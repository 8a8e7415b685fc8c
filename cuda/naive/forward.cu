// Attention of every query, by a group of lanes for each: an online softmax over the keys
// of its window, then over the additional ones.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../kernels.h"
#include "layouts.cuh"
#include "rows.cuh"
#include "walk.cuh"

namespace jax_na::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kResidentBlocks = 4;  // on a multiprocessor; more would spill registers
constexpr int kRegisters = 16;      // of a row, in a lane

template <class L>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    forward_kernel(const __grid_constant__ ForwardCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kItems = kThreads / L::kLanes;  // of a block at a time

  const Problem& p = call.problem;
  const Accum scale = static_cast<Accum>(p.scale);
  const int lane = threadIdx.x % L::kLanes;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  const int64_t items = rows * L::slabs(p.value_dim);

  for (int64_t first = int64_t(blockIdx.x) * kItems; first < items;
       first += int64_t(gridDim.x) * kItems) {
    const int64_t item = first + threadIdx.x / L::kLanes;
    const bool exists = item < items;
    const int32_t slab = L::kWide && exists ? static_cast<int32_t>(item / rows) : 0;
    const Row at = row_at(exists ? item - slab * rows : 0, p.query_tokens(), p.heads);
    const Position position = position_of(at.token, p.query_grid);
    const bool active = exists && query_in_grid(p, at.batch, position);
    const int64_t row = query_row(p, at.batch, at.token, at.head);

    HeldRow<L> query;
    query.hold(static_cast<const T*>(call.in.query) + row * p.head_dim, p.head_dim, lane,
               active);
    Accum largest = -kInfinity<Accum>, total = 0;
    Accum sum[L::kElements];
    clear<L>(sum);

#pragma unroll 1
    for (int set = 0; set < (p.additional > 0 ? 2 : 1); ++set) {
      auto keys = set == 0 ? KeySet<T>::window(p, call.in, at, position, active)
                           : KeySet<T>::additional(p, call.in, at, active);
      for (; __any_sync(kFullWarp, keys.more()); keys.next_line(p)) {
        KeyLine<T> line = keys.line(p);
        for (int32_t i = 0; __any_sync(kFullWarp, i < line.length); ++i) {
          const bool valid = i < line.length;
          Fragment<L> key, value;
          if constexpr (!L::kWide) key.load(line.key, p.head_dim, 0, lane, valid);
          value.load(line.value, p.value_dim, slab, lane, valid);
          const Accum bias = line.bias != nullptr && valid ? __ldg(line.bias + i) : Accum(0);
          const Accum dot = group_sum<L>(query.dot(key, line.key, lane, valid));
          const Accum score = valid ? scale * dot + bias : -kInfinity<Accum>;
          line.key += line.key_step;
          line.value += line.value_step;

          if (score > largest) {
            const Accum factor = exp_weight(largest - score);
            largest = score;
            total *= factor;
#pragma unroll
            for (int e = 0; e < L::kElements; ++e) sum[e] *= factor;
          }
          // All scores so far may be -inf: their weights are 0, not exp(nan).
          const Accum weight =
              exp_weight(score - (largest == -kInfinity<Accum> ? Accum(0) : largest));
          total += weight;
          add_row<L>(weight, value, sum);
        }
      }
    }

    if (exists) {
      const bool empty = total == 0;
      store_row<L>(sum, empty ? Accum(0) : 1 / total,
                   static_cast<T*>(call.out) + row * p.value_dim, p.value_dim, slab, lane);
      if (lane == 0 && slab == 0) {
        static_cast<Accum*>(call.lse)[row] = empty ? -kInfinity<Accum> : largest + log(total);
      }
    }
  }
}

}  // namespace

cudaError_t forward_naive(const ForwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const Inputs& in = call.in;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned = aligned_for_vectors(
      {in.query, in.key, in.value, in.additional_key, in.additional_value, call.out});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks =
        block_count(rows * L::slabs(p.value_dim), kThreads / L::kLanes);
    forward_kernel<L><<<blocks, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
