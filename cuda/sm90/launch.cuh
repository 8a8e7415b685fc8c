// Launches of CTAs that stay.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_na::cuda::sm90 {

// As many CTAs as are resident at once, or fewer where there are not so many tiles.
template <class Plan>
cudaError_t launch_persistent(void (*kernel)(const Plan), int32_t tiles, int resident,
                              int threads, int64_t shared_bytes, const Plan& plan,
                              cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
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
  const int32_t ctas = tiles < resident * multiprocessors ? tiles : resident * multiprocessors;
  void* arguments[] = {const_cast<Plan*>(&plan)};
  return cudaLaunchKernel(symbol, dim3(static_cast<unsigned>(ctas)), dim3(threads), arguments,
                          static_cast<size_t>(shared_bytes), stream);
}

}  // namespace jax_na::cuda::sm90
