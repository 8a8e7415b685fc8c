// The gradients of key and value: a group of lanes for each row goes through the queries
// that see it, one query head that reads this key head after the other.
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

constexpr int kThreads = 128;
constexpr int kResidentBlocks = 4;  // on a multiprocessor; more would spill registers
constexpr int kRegisters = 8;       // of a row, in a lane

template <class L>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_key_kernel(const __grid_constant__ BackwardCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kItems = kThreads / L::kLanes;  // of a block at a time

  const Problem& p = call.problem;
  const Accum scale = static_cast<Accum>(p.scale);
  const int lane = threadIdx.x % L::kLanes;
  const int32_t group = p.heads / p.key_heads;
  const int64_t rows = p.batch * p.key_tokens() * p.key_heads;
  const int64_t items = rows * L::slabs(max(p.head_dim, p.value_dim));

  for (int64_t first = int64_t(blockIdx.x) * kItems; first < items;
       first += int64_t(gridDim.x) * kItems) {
    const int64_t item = first + threadIdx.x / L::kLanes;
    const bool exists = item < items;
    const int32_t slab = L::kWide && exists ? static_cast<int32_t>(item / rows) : 0;
    const Row at = row_at(exists ? item - slab * rows : 0, p.key_tokens(), p.key_heads);
    const int64_t row = key_row(p, at.batch, at.token, at.head);

    HeldRow<L> key, value;
    key.hold(static_cast<const T*>(call.in.key) + row * p.head_dim, p.head_dim, lane, exists);
    value.hold(static_cast<const T*>(call.in.value) + row * p.value_dim, p.value_dim, lane,
               exists);
    Accum dkey[L::kElements], dvalue[L::kElements];
    clear<L>(dkey);
    clear<L>(dvalue);

    QueryWalk queries;
    if (exists) {
      visit_queries(p, at.batch, position_of(at.token, p.key_grid), &queries);
    }
    for (int32_t g = 0; g < group; ++g) {
      const int32_t head = at.head * group + g;
      const Accum* table = nullptr;
      if (call.in.bias != nullptr) {
        table = static_cast<const Accum*>(call.in.bias) + bias_table(p, at.batch, head);
      }
      queries.restart(p, p.query_grid);
      for (; __any_sync(kFullWarp, queries.length > 0); queries.next_line(p, p.query_grid)) {
        const int64_t line = query_row(p, at.batch, queries.token, head);
        const int64_t step = int64_t(queries.step) * p.heads;
        const T* query_at = static_cast<const T*>(call.in.query) + line * p.head_dim;
        const T* dout_at = static_cast<const T*>(call.dout) + line * p.value_dim;
        const Accum* lse_at = static_cast<const Accum*>(call.lse) + line;
        const Accum* delta_at = static_cast<const Accum*>(call.delta) + line;
        const Accum* bias_at = table == nullptr ? nullptr : table + queries.bias;
        for (int32_t i = 0; __any_sync(kFullWarp, i < queries.length); ++i) {
          const bool valid = i < queries.length;
          Fragment<L> query, dout;
          query.load(query_at, p.head_dim, slab, lane, valid);
          dout.load(dout_at, p.value_dim, slab, lane, valid);
          const Accum lse = valid ? __ldg(lse_at) : Accum(0);
          const Accum delta = valid ? __ldg(delta_at) : Accum(0);
          const Accum bias = bias_at != nullptr && valid ? __ldg(bias_at - i) : Accum(0);
          const Accum dot = group_sum<L>(key.dot(query, query_at, lane, valid));
          const Accum dweight = group_sum<L>(value.dot(dout, dout_at, lane, valid));
          query_at += step * p.head_dim;
          dout_at += step * p.value_dim;
          lse_at += step;
          delta_at += step;
          const auto pair = pair_gradient(scale * dot + bias, lse, dweight, delta, valid);
          add_row<L>(pair.dscore, query, dkey);
          add_row<L>(pair.weight, dout, dvalue);
        }
      }
    }

    if (exists && call.dkey != nullptr) {
      store_row<L>(dkey, scale, static_cast<T*>(call.dkey) + row * p.head_dim, p.head_dim,
                   slab, lane);
    }
    if (exists && call.dvalue != nullptr) {
      store_row<L>(dvalue, Accum(1), static_cast<T*>(call.dvalue) + row * p.value_dim,
                   p.value_dim, slab, lane);
    }
  }
}

}  // namespace

cudaError_t backward_naive_key(const BackwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const Inputs& in = call.in;
  const int64_t rows = p.batch * p.key_tokens() * p.key_heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned = aligned_for_vectors(
      {in.query, in.key, in.value, call.dout, call.dkey, call.dvalue});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const int64_t items = rows * L::slabs(std::max(p.head_dim, p.value_dim));
    backward_key_kernel<L>
        <<<block_count(items, kThreads / L::kLanes), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
