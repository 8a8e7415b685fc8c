// Launches of CTAs that stay.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_na::cuda::sm90 {

// One CTA per multiprocessor, or `most` where those are fewer.
template <class Plan>
cudaError_t launch_persistent(void (*kernel)(const Plan), int32_t most, int threads,
                              int64_t shared_bytes, const Plan& plan, cudaStream_t stream) {
  if (most == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const auto* symbol = reinterpret_cast<const void*>(kernel);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  if (status != cudaSuccess) return status;
  const int32_t ctas = most < multiprocessors ? most : multiprocessors;
  void* arguments[] = {const_cast<Plan*>(&plan)};
  return cudaLaunchKernel(symbol, dim3(static_cast<unsigned>(ctas)), dim3(threads), arguments,
                          static_cast<size_t>(shared_bytes), stream);
}

}  // namespace jax_na::cuda::sm90
