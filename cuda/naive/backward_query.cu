// The gradient of the query: a group of lanes for each row goes through the keys that it
// sees.
#include <cuda_runtime.h>

#include <cstdint>

#include "../../ffi/problem.h"
#include "backward.cuh"
#include "layouts.cuh"
#include "rows.cuh"
#include "walk.cuh"

namespace jax_na::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRegisters = 16;  // of a row, in a lane

// As many blocks on a multiprocessor as registers allow without spilling them.
template <class L>
constexpr int kResidentBlocks = sizeof(typename L::Element) == 2 ? 4 : 3;

template <class L>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<L>)
    backward_query_kernel(const __grid_constant__ BackwardCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kItems = kThreads / L::kLanes;  // of a block at a time

  const Problem& p = call.problem;
  const Accum scale = static_cast<Accum>(p.scale);
  const int lane = threadIdx.x % L::kLanes;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  const int64_t items = rows * L::slabs(p.head_dim);

  for (int64_t first = int64_t(blockIdx.x) * kItems; first < items;
       first += int64_t(gridDim.x) * kItems) {
    const int64_t item = first + threadIdx.x / L::kLanes;
    const bool exists = item < items;
    const int32_t slab = L::kWide && exists ? static_cast<int32_t>(item / rows) : 0;
    const Row at = row_at(exists ? item - slab * rows : 0, p.query_tokens(), p.heads);
    const Position position = position_of(at.token, p.query_grid);
    const bool active = exists && query_in_grid(p, at.batch, position);
    const int64_t row = query_row(p, at.batch, at.token, at.head);

    HeldRow<L> query, dout;
    query.hold(static_cast<const T*>(call.in.query) + row * p.head_dim, p.head_dim, lane,
               active);
    dout.hold(static_cast<const T*>(call.dout) + row * p.value_dim, p.value_dim, lane, active);
    const Accum lse = __ldg(static_cast<const Accum*>(call.lse) + row);
    const Accum delta = __ldg(static_cast<const Accum*>(call.delta) + row);
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
          key.load(line.key, p.head_dim, slab, lane, valid);
          if constexpr (!L::kWide) value.load(line.value, p.value_dim, 0, lane, valid);
          const Accum bias = line.bias != nullptr && valid ? __ldg(line.bias + i) : Accum(0);
          const Accum dot = group_sum<L>(query.dot(key, line.key, lane, valid));
          const Accum dweight = group_sum<L>(dout.dot(value, line.value, lane, valid));
          line.key += line.key_step;
          line.value += line.value_step;
          const auto pair = pair_gradient(scale * dot + bias, lse, dweight, delta, valid);
          add_row<L>(pair.dscore, key, sum);
        }
      }
    }

    if (exists) {
      store_row<L>(sum, scale, static_cast<T*>(call.dquery) + row * p.head_dim, p.head_dim,
                   slab, lane);
    }
  }
}

}  // namespace

cudaError_t backward_naive_query(const BackwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const Inputs& in = call.in;
  const int64_t rows = p.batch * p.query_tokens() * p.heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned =
      aligned_for_vectors({in.query, in.key, in.value, in.additional_key, in.additional_value,
                           call.dout, call.dquery});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = block_count(rows * L::slabs(p.head_dim), kThreads / L::kLanes);
    backward_query_kernel<L><<<blocks, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
