// Launches of CTAs that stay.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_na::cuda::sm90 {

// One CTA per multiprocessor, or `most` where those are fewer.
inline cudaError_t count_persistent(int32_t most, int32_t* ctas) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *ctas = most < multiprocessors ? most : multiprocessors;
  return status;
}

template <class Plan>
cudaError_t launch_persistent(void (*kernel)(const Plan), int32_t ctas, int threads,
                              int64_t shared_bytes, const Plan& plan, cudaStream_t stream) {
  const auto* symbol = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = cudaFuncSetAttribute(
      symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<Plan*>(&plan)};
  return cudaLaunchKernel(symbol, dim3(static_cast<unsigned>(ctas)), dim3(threads), arguments,
                          static_cast<size_t>(shared_bytes), stream);
}

}  // namespace jax_na::cuda::sm90
