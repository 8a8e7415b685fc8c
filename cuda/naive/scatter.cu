// Sums of the queries that see each key, weighted by the slots in which they see it, by a group
// of lanes for each key.
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

// The queries that see one key, along one axis.
struct AxisQueries {
  AxisRange range;
  AxisWindow window;
  int32_t key, query;  // class indices of the key and of the first query
  int32_t tokens;      // of the class

  __device__ __forceinline__ AxisQueries(const AxisWindow& w, const AxisFrame& f, int32_t local)
      : range(queries_of_key(w, f, local)), window(w) {
    const int32_t i = f.key_origin + local, residue = i % w.dilation;
    key = i / w.dilation;
    query = key + w.kernel_size - 1 - range.bias_row;
    tokens = (f.length - residue + w.dilation - 1) / w.dilation;
  }

  // The slot of the key in the window of query `t`.
  __device__ __forceinline__ int32_t slot(int32_t t) const {
    return key - class_keys_of_query(window, query + t, tokens).begin;
  }
};

template <class L>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ UnfusedCall call) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kItems = kThreads / L::kLanes;  // of a block at a time

  const Problem& p = call.problem;
  const int lane = threadIdx.x % L::kLanes;
  const int32_t group = p.heads / p.key_heads;
  const int64_t rows = p.batch * p.key_tokens() * p.key_heads;
  const int64_t items = rows * L::slabs(p.head_dim);

  for (int64_t item = int64_t(blockIdx.x) * kItems + threadIdx.x / L::kLanes; item < items;
       item += int64_t(gridDim.x) * kItems) {
    const int32_t slab = L::kWide ? static_cast<int32_t>(item / rows) : 0;
    const Row at = row_at(item - slab * rows, p.key_tokens(), p.key_heads);
    const Position key = position_of(at.token, p.key_grid);
    const AxisQueries planes(p.window[0], p.axis_frame(at.batch, 0), key.axis[0]);
    const AxisQueries lines(p.window[1], p.axis_frame(at.batch, 1), key.axis[1]);
    const AxisQueries places(p.window[2], p.axis_frame(at.batch, 2), key.axis[2]);
    Accum sum[L::kElements];
    clear<L>(sum);

#pragma unroll 1
    for (int32_t z = 0; z < planes.range.count; ++z) {
#pragma unroll 1
      for (int32_t y = 0; y < lines.range.count; ++y) {
        const int64_t line =
            int64_t(planes.range.first + z * p.window[0].dilation) * p.query_grid[1] +
            lines.range.first + y * p.window[1].dilation;
        const int64_t first = line * p.query_grid[2] + places.range.first;
        const int64_t line_slot =
            (int64_t(planes.slot(z)) * p.window[1].kernel_size + lines.slot(y)) *
            p.window[2].kernel_size;
        for (int32_t x = 0; x < places.range.count; ++x) {
          const int64_t slot = line_slot + places.slot(x);
          const int64_t row = query_row(p, at.batch, first + x * p.window[2].dilation,
                                        at.head * group);
#pragma unroll 1
          for (int32_t member = 0; member < group; ++member) {
            const T* weight =
                static_cast<const T*>(call.slots) + (row + member) * call.window_size() + slot;
            Fragment<L> query;
            query.load(static_cast<const T*>(call.queries) + (row + member) * p.head_dim,
                       p.head_dim, slab, lane, true);
            add_row<L>(widen(__ldg(weight)), query, sum);
          }
        }
      }
    }
    const int64_t row = key_row(p, at.batch, at.token, at.head);
    store_result<L>(sum, call, call.keys, row, slab, lane);
  }
}

}  // namespace

cudaError_t scatter_naive(const UnfusedCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const int64_t rows = p.batch * p.key_tokens() * p.key_heads;
  if (rows == 0) return cudaSuccess;
  const bool aligned = aligned_for_vectors({call.queries, call.keys});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = block_count(rows * L::slabs(p.head_dim), kThreads / L::kLanes);
    scatter_kernel<L><<<blocks, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
