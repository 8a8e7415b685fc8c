// Times the naive kernels of NATTEN 0.17.5, which are those of "Faster Neighborhood Attention"
// (arXiv 2403.04690), on the problems of paper.py. They compile alone against NATTEN's headers.
//
//   git clone --branch v0.17.5 https://github.com/SHI-Labs/NATTEN
//   nvcc -std=c++17 -O3 -arch=sm_90 -INATTEN/csrc/include -o natten_naive benchmarks/natten_naive.cu
//   python benchmarks/paper.py --list | ./natten_naive > natten_naive.txt
//   python benchmarks/paper.py --natten natten_naive.txt --output results
//
// Forward passes without softmax: scores, and weights times values. Medians of nine by events;
// arrays hold zeros, which can only flatter. Prints every problem and its milliseconds.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

// After <tuple> and in this order, as they do not include what they use.
#include <natten/natten.h>
#include <natten/dtypes.cuh>
#include <natten/naive_argpack.h>

#include <natten/cuda/naive/neighborhood_neighborhood_1d.cuh>
#include <natten/cuda/naive/neighborhood_neighborhood_2d.cuh>
#include <natten/cuda/naive/neighborhood_neighborhood_3d.cuh>
#include <natten/cuda/naive/pointwise_neighborhood_1d.cuh>
#include <natten/cuda/naive/pointwise_neighborhood_2d.cuh>
#include <natten/cuda/naive/pointwise_neighborhood_3d.cuh>

namespace natten {  // what its headers expect of the library
bool kEnableTiledNA = true, kEnableGemmNA = false, kEnableGemmTF32 = false, kHasCUDA = true,
     kHasGEMM = false;
}  // namespace natten

namespace {

using namespace natten::cuda::naive;
using natten::naive::ArgumentPack1D;
using natten::naive::ArgumentPack2D;
using natten::naive::ArgumentPack3D;

constexpr int kCapability = 90, kCalls = 9;

void require(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

struct Problem {
  int rank, shape[3] = {1, 1, 1}, window, batch, heads, dim;
  std::string dtype;

  long tokens() const { return long{batch} * heads * shape[0] * shape[1] * shape[2]; }
  long slots() const {  // of one query
    long product = 1;
    for (int a = 0; a < rank; ++a) product *= window;
    return product;
  }
};

template <class T>
void attend(const Problem& p, void* query, void* key, void* value, void* weights, void* out) {
  const long n = p.slots(), line = p.shape[p.rank - 1] * n;
  const int(&s)[3] = p.shape;
  if (p.rank == 1) {
    using Pack = ArgumentPack1D<T, 0>;
    const std::tuple<int> window{p.window}, dilation{1};
    PointwiseNeighborhood1D<Pack>()(kCapability, 0, false, query, key, weights, p.batch, p.heads,
                                    s[0], p.dim, p.heads * line, line, n, window, dilation);
    NeighborhoodNeighborhood1D<Pack>()(kCapability, 0, weights, value, out, p.batch, p.heads, s[0],
                                       p.dim, p.heads * line, line, n, window, dilation);
  } else if (p.rank == 2) {
    using Pack = ArgumentPack2D<T, 0, 0>;
    const std::tuple<int, int> window{p.window, p.window}, dilation{1, 1};
    const long plane = s[0] * line;
    PointwiseNeighborhood2D<Pack>()(kCapability, 0, false, query, key, weights, p.batch, p.heads,
                                    s[0], s[1], p.dim, p.heads * plane, plane, line, n, window,
                                    dilation);
    NeighborhoodNeighborhood2D<Pack>()(kCapability, 0, weights, value, out, p.batch, p.heads, s[0],
                                       s[1], p.dim, p.heads * plane, plane, line, n, window,
                                       dilation);
  } else {
    using Pack = ArgumentPack3D<T, 0, 0, 0>;
    const std::tuple<int, int, int> window{p.window, p.window, p.window}, dilation{1, 1, 1};
    const long plane = s[1] * line, volume = s[0] * plane;
    PointwiseNeighborhood3D<Pack>()(kCapability, 0, false, query, key, weights, p.batch, p.heads,
                                    s[0], s[1], s[2], p.dim, p.heads * volume, volume, plane, line,
                                    n, window, dilation);
    NeighborhoodNeighborhood3D<Pack>()(kCapability, 0, weights, value, out, p.batch, p.heads, s[0],
                                       s[1], s[2], p.dim, p.heads * volume, volume, plane, line, n,
                                       window, dilation);
  }
}

float milliseconds(const Problem& p) {
  const bool half = p.dtype == "float16";
  const size_t bytes = half ? 2 : 4, tokens = p.tokens() * p.dim * bytes;
  void* arrays[5];  // query, key, value, weights, out
  for (int i = 0; i < 5; ++i) {
    const size_t size = i == 3 ? p.tokens() * p.slots() * bytes : tokens;
    require(cudaMalloc(&arrays[i], size));
    require(cudaMemset(arrays[i], 0, size));
  }
  const auto run = [&] {
    half ? attend<natten::float16>(p, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4])
         : attend<natten::float32>(p, arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]);
  };
  cudaEvent_t start, end;
  require(cudaEventCreate(&start));
  require(cudaEventCreate(&end));
  run();
  run();
  std::vector<float> times(kCalls);
  for (float& time : times) {
    require(cudaEventRecord(start));
    run();
    require(cudaEventRecord(end));
    require(cudaEventSynchronize(end));
    require(cudaEventElapsedTime(&time, start, end));
  }
  require(cudaGetLastError());
  for (void* array : arrays) require(cudaFree(array));
  std::sort(times.begin(), times.end());
  return times[kCalls / 2];
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    Problem p;
    std::istringstream words(line);
    words >> p.rank;
    for (int a = 0; a < p.rank; ++a) words >> p.shape[a];
    words >> p.window >> p.batch >> p.heads >> p.dim >> p.dtype;
    std::cout << line << ' ' << milliseconds(p) << std::endl;
  }
}
