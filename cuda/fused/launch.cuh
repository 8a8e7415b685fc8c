// Dynamic shared memory, from both sides of a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace jax_na::cuda::fused {

// The dynamic shared memory of a CTA as one structure.
template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(128) uint8_t bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

template <class Plan>
using Kernel = void (*)(const Plan);

template <class Plan>
cudaError_t launch(Kernel<Plan> kernel, int64_t ctas, int threads, int64_t shared_bytes,
                   const Plan& plan, cudaStream_t stream) {
  if (ctas == 0) return cudaSuccess;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto* symbol = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = cudaFuncSetAttribute(
      symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<Plan*>(&plan)};
  return cudaLaunchKernel(symbol, dim3(static_cast<unsigned>(ctas)), dim3(threads), arguments,
                          static_cast<size_t>(shared_bytes), stream);
}

}  // namespace jax_na::cuda::fused
