// Checks the unfused 'gemm' kernels against the naive ones in float64, and times them, without
// JAX.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90,code=sm_90 -Icuda -o gemm_check \
//       tests/cuda/gemm_check.cu cuda/gemm/*.cu cuda/naive/*.cu
//   ./gemm_check random 200     problems of all kinds, COUNT and a first SEED
//   ./gemm_check cases          large problems
//   ./gemm_check time           the same: median milliseconds per launch
//
// The first two print relative RMS errors and end with 1 if one is too large.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "device.cuh"
#include "unfused.h"

namespace jax_na::cuda {
namespace {

// ---- Arrays ------------------------------------------------------------------------------

template <typename T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    require(cudaMalloc(&data_, (count + 1) * sizeof(T)));
    require(cudaMemset(data_, 0xff, (count + 1) * sizeof(T)));  // poison: NaN
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* data() const { return data_; }
  size_t count() const { return count_; }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// Calls fn(i) for 0 <= i < count.
template <class Fn>
__global__ void for_each(size_t count, Fn fn) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) fn(i);
}

// Numbers of variance 1.
template <typename T>
struct Fill {
  T* array;
  double* wide;
  uint64_t seed;
  __device__ void operator()(size_t i) const {
    const T value = static_cast<T>((hash(i + (seed << 40)) / 2147483648.0f - 1) * 1.7320508f);
    array[i] = value;
    wide[i] = static_cast<double>(static_cast<float>(value));
  }
};

// No number where there is none to be read.
template <typename T>
struct Poison {
  T* slots;
  const double* held;
  __device__ void operator()(size_t i) const {
    if (held[i] == 0) slots[i] = static_cast<T>(nanf(""));
  }
};

template <typename T>
struct Ones {
  T* array;
  __device__ void operator()(size_t i) const { array[i] = 1; }
};

// Squares of errors and of expected values; what is infinite, no number or not exactly zero
// where it should be.
template <typename T>
struct Compare {
  const T* result;
  const double* expected;
  const double* held;  // null, or where results are not exactly zero
  double* sums;
  __device__ void operator()(size_t i) const {
    const double x = static_cast<double>(static_cast<float>(result[i])), y = expected[i];
    if (!isfinite(x) || (held != nullptr && held[i] == 0 && x != 0)) {
      atomicAdd(&sums[2], 1);
      return;
    }
    if (x != y) atomicAdd(&sums[0], (x - y) * (x - y));
    if (y != 0) atomicAdd(&sums[1], y * y);
  }
};

template <class Fn>
void launch_for_each(size_t count, const Fn& fn) {
  for_each<<<2048, 256>>>(count, fn);
  require(cudaGetLastError());
}

// ---- Problems ----------------------------------------------------------------------------

struct Case {
  std::string name;
  Problem problem;
  std::vector<int32_t> frame;  // of problem, empty where it has none
  bool wide_result, highest_precision;
  UnfusedTiling of_queries, of_keys;
};

int64_t spanned(const Problem& p, const int32_t* tile) {
  int64_t last = 0;
  for (int a = 0; a < kMaxRank; ++a) {
    const int32_t k = p.window[a].kernel_size;
    last = last * k + std::min(tile[a], k) - 1;
  }
  return last + 1;
}

// `of_keys` holds tiles for 2 and for 4 bytes of an element, as jax_na/_unfused_lowering.py
// chooses them.
std::vector<Case> large_cases(bool is_float) {
  struct Row {
    const char* name;
    int batch, heads, dim, grid[3], kernel[3], of_queries[3], of_keys[2][3];
  };
  const Row rows[] = {
      {"2-D 64x64 w13",
       8,
       16,
       64,
       {1, 64, 64},
       {1, 13, 13},
       {1, 8, 8},
       {{1, 4, 16}, {1, 4, 16}}},
      {"2-D 56x56 w7", 64, 4, 32, {1, 56, 56}, {1, 7, 7}, {1, 8, 8}, {{1, 8, 8}, {1, 8, 8}}},
      {"1-D 16384 w1024",
       2,
       16,
       128,
       {1, 1, 16384},
       {1, 1, 1024},
       {1, 1, 64},
       {{1, 1, 64}, {1, 1, 56}}},
      {"2-D 128x128 w33",
       2,
       16,
       128,
       {1, 128, 128},
       {1, 33, 33},
       {1, 8, 8},
       {{1, 3, 21}, {1, 1, 64}}},
      {"3-D 16x32x32 w9x13x13",
       2,
       8,
       64,
       {16, 32, 32},
       {9, 13, 13},
       {4, 4, 4},
       {{1, 4, 16}, {1, 4, 16}}},
  };
  std::vector<Case> cases;
  for (const Row& row : rows) {
    Case c{};
    c.name = row.name;
    Problem& p = c.problem;
    p.batch = row.batch;
    p.heads = p.key_heads = row.heads;
    p.head_dim = p.value_dim = row.dim;
    p.rank = kMaxRank;
    for (int a = 0; a < kMaxRank; ++a) {
      p.query_grid[a] = p.key_grid[a] = row.grid[a];
      p.window[a] = AxisWindow{row.kernel[a], 1, 1, false};
      c.of_queries.row_tile[a] = row.of_queries[a];
      c.of_keys.row_tile[a] = row.of_keys[is_float][a];
    }
    c.wide_result = true;
    cases.push_back(c);
  }
  return cases;
}

Case random_case(uint32_t seed, int element_bytes) {
  std::mt19937 generator(seed);
  const auto draw = [&](int from, int to) {
    return std::uniform_int_distribution<int>(from, to)(generator);
  };
  Case c{};
  c.name = "random " + std::to_string(seed);
  c.wide_result = draw(0, 1) != 0;
  c.highest_precision = draw(0, 1) != 0;
  Problem& p = c.problem;
  p.rank = draw(1, kMaxRank);
  p.batch = draw(1, 3);
  p.key_heads = draw(1, 2);
  p.heads = p.key_heads * draw(1, 3);
  p.head_dim = p.value_dim = 8 * draw(1, draw(0, 1) != 0 ? 32 : 12);
  const bool framed = draw(0, 2) == 0, per_sample = draw(0, 1) != 0;
  const int longest = p.rank == 1 ? 400 : p.rank == 2 ? 40 : 12;
  for (int a = 0; a < kMaxRank; ++a) {
    p.window[a] = AxisWindow{1, 1, 1, false};
    p.query_grid[a] = p.key_grid[a] = 1;
    if (a < kMaxRank - p.rank) continue;
    const int k = draw(1, p.rank == 1 ? 150 : p.rank == 2 ? 15 : 6);
    p.window[a] = AxisWindow{k, draw(0, 1) != 0 ? 1 : draw(1, k),
                             draw(0, 2) != 0 ? 1 : draw(1, 3), draw(0, 3) == 0};
    p.query_grid[a] = draw(1, longest);
    p.key_grid[a] = framed ? draw(1, longest) : p.query_grid[a];
  }
  if (framed) {
    for (int sample = 0; sample < p.batch; ++sample) {
      std::vector<int32_t> fields[3];
      for (int a = kMaxRank - p.rank; a < kMaxRank; ++a) {
        const int length = draw(1, longest + 20);
        fields[0].push_back(length);
        fields[1].push_back(draw(-8, length));
        fields[2].push_back(draw(-8, length));
      }
      for (const auto& field : fields)
        c.frame.insert(c.frame.end(), field.begin(), field.end());
    }
    p.frame_batch_stride = per_sample ? 3 * p.rank : 0;
  }
  const int rows = (p.head_dim + 31) / 32 * 32 * element_bytes > 512 ? 32 : 64;
  for (UnfusedTiling* tiling : {&c.of_queries, &c.of_keys}) {
    int32_t (&tile)[kMaxRank] = tiling->row_tile;
    do {
      for (int a = 0; a < kMaxRank; ++a) {
        tile[a] = a < kMaxRank - p.rank ? 1 : draw(1, draw(0, 1) != 0 ? rows : 8);
      }
    } while (tile[0] * tile[1] * tile[2] > rows ||
             (tiling == &c.of_keys && spanned(p, tile) > 224 / element_bytes));
  }
  return c;
}

// ---- One problem -------------------------------------------------------------------------

using Kernel = cudaError_t (*)(const UnfusedCall&, const UnfusedTiling&, bool, cudaStream_t);
using Naive = cudaError_t (*)(const UnfusedCall&, cudaStream_t);

template <typename T>
class Check {
 public:
  explicit Check(const Case& c)
      : case_(c),
        frame_(c.frame.size()),
        queries_(c.problem.batch * c.problem.query_tokens() * c.problem.heads *
                 c.problem.head_dim),
        keys_(c.problem.batch * c.problem.key_tokens() * c.problem.key_heads *
              c.problem.head_dim),
        slots_(c.problem.batch * c.problem.query_tokens() * c.problem.heads *
               UnfusedCall{c.problem}.window_size()) {
    Problem& p = case_.problem;
    p.element_type = std::is_same_v<T, float>    ? ElementType::kF32
                     : std::is_same_v<T, __half> ? ElementType::kF16
                                                 : ElementType::kBF16;
    if (!c.frame.empty()) {
      require(cudaMemcpy(frame_.data(), c.frame.data(), c.frame.size() * sizeof(int32_t),
                         cudaMemcpyHostToDevice));
      p.frame = frame_.data();
    }
    std::printf("%-22s %-5s", c.name.c_str(), name());
  }

  bool check() {
    Array<double> queries(queries_.count()), keys(keys_.count()), slots(slots_.count());
    fill(queries_, queries, 1);
    fill(keys_, keys, 2);
    fill(slots_, slots, 3);
    Array<double> held(slots_.count());
    {
      Array<double> ones(std::max(queries_.count(), keys_.count()));
      launch_for_each(ones.count(), Ones<double>{ones.data()});
      require(pair_naive(wide(ones.data(), ones.data(), held.data()), nullptr));
    }
    launch_for_each(slots_.count(), Poison<T>{slots_.data(), held.data()});

    bool right = true;
    Array<double> expected(std::max({queries_.count(), keys_.count(), slots_.count()}));
    require(pair_naive(wide(queries.data(), keys.data(), expected.data()), nullptr));
    right &= compare("pair", slots_.count(), expected.data(), held.data(), [&](void* result) {
      return launch(&pair_gemm, queries_.data(), keys_.data(), result, case_.of_queries);
    });
    require(gather_naive(wide(expected.data(), keys.data(), slots.data()), nullptr));
    right &= compare("gather", queries_.count(), expected.data(), nullptr, [&](void* result) {
      return launch(&gather_gemm, result, keys_.data(), slots_.data(), case_.of_queries);
    });
    require(scatter_naive(wide(queries.data(), expected.data(), slots.data()), nullptr));
    right &= compare("scatter", keys_.count(), expected.data(), nullptr, [&](void* result) {
      return launch(&scatter_gemm, queries_.data(), result, slots_.data(), case_.of_keys);
    });
    std::printf("%s\n", right ? "" : "  WRONG");
    std::fflush(stdout);
    return right;
  }

  bool time() {
    Array<double> wide(std::max({queries_.count(), keys_.count(), slots_.count()}));
    fill(queries_, wide, 1);
    fill(keys_, wide, 2);
    fill(slots_, wide, 3);
    Array<float> result(wide.count());
    time("pair", [&] {
      return launch(&pair_gemm, queries_.data(), keys_.data(), result.data(),
                    case_.of_queries);
    });
    time("gather", [&] {
      return launch(&gather_gemm, result.data(), keys_.data(), slots_.data(),
                    case_.of_queries);
    });
    time("scatter", [&] {
      return launch(&scatter_gemm, queries_.data(), result.data(), slots_.data(),
                    case_.of_keys);
    });
    std::printf("\n");
    std::fflush(stdout);
    return true;
  }

 private:
  const char* name() const {
    if (std::is_same_v<T, float>) return case_.highest_precision ? "f32" : "tf32";
    return std::is_same_v<T, __half> ? "f16" : "bf16";
  }

  void fill(const Array<T>& array, const Array<double>& wide, uint64_t seed) {
    launch_for_each(array.count(), Fill<T>{array.data(), wide.data(), seed});
  }

  UnfusedCall wide(double* queries, double* keys, double* slots) const {
    UnfusedCall call{case_.problem, queries, keys, slots, false};
    call.problem.element_type = ElementType::kF64;
    return call;
  }

  cudaError_t launch(Kernel kernel, void* queries, void* keys, void* slots,
                     const UnfusedTiling& tiling) const {
    const UnfusedCall call{case_.problem, queries, keys, slots, case_.wide_result};
    return kernel(call, tiling, case_.highest_precision, nullptr);
  }

  template <class Launch>
  bool compare(const char* product, size_t count, const double* expected, const double* held,
               const Launch& launch) {
    return case_.wide_result ? compare_as<float>(product, count, expected, held, launch)
                             : compare_as<T>(product, count, expected, held, launch);
  }

  // Twice: all kernels are bitwise equal in every run.
  template <typename Result, class Launch>
  bool compare_as(const char* product, size_t count, const double* expected,
                  const double* held, const Launch& launch) {
    const Array<Result> result(count);
    require(launch(result.data()));
    Array<double> sums(3);
    require(cudaMemset(sums.data(), 0, 3 * sizeof(double)));
    launch_for_each(count, Compare<Result>{result.data(), expected, held, sums.data()});
    double host[3];
    require(cudaMemcpy(host, sums.data(), sizeof(host), cudaMemcpyDeviceToHost));
    const double error = std::sqrt(host[0] / std::max(host[1], 1e-9));
    std::printf("  %s %.1e", product, error);
    const double tolerance = std::is_same_v<T, __nv_bfloat16>                        ? 4e-3
                             : !std::is_same_v<T, float> || !case_.highest_precision ? 1e-3
                                                                                     : 1e-5;
    return host[2] == 0 && error < tolerance && same_again(result, launch);
  }

  template <typename Result, class Launch>
  bool same_again(const Array<Result>& result, const Launch& launch) {
    constexpr size_t kMost = size_t{1} << 28;  // bytes to compare on the host
    const size_t bytes = result.count() * sizeof(Result);
    if (bytes > kMost) return true;
    const Array<Result> other(result.count());
    require(launch(other.data()));
    std::vector<uint8_t> one(bytes), two(bytes);
    require(cudaMemcpy(one.data(), result.data(), bytes, cudaMemcpyDeviceToHost));
    require(cudaMemcpy(two.data(), other.data(), bytes, cudaMemcpyDeviceToHost));
    const bool same = one == two;
    if (!same) std::printf(" DIFFERS");
    return same;
  }

  template <class Launch>
  void time(const char* product, const Launch& launch) {
    std::printf("  %s %.4f", product, milliseconds(launch));
  }

  Case case_;
  Array<int32_t> frame_;
  Array<T> queries_, keys_, slots_;
};

template <typename T>
bool check_random(uint32_t seed) {
  const Case c = random_case(seed, sizeof(T));
  if (c.problem.query_tokens() * UnfusedCall{c.problem}.window_size() > 4'000'000) return true;
  return Check<T>(c).check();
}

template <typename T>
bool run_cases(bool timed) {
  bool right = true;
  for (const Case& c : large_cases(sizeof(T) == 4)) {
    Check<T> check(c);
    right &= timed ? check.time() : check.check();
  }
  return right;
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  bool right = true;
  if (mode == "random" && argc > 2) {
    const int count = std::atoi(argv[2]), first = argc > 3 ? std::atoi(argv[3]) : 0;
    for (int seed = first; seed < first + count; ++seed) {
      right &= check_random<__nv_bfloat16>(seed);
      right &= check_random<__half>(seed);
      right &= check_random<float>(seed);
    }
  } else if (mode == "cases" || mode == "time") {
    right &= run_cases<__nv_bfloat16>(mode == "time");
    right &= run_cases<float>(mode == "time");
  } else {
    std::printf("gemm_check random COUNT [SEED] | cases | time\n");
    return 2;
  }
  return right ? 0 : 1;
}

}  // namespace
}  // namespace jax_na::cuda

int main(int argc, char** argv) { return jax_na::cuda::run(argc, argv); }
