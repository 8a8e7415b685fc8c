// delta = rowsum(dout * out) - dlse: what gradients of scores subtract, one number per row of the
// output.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "delta.cuh"
#include "fused.h"
#include "geometry.cuh"
#include "launch.cuh"
#include "variants.h"

namespace jax_na::cuda {
namespace {

using namespace fused;

constexpr int kThreads = 256;

struct DeltaPlan {
  BackwardCall call;
  int64_t rows;
};

// delta of a row, by kLanes neighbouring lanes of which each gets it; all lanes of the warp
// call it.
template <typename T, int kLanes>
__device__ __forceinline__ float row_delta(const BackwardCall& call, int64_t row, bool exists) {
  const int units = call.problem.value_dim * int{sizeof(T)} / int{sizeof(uint4)};
  const auto* dout = static_cast<const uint4*>(call.dout) + row * units;
  const auto* out = static_cast<const uint4*>(call.out) + row * units;
  float sum = 0;
  if (exists) {
#pragma unroll 2
    for (int unit = threadIdx.x % kLanes; unit < units; unit += kLanes) {
      sum += unit_dot<T>(__ldg(dout + unit), __ldg(out + unit));
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  }
  if (exists && call.dlse != nullptr) sum -= static_cast<const float*>(call.dlse)[row];
  return sum;
}

// kLanes neighbouring lanes per row.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ DeltaPlan plan) {
  const BackwardCall& call = plan.call;
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const bool exists = row < plan.rows;
  const float delta = row_delta<T, kLanes>(call, row, exists);
  if (exists && threadIdx.x % kLanes == 0) static_cast<float*>(call.delta)[row] = delta;
}

template <typename T, int kLanes>
cudaError_t launch_delta(const DeltaPlan& plan, cudaStream_t stream) {
  constexpr int kRows = kThreads / kLanes;
  return launch(&delta_kernel<T, kLanes>, (plan.rows + kRows - 1) / kRows, kThreads, 0, plan,
                stream);
}

template <typename T>
cudaError_t launch_delta(const DeltaPlan& plan, cudaStream_t stream) {
  const int64_t row_bytes = plan.call.problem.value_dim * int64_t{sizeof(T)};
  return row_bytes <= 64 ? launch_delta<T, 4>(plan, stream) : launch_delta<T, 8>(plan, stream);
}

}  // namespace

cudaError_t make_delta(const BackwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (!supported(p)) return cudaErrorInvalidValue;
  const DeltaPlan plan{call, p.batch * p.query_tokens() * p.heads};
  switch (p.element_type) {
    case ElementType::kF16:
      return launch_delta<__half>(plan, stream);
    case ElementType::kBF16:
      return launch_delta<__nv_bfloat16>(plan, stream);
    default:
      return launch_delta<float>(plan, stream);
  }
}

}  // namespace jax_na::cuda
