// Which Hopper kernels run a backward pass.
#include <algorithm>

#include "../fused/fused.h"
#include "sm90.h"
#include "streams.h"
#include "sums.h"

namespace jax_na::cuda {

using namespace sm90;

namespace {

// Room for a counter of tiles: one float, and what follows it is written in vectors of four.
constexpr int64_t kCounter = 4;

// Whether the kernel for dquery makes delta, too. It takes a spare warp some 20 us per tile, about
// the time of so many boxes.
bool dquery_makes_delta(const BackwardCall& call, const HopperTiling& tiling) {
  constexpr int64_t kBoxes = 12;
  const Problem& p = call.problem;
  if (call.dquery == nullptr || padded_dim(p) < 96) return false;
  int64_t boxes = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const AxisWindow& w = p.window[a];
    const int32_t rows = tiling.row_box[a] * (a == kMaxRank - p.rank ? tiling.groups : 1);
    const int64_t longest = (p.key_grid[a] + w.dilation - 1) / w.dilation;
    const int64_t most = std::min(fused::most_columns(w, rows), longest);
    boxes *= (most + tiling.column_box[a] - 1) / tiling.column_box[a];
  }
  return boxes >= kBoxes;
}

bool is_empty(const Problem& p) { return p.batch == 0 || p.heads == 0; }

int64_t count_sums(const Problem& p) {
  return p.batch * p.query_tokens() * p.heads * padded_dim(p);
}

}  // namespace

int64_t backward_sm90_workspace(const BackwardCall& call) {
  const bool makes_both =
      call.dquery != nullptr && (call.dkey != nullptr || call.dvalue != nullptr);
  return makes_both && !is_empty(call.problem) ? kCounter : 0;
}

cudaError_t backward_sm90(const BackwardCall& call, const HopperBackwardTiling& tiling,
                          float* workspace, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (!supported(p)) return cudaErrorInvalidValue;
  if (is_empty(p)) return cudaSuccess;
  const TokenPair queries{call.in.query, call.dout};
  BackwardPlan plan{};
  plan.call = call;
  cudaError_t status = cudaSuccess;
  if (call.out != nullptr && !dquery_makes_delta(call, tiling.dquery)) {
    status = make_delta(call, stream);
    if (status != cudaSuccess) return status;
    plan.call.out = nullptr;
  }
  int32_t* taken = nullptr;  // of tiles of keys, whose walks differ in length
  if (call.dquery != nullptr && p.query_tokens() > 0) {
    status = make_query_streams(p, tiling.dquery, queries, call.in, &plan.streams);
    if (status != cudaSuccess) return status;
    if (backward_sm90_workspace(call) > 0) taken = reinterpret_cast<int32_t*>(workspace);
    plan.streams.next_taken = taken;
    status = with_type_and_dim<32, 64, 96, 128>(p, [&](auto variant) {
      using V = decltype(variant);
      return launch_dquery<typename V::Type, V::kDim>(plan, tiling.dquery, stream);
    });
    if (status != cudaSuccess) return status;
  }
  if ((call.dkey != nullptr || call.dvalue != nullptr) && p.key_tokens() > 0) {
    status = make_key_streams(p, tiling.dkey_dvalue, call.in, queries, &plan.streams);
    if (status != cudaSuccess) return status;
    plan.streams.taken = taken;
    plan.streams.next_taken = nullptr;
    status = with_type_and_dim<32, 64, 96, 128>(p, [&](auto variant) {
      using V = decltype(variant);
      return launch_dkey_dvalue<typename V::Type, V::kDim>(plan, tiling.dkey_dvalue, stream);
    });
  }
  return status;
}

int64_t gradients_sm90_workspace(const Problem& p) {
  return is_empty(p) ? 0 : count_sums(p) + kCounter;
}

cudaError_t gradients_sm90(const BackwardCall& call, const HopperTiling& tiling,
                           float* workspace, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (!supported(p) || p.additional > 0) return cudaErrorInvalidValue;
  if (is_empty(p)) return cudaSuccess;
  float* const sums = workspace;  // and the counter
  const int64_t size = count_sums(p);
  const cudaError_t cleared = cudaMemsetAsync(sums, 0, (size + kCounter) * sizeof(float), stream);
  if (cleared != cudaSuccess) return cleared;
  if (p.batch * p.key_tokens() * p.key_heads > 0) {
    GradientsPlan plan{};
    plan.call = call;
    cudaError_t status = make_key_streams(p, tiling, call.in, {call.in.query, call.dout},
                                          &plan.streams);
    if (status != cudaSuccess) return status;
    plan.streams.taken = reinterpret_cast<int32_t*>(sums + size);
    TokenBox box{{}, {}, kSumChannels};
    for (int a = 0; a < kMaxRank; ++a) {
      box.extent[a] = tiling.column_box[a];
      box.dilation[a] = p.window[a].dilation;
    }
    status = make_sum_map(p, padded_dim(p), sums, box, &plan.sums);
    if (status != cudaSuccess) return status;
    status = with_type_and_dim<32, 64, 128>(p, [&](auto variant) {
      using V = decltype(variant);
      return launch_gradients<typename V::Type, V::kDim>(plan, tiling, stream);
    });
    if (status != cudaSuccess) return status;
  }
  return size > 0 ? round_sums(p, sums, call.dquery, stream) : cudaSuccess;
}

}  // namespace jax_na::cuda
