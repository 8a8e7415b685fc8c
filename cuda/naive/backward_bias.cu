// The gradient of the relative positional bias: a block for each entry of each table. The
// queries that see a key at the entry's offset are those that do so on every axis. The
// block lists them per axis, a chunk at a time, and its groups share out the product of the
// lists.
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
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kResidentBlocks = 5;  // on a multiprocessor; more would spill registers
constexpr int kRegisters = 8;       // of a row, in a lane
constexpr int kSamples = 64;        // at a time: kSamples * kThreads ** 3 pairs fit 32 bits

// Some of the queries of one axis. Lies in shared memory.
struct QueryList {
  int32_t query[kThreads];
  int32_t count_of_warp[kWarps];

  // Lists, in order, those of the kThreads queries from `first` on that see a key at the
  // offset of `bias_row`, and returns their number. A call for all threads of a block; the
  // list is theirs to read until the next one.
  __device__ __forceinline__ int32_t find(const AxisWindow& window, const AxisFrame& frame,
                                          int32_t bias_row, int32_t first) {
    const int warp = threadIdx.x / kWarpLanes, place = threadIdx.x % kWarpLanes;
    const int32_t own = first + static_cast<int32_t>(threadIdx.x);
    bool sees = false;
    if (own < frame.query_length) {
      const AxisRange keys = keys_of_query(window, frame, own);
      sees = bias_row >= keys.bias_row && bias_row - keys.bias_row < keys.count;
    }
    const unsigned votes = __ballot_sync(kFullWarp, sees);
    __syncthreads();  // all have read the list before
    if (place == 0) count_of_warp[warp] = __popc(votes);
    __syncthreads();
    int32_t before = 0, count = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = count;
      count += count_of_warp[w];
    }
    if (sees) query[before + __popc(votes & ((1u << place) - 1))] = own;
    __syncthreads();
    return count;
  }
};

// The queries of some samples that see a key at one offset, and what they need to know of
// the place of that key.
struct Pairs {
  int64_t first_sample;
  int32_t samples;
  uint32_t count[kMaxRank];      // of the lists
  int32_t key_offset[kMaxRank];  // local index of the key less that of the query
};

// The sum of dscore over the share of one group.
template <class L>
__device__ __forceinline__ typename L::Accum sum_of_pairs(const BackwardCall& call,
                                                          const QueryList (&lists)[kMaxRank],
                                                          const Pairs& pairs, int32_t head,
                                                          typename L::Accum bias) {
  using T = typename L::Element;
  using Accum = typename L::Accum;
  constexpr int kGroups = kThreads / L::kLanes;
  const Problem& p = call.problem;
  const Accum scale = static_cast<Accum>(p.scale);
  const int lane = threadIdx.x % L::kLanes;
  const uint32_t total = pairs.samples * pairs.count[0] * pairs.count[1] * pairs.count[2];

  Accum sum = 0;
  for (uint32_t first = 0; first < total; first += kGroups) {
    const uint32_t i = first + threadIdx.x / L::kLanes;
    const bool valid = i < total;
    int64_t token = 0, key_token = 0;
    uint32_t rest = i;
    uint32_t place[kMaxRank];
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      place[a] = rest % pairs.count[a];
      rest /= pairs.count[a];
    }
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int32_t query = lists[a].query[place[a]];
      token = token * p.query_grid[a] + query;
      key_token = key_token * p.key_grid[a] + query + pairs.key_offset[a];
    }
    const int64_t sample = pairs.first_sample + rest;
    const int64_t query_index = query_row(p, sample, token, head);
    const int64_t key_index = key_row(p, sample, key_token, key_head_of(p, head));

    const Accum lse =
        valid ? __ldg(static_cast<const Accum*>(call.lse) + query_index) : Accum(0);
    const Accum delta =
        valid ? __ldg(static_cast<const Accum*>(call.delta) + query_index) : Accum(0);
    const Accum dot = group_sum<L>(
        lane_dot<L>(static_cast<const T*>(call.in.query) + query_index * p.head_dim,
                    static_cast<const T*>(call.in.key) + key_index * p.head_dim, p.head_dim,
                    lane, valid));
    const Accum dweight = group_sum<L>(
        lane_dot<L>(static_cast<const T*>(call.dout) + query_index * p.value_dim,
                    static_cast<const T*>(call.in.value) + key_index * p.value_dim,
                    p.value_dim, lane, valid));
    sum += pair_gradient(scale * dot + bias, lse, dweight, delta, valid).dscore;
  }
  return sum;
}

template <class L>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_bias_kernel(const __grid_constant__ BackwardCall call) {
  using Accum = typename L::Accum;
  __shared__ QueryList lists[kMaxRank];
  __shared__ Accum partial[kWarps];

  const Problem& p = call.problem;
  const bool shared_table = p.bias_batch_stride == 0;
  const int64_t entries = (shared_table ? 1 : p.batch) * p.heads * p.bias_size();

  for (int64_t item = blockIdx.x; item < entries; item += gridDim.x) {
    const Row at = row_at(item, p.bias_size(), p.heads);
    const Position bias_row = position_of(at.token, p.bias_extent(1), p.bias_extent(2));
    const int64_t end = shared_table ? p.batch : at.batch + 1;

    // Samples that share the table share the value.
    const int64_t entry = bias_table(p, at.batch, at.head) + at.token;
    const Accum bias = __ldg(static_cast<const Accum*>(call.in.bias) + entry);
    Accum sum = 0;
    Pairs pairs;
    for (pairs.first_sample = at.batch; pairs.first_sample < end;
         pairs.first_sample += pairs.samples) {
      // Samples with one frame see alike.
      pairs.samples = p.frame_batch_stride != 0
                          ? 1
                          : static_cast<int32_t>(
                                min(end - pairs.first_sample, int64_t(kSamples)));
      AxisFrame frame[kMaxRank];
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        frame[a] = p.axis_frame(pairs.first_sample, a);
        pairs.key_offset[a] =
            frame[a].query_origin - frame[a].key_origin +
            (bias_row.axis[a] - (p.window[a].kernel_size - 1)) * p.window[a].dilation;
      }
      const auto find = [&](int a, int32_t first) {
        pairs.count[a] = lists[a].find(p.window[a], frame[a], bias_row.axis[a], first);
        return pairs.count[a] > 0;
      };
      for (int32_t i = 0; i < p.query_grid[0]; i += kThreads) {
        if (!find(0, i)) continue;
        for (int32_t j = 0; j < p.query_grid[1]; j += kThreads) {
          if (!find(1, j)) continue;
          for (int32_t k = 0; k < p.query_grid[2]; k += kThreads) {
            if (!find(2, k)) continue;
            sum += sum_of_pairs<L>(call, lists, pairs, at.head, bias);
          }
        }
      }
    }

    sum = sum_of_groups<L>(sum);
    __syncthreads();  // all sums before have been read
    if (threadIdx.x % kWarpLanes == 0) partial[threadIdx.x / kWarpLanes] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) sum += partial[w];
      static_cast<Accum*>(call.dbias)[entry] = sum;
    }
  }
}

}  // namespace

cudaError_t backward_naive_bias(const BackwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const Inputs& in = call.in;
  const int64_t tables = (p.bias_batch_stride == 0 ? 1 : p.batch) * p.heads;
  if (tables == 0) return cudaSuccess;
  const bool aligned = aligned_for_vectors({in.query, in.key, in.value, call.dout});
  return with_layout<kRegisters>(p, aligned, [&](auto layout) {
    using L = decltype(layout);
    const unsigned blocks = block_count(tables * p.bias_size(), 1);
    backward_bias_kernel<L><<<blocks, kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace jax_na::cuda
