// What the checkers of kernels have in common.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace jax_na::cuda {
namespace {

void require(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(status));
  std::exit(2);
}

// Numbers that look random.
__device__ uint32_t hash(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x ^ x >> 33);
}

// Milliseconds per launch: the median of nine groups of four, after two that warm up.
template <class Launch>
float milliseconds(const Launch& launch) {
  constexpr int kLaunches = 4, kRounds = 9;
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < kRounds + 2; ++round) {
    require(cudaEventRecord(begin));
    for (int i = 0; i < kLaunches; ++i) require(launch());
    require(cudaEventRecord(end));
    require(cudaEventSynchronize(end));
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end));
    if (round >= 2) times.push_back(ms / kLaunches);
  }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[kRounds / 2];
}

}  // namespace
}  // namespace jax_na::cuda
