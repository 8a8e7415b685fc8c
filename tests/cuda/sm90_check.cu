// Checks the Hopper kernels against the naive ones in float64, and times them, without JAX.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icuda -o sm90_check \
//       tests/cuda/sm90_check.cu cuda/sm90/*.cu cuda/sm90/tensor_map.cc cuda/naive/*.cu \
//       cuda/fused/delta.cu
//   python tests/cuda/sm90_problems.py random 300 | ./sm90_check check
//   python tests/cuda/sm90_problems.py cases | ./sm90_check time
//
// Reads problems, one per line, as sm90_problems.py writes them: words `name=value`, with lists
// of three numbers, one per axis. `check` prints the relative RMS error of every result and ends
// with 1 if one is too large; `time` prints milliseconds per launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "device.cuh"
#include "kernels.h"
#include "sm90/sm90.h"

namespace jax_na::cuda {
namespace {

// ---- Arrays ------------------------------------------------------------------------------

// Device memory of one problem.
class Memory {
 public:
  ~Memory() {
    for (void* pointer : pointers_) cudaFree(pointer);
  }
  template <typename T>
  T* take(size_t count) {
    void* pointer = nullptr;
    require(cudaMalloc(&pointer, (count + 1) * sizeof(T)));
    require(cudaMemset(pointer, 0xff, (count + 1) * sizeof(T)));  // poison: NaN
    pointers_.push_back(pointer);
    return static_cast<T*>(pointer);
  }

 private:
  std::vector<void*> pointers_;
};

// Normal numbers, the same in both arrays.
template <typename T>
__global__ void fill(T* array, double* wide, size_t count, uint64_t seed) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const float u = (hash(2 * i + 1 + (seed << 40)) + 1.0f) / 4294967808.0f;
    const float v = hash(2 * i + 2 + (seed << 40)) / 4294967296.0f;
    const T value = static_cast<T>(sqrtf(-2 * logf(u)) * cosf(6.2831853f * v));
    array[i] = value;
    wide[i] = static_cast<double>(static_cast<float>(value));
  }
}

template <typename T>
__global__ void narrow(const double* from, T* to, size_t count) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    to[i] = static_cast<T>(static_cast<float>(from[i]));
  }
}

// delta = rowsum(dout * out) - dlse
__global__ void make_delta(const double* out, const double* dout, const double* dlse,
                           size_t rows, int dim, double* delta) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < rows; i += step) {
    double sum = -dlse[i];
    for (int c = 0; c < dim; ++c) sum += out[i * dim + c] * dout[i * dim + c];
    delta[i] = sum;
  }
}

// Adds the squares of errors and of expected values, and counts what is infinite or no number
// on one side only.
template <typename T>
__global__ void compare(const T* result, const double* expected, size_t count, double* sums) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  double errors = 0, squares = 0, bad = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    const double x = static_cast<double>(static_cast<float>(result[i])), y = expected[i];
    if (isfinite(x) && isfinite(y)) {
      errors += (x - y) * (x - y);
      squares += y * y;
    } else {
      bad += x != y;
    }
  }
  atomicAdd(&sums[0], errors);
  atomicAdd(&sums[1], squares);
  atomicAdd(&sums[2], bad);
}

// ---- Problems ----------------------------------------------------------------------------

struct Line {
  std::map<std::string, std::string> words;

  explicit Line(const std::string& text) {
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
      const size_t at = word.find('=');
      words[word.substr(0, at)] = word.substr(at + 1);
    }
  }
  int number(const char* name) const { return std::stoi(words.at(name)); }
  void list(const char* name, int32_t (&values)[kMaxRank]) const {
    std::istringstream stream(words.at(name));
    std::string value;
    for (int a = 0; a < kMaxRank && std::getline(stream, value, ','); ++a) {
      values[a] = std::stoi(value);
    }
  }
  HopperTiling tiling(const std::string& prefix) const {
    HopperTiling tiling{};
    list((prefix + "_row_box").c_str(), tiling.row_box);
    list((prefix + "_column_box").c_str(), tiling.column_box);
    tiling.groups = number((prefix + "_groups").c_str());
    tiling.columns = number((prefix + "_columns").c_str());
    tiling.masks_by_product = number((prefix + "_masks_by_product").c_str()) != 0;
    return tiling;
  }
};

template <typename T>
class Check {
 public:
  Check(const Line& line, bool timed) : line_(line), timed_(timed) {
    read_problem();
    const Problem& p = problem_;
    queries_ = p.batch * p.query_tokens() * p.heads;
    keys_ = p.batch * p.key_tokens() * p.key_heads;
    const size_t additional = size_t(p.batch) * p.additional * p.key_heads;
    in_.query = random<T>(queries_ * p.head_dim, 1, &wide_.query);
    in_.key = random<T>(keys_ * p.head_dim, 2, &wide_.key);
    in_.value = random<T>(keys_ * p.value_dim, 3, &wide_.value);
    if (p.additional > 0) {
      in_.additional_key = random<T>(additional * p.head_dim, 4, &wide_.additional_key);
      in_.additional_value = random<T>(additional * p.value_dim, 5, &wide_.additional_value);
    }
    if (line.number("bias") != 0) {
      in_.bias = random<float>(p.heads * p.bias_size(), 6, &wide_.bias);
    }
  }

  bool run() {
    std::printf("%s", line_.words.at("name").c_str());
    const bool backward = line_.words.at("pass") == "backward";
    const bool right = backward ? run_backward() : run_forward();
    std::printf("%s\n", right ? "" : "  WRONG");
    std::fflush(stdout);
    return right;
  }

 private:
  void read_problem() {
    Problem& p = problem_;
    p.element_type =
        sizeof(T) == 2 && std::is_same_v<T, __half> ? ElementType::kF16 : ElementType::kBF16;
    p.batch = line_.number("batch");
    p.heads = line_.number("heads");
    p.key_heads = line_.number("key_heads");
    p.head_dim = line_.number("head_dim");
    p.value_dim = line_.number("value_dim");
    p.additional = line_.number("additional");
    p.rank = line_.number("rank");
    p.scale = std::stod(line_.words.at("scale"));
    line_.list("query_grid", p.query_grid);
    line_.list("key_grid", p.key_grid);
    int32_t size[kMaxRank], stride[kMaxRank], dilation[kMaxRank], causal[kMaxRank];
    line_.list("kernel_size", size);
    line_.list("stride", stride);
    line_.list("dilation", dilation);
    line_.list("is_causal", causal);
    for (int a = 0; a < kMaxRank; ++a) {
      p.window[a] = AxisWindow{size[a], stride[a], dilation[a], causal[a] != 0};
    }
    if (line_.words.count("length") == 0) return;
    std::vector<int32_t> frame;
    for (const char* field : {"length", "query_origin", "key_origin"}) {
      int32_t values[kMaxRank];
      line_.list(field, values);
      frame.insert(frame.end(), values + kMaxRank - p.rank, values + kMaxRank);
    }
    auto* device = memory_.take<int32_t>(frame.size());
    require(cudaMemcpy(device, frame.data(), frame.size() * sizeof(int32_t),
                       cudaMemcpyHostToDevice));
    p.frame = device;
  }

  template <typename U>
  const U* random(size_t count, uint64_t seed, const void** wide) {
    U* array = memory_.take<U>(count);
    double* values = memory_.take<double>(count);
    fill<<<1024, 256>>>(array, values, count, seed);
    *wide = values;
    return array;
  }

  // Whether a result is as close to the expected one as its type allows.
  template <typename U>
  bool close(const char* name, const U* result, const double* expected, size_t count,
             double tolerance) {
    double sums[3], *device = memory_.take<double>(3);
    require(cudaMemset(device, 0, sizeof(sums)));
    compare<<<256, 256>>>(result, expected, count, device);
    require(cudaMemcpy(sums, device, sizeof(sums), cudaMemcpyDeviceToHost));
    // The gradients of windows of one key are zeros.
    const double scale = std::max(std::sqrt(sums[1] / std::max<size_t>(count, 1)), 1e-2);
    const double error = std::sqrt(sums[0] / std::max<size_t>(count, 1)) / scale;
    std::printf("  %s %.1e", name, error);
    return sums[2] == 0 && error < tolerance;
  }

  template <typename Launch>
  void time(const char* name, const Launch& launch) {
    std::printf("  %s %.4f ms", name, milliseconds(launch));
  }

  ForwardCall wide_forward(double* out, double* lse) const {
    ForwardCall call{problem_, wide_, out, lse};
    call.problem.element_type = ElementType::kF64;
    return call;
  }

  bool run_forward() {
    const HopperTiling tiling = line_.tiling("forward");
    const size_t count = queries_ * problem_.value_dim;
    T* out = memory_.take<T>(count);
    float* lse = memory_.take<float>(queries_);
    const ForwardCall call{problem_, in_, out, lse};
    if (timed_) {
      time("forward", [&] { return forward_sm90(call, tiling, nullptr); });
      return true;
    }
    require(forward_sm90(call, tiling, nullptr));
    double* wide_out = memory_.take<double>(count);
    double* wide_lse = memory_.take<double>(queries_);
    require(forward_naive(wide_forward(wide_out, wide_lse), nullptr));
    const bool right = close("out", out, wide_out, count, kTolerance);
    return close("lse", lse, wide_lse, queries_, 2e-3) && right;
  }

  bool run_backward() {
    const Problem& p = problem_;
    const HopperBackwardTiling tiling{line_.tiling("dquery"), line_.tiling("dkey_dvalue")};
    const size_t counts[3] = {queries_ * p.head_dim, keys_ * p.head_dim, keys_ * p.value_dim};
    const void *wide_dout, *wide_dlse;
    const T* dout = random<T>(queries_ * p.value_dim, 7, &wide_dout);
    const float* dlse = random<float>(queries_, 8, &wide_dlse);
    T* out = memory_.take<T>(queries_ * p.value_dim);
    T* gradients[3];
    for (int i = 0; i < 3; ++i) gradients[i] = memory_.take<T>(counts[i]);
    float* lse = memory_.take<float>(queries_);
    float* delta = memory_.take<float>(queries_);
    BackwardCall call{};
    call.problem = p;
    call.in = in_;
    call.dout = dout;
    call.lse = lse;
    call.delta = delta;
    call.dquery = gradients[0];
    call.dkey = gradients[1];
    call.dvalue = gradients[2];
    const bool in_one_walk = line_.words.count("gradients_groups") != 0;
    const HopperTiling walk = in_one_walk ? line_.tiling("gradients") : HopperTiling{};
    float* workspace = memory_.take<float>(
        in_one_walk ? gradients_sm90_workspace(p) : backward_sm90_workspace(call));
    if (timed_) {  // of any numbers
      require(cudaMemset(lse, 0, queries_ * sizeof(float)));
      require(cudaMemset(delta, 0, queries_ * sizeof(float)));
      BackwardCall own = call;
      own.dkey = own.dvalue = nullptr;
      time("dquery", [&] { return backward_sm90(own, tiling, nullptr, nullptr); });
      own = call;
      own.dquery = nullptr;
      time("dkey_dvalue", [&] { return backward_sm90(own, tiling, nullptr, nullptr); });
      time("apart", [&] { return backward_sm90(call, tiling, workspace, nullptr); });
      if (in_one_walk) {
        time("gradients", [&] { return gradients_sm90(call, walk, workspace, nullptr); });
      }
      return true;
    }
    double* wide_out = memory_.take<double>(queries_ * p.value_dim);
    double* wide_lse = memory_.take<double>(queries_);
    double* wide_delta = memory_.take<double>(queries_);
    double* wide_gradients[3];
    for (int i = 0; i < 3; ++i) wide_gradients[i] = memory_.take<double>(counts[i]);
    const ForwardCall forward = wide_forward(wide_out, wide_lse);
    require(forward_naive(forward, nullptr));
    make_delta<<<1024, 256>>>(wide_out, static_cast<const double*>(wide_dout),
                              static_cast<const double*>(wide_dlse), queries_, p.value_dim,
                              wide_delta);
    narrow<<<1024, 256>>>(wide_lse, lse, queries_);
    narrow<<<1024, 256>>>(wide_out, out, queries_ * p.value_dim);
    require(cudaMemset(delta, 0xff, queries_ * sizeof(float)));
    BackwardCall wide = call;
    wide.problem = forward.problem;
    wide.in = wide_;
    wide.dout = wide_dout;
    wide.lse = wide_lse;
    wide.delta = wide_delta;
    wide.dquery = wide_gradients[0];
    wide.dkey = wide_gradients[1];
    wide.dvalue = wide_gradients[2];
    require(backward_naive(wide, nullptr));
    bool right = true;
    const auto check = [&](const std::string& prefix) {
      const char* names[3] = {"dquery", "dkey", "dvalue"};
      for (int i = 0; i < 3; ++i) {
        right = close((prefix + names[i]).c_str(), gradients[i], wide_gradients[i], counts[i],
                      kTolerance) &&
                right;
        require(cudaMemset(gradients[i], 0xff, counts[i] * sizeof(T)));
      }
    };
    BackwardCall with_delta = call;  // which is given to what follows
    with_delta.out = out;
    with_delta.dlse = dlse;
    require(backward_sm90(with_delta, tiling, workspace, nullptr));
    check("");
    if (in_one_walk) {
      require(gradients_sm90(call, walk, workspace, nullptr));
      check("in one walk ");
    }
    return right;
  }

  static constexpr double kTolerance = 1.5e-2;

  const Line& line_;
  const bool timed_;
  Memory memory_;
  Problem problem_{};
  Inputs in_{}, wide_{};
  size_t queries_, keys_;  // rows of their arrays
};

}  // namespace
}  // namespace jax_na::cuda

int main(int count, char** arguments) {
  using namespace jax_na::cuda;
  const bool timed = count == 2 && std::strcmp(arguments[1], "time") == 0;
  if (!timed && (count != 2 || std::strcmp(arguments[1], "check") != 0)) {
    std::printf("usage: sm90_check check|time < problems\n");
    return 2;
  }
  int wrong = 0, all = 0;
  for (std::string text; std::getline(std::cin, text); ++all) {
    const Line line(text);
    const bool half = line.words.at("type") == "f16";
    wrong += half ? !Check<__half>(line, timed).run() : !Check<__nv_bfloat16>(line, timed).run();
  }
  std::printf("%d passed, %d failed\n", all - wrong, wrong);
  return wrong != 0;
}
