// The window of one query slot by slot (cuda/unfused.h says what slots are), and the rows of
// results.
#pragma once

#include <cstdint>

#include "../../ffi/problem.h"
#include "../unfused.h"
#include "rows.cuh"
#include "walk.cuh"

namespace jax_na::cuda {

// Goes through all slots of a window in order. The groups of a warp take equally many steps,
// whether or not a slot holds a key.
class SlotWalk {
 public:
  __device__ __forceinline__ SlotWalk(const Problem& p, int64_t batch, const Position& query) {
    first_key_ = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const AxisFrame frame = p.axis_frame(batch, a);
      const AxisRange keys = keys_of_query(p.window[a], frame, query.axis[a]);
      const int32_t first_row = first_bias_row(p.window[a], frame, query.axis[a]);
      begin_[a] = keys.count == 0 ? 0 : keys.bias_row - first_row;
      end_[a] = begin_[a] + keys.count;
      const int32_t first = keys.first - p.window[a].dilation * begin_[a];  // may not exist
      first_key_ = (a == 0 ? 0 : first_key_ * p.key_grid[a]) + first;
      at_[a] = 0;
    }
    seek(p);
  }

  // Whether the slot at hand holds a key, and which.
  __device__ __forceinline__ bool held() const {
    return line_held_ && at_[2] >= begin_[2] && at_[2] < end_[2];
  }
  __device__ __forceinline__ int64_t key() const { return key_; }

  __device__ __forceinline__ void next(const Problem& p) {
    key_ += p.window[2].dilation;
    if (++at_[2] < p.window[2].kernel_size) return;
    at_[2] = 0;
    if (++at_[1] == p.window[1].kernel_size) {
      at_[1] = 0;
      ++at_[0];
    }
    seek(p);
  }

 private:
  int32_t begin_[kMaxRank], end_[kMaxRank];  // of the slots that hold keys
  int32_t at_[kMaxRank];
  int64_t first_key_, key_;
  bool line_held_;

  // To the start of the line at hand.
  __device__ __forceinline__ void seek(const Problem& p) {
    const int64_t lines = int64_t(at_[0]) * p.window[0].dilation * p.key_grid[1] +
                          int64_t(at_[1]) * p.window[1].dilation;
    key_ = first_key_ + lines * p.key_grid[2];
    line_held_ = at_[0] >= begin_[0] && at_[0] < end_[0] && at_[1] >= begin_[1] &&
                 at_[1] < end_[1];
  }
};

// Stores a slab of the row of a result, which may have the accumulation type.
template <class L>
__device__ __forceinline__ void store_result(const typename L::Accum (&sum)[L::kElements],
                                             const UnfusedCall& call, void* result, int64_t row,
                                             int32_t slab, int lane) {
  const int32_t dim = call.problem.head_dim;
  if (!call.wide_result) {
    auto* to = static_cast<typename L::Element*>(result) + row * dim;
    return store_row<L>(sum, 1, to, dim, slab, lane);
  }
  auto* to = static_cast<typename L::Accum*>(result) + row * dim;
#pragma unroll
  for (int load = 0; load < L::kLoads; ++load) {
    const int32_t i = slab * L::kSlab + L::index(lane, load);
#pragma unroll
    for (int e = 0; e < L::kVector; ++e) {
      if (i + e < dim) to[i + e] = sum[load * L::kVector + e];
    }
  }
}

}  // namespace jax_na::cuda
