#include "sums.h"

#include "streams.h"

namespace jax_na::cuda::sm90 {
namespace {

constexpr int kThreads = 256;

// A thread rounds four sums.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_kernel(const float4* sums, T* dquery, int64_t fours, int32_t fours_of_row,
                 int32_t head_dim, float scale) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < fours; i += step) {
    const float4 four = sums[i];
    const int64_t row = i / fours_of_row;
    const auto in_row = static_cast<int32_t>(i - row * fours_of_row);
    const int32_t q = in_row % 8 / 2, j = in_row % 2;
    const int32_t channel = in_row / 8 * kSumChannels + 16 * j + 2 * q;
    auto* to = reinterpret_cast<uint32_t*>(dquery + row * head_dim + channel);
    if (channel < head_dim) to[0] = pack<T>(four.x * scale, four.y * scale);
    if (channel + 8 < head_dim) to[4] = pack<T>(four.z * scale, four.w * scale);
  }
}

}  // namespace

cudaError_t round_sums(const Problem& p, const float* sums, void* dquery, cudaStream_t stream) {
  const int32_t fours_of_row = padded_dim(p) / 4;
  const int64_t fours = p.batch * p.query_tokens() * p.heads * fours_of_row;
  const int64_t wanted = (fours + kThreads - 1) / kThreads;
  const auto ctas = static_cast<unsigned>(wanted < INT32_MAX ? wanted : INT32_MAX);
  const auto scale = static_cast<float>(p.scale);
  const auto launch = [&](auto type) {
    using T = decltype(type);
    round_kernel<T><<<ctas, kThreads, 0, stream>>>(reinterpret_cast<const float4*>(sums),
                                                   static_cast<T*>(dquery), fours,
                                                   fours_of_row, p.head_dim, scale);
    return cudaGetLastError();
  };
  return p.element_type == ElementType::kBF16 ? launch(__nv_bfloat16{}) : launch(__half{});
}

}  // namespace jax_na::cuda::sm90
