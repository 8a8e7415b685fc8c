// The extension module jax_na._cuda: the CUDA kernels as XLA custom calls. It imports
// without a GPU and without a driver, because the CUDA runtime is linked statically.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "../cuda/fused/fused.h"
#include "../cuda/kernels.h"
#include "handlers.h"
#include "hopper.h"
#include "unfused.h"

namespace nb = nanobind;

namespace jax_na {
namespace {

// Launches a call; what else its kernels need is in the attributes.
template <typename Call>
using Kernel = cudaError_t(const Call&, const ffi::Dictionary&, cudaStream_t);

template <typename Call, const char* kName, Kernel<Call>* kKernel>
ffi::Error handle(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Dictionary attributes) {
  return run<Call>(kName, args, rets, attributes, [&](const Call& call) {
    const cudaError_t status = kKernel(call, attributes, stream);
    if (status != cudaSuccess) {
      throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " +
                               cudaGetErrorString(status));
    }
  });
}

// Kernels may be captured in CUDA graphs: they only launch.
template <typename Call, const char* kName, Kernel<Call>* kKernel>
XLA_FFI_Handler* handler() {
  constexpr auto kHandle = handle<Call, kName, kKernel>;
  XLA_FFI_DEFINE_HANDLER(bound, kHandle,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::PlatformStream<cudaStream_t>>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attrs(),
                         {ffi::Traits::kCmdBufferCompatible});
  return bound;
}

template <const char* kName, Kernel<ForwardCall>* kForward, Kernel<BackwardCall>* kBackward>
void add(nb::dict* registrations) {
  add_handler<ForwardCall>(registrations, kName, handler<ForwardCall, kName, kForward>());
  add_handler<BackwardCall>(registrations, kName, handler<BackwardCall, kName, kBackward>());
}

constexpr char kNaive[] = "naive", kFused[] = "fused", kGemm[] = "gemm";

cudaError_t forward_naive(const ForwardCall& call, const ffi::Dictionary&, cudaStream_t stream) {
  return cuda::forward_naive(call, stream);
}
cudaError_t backward_naive(const BackwardCall& call, const ffi::Dictionary&,
                           cudaStream_t stream) {
  return cuda::backward_naive(call, stream);
}

// The boxes of a plan (jax_na/_plan.py), one extent per axis of the caller.
cuda::Tiling tiling(const ffi::Dictionary& attributes, const Problem& p, const char* query,
                    const char* key) {
  cuda::Tiling tiling = {{1, 1, 1}, {1, 1, 1}};
  const Shape queries = integers(attributes, query, p.rank);
  const Shape keys = integers(attributes, key, p.rank);
  for (int a = 0; a < p.rank; ++a) {
    tiling.query_tile[kMaxRank - p.rank + a] = to_size(query, queries[a], 1);
    tiling.key_tile[kMaxRank - p.rank + a] = to_size(key, keys[a], 1);
  }
  return tiling;
}

cudaError_t forward_fused(const ForwardCall& call, const ffi::Dictionary& attributes,
                          cudaStream_t stream) {
  if (const auto hopper = hopper_forward(attributes, call.problem)) {
    return cuda::forward_sm90(call, *hopper, stream);
  }
  return cuda::forward_fused(call, tiling(attributes, call.problem, "query_tile", "key_box"),
                             attribute<bool>(attributes, "highest_precision"), stream);
}

cudaError_t backward_fused(const BackwardCall& call, const ffi::Dictionary& attributes,
                           cudaStream_t stream) {
  const Problem& p = call.problem;
  const auto splits = [&](const char* name) {
    return to_size(name, attribute<int64_t>(attributes, name), 1);
  };
  cuda::Tiling dbias = {};
  if (call.dbias != nullptr) dbias = tiling(attributes, p, "bias_query_tile", "bias_key_box");
  const cuda::BackwardTiling plan = {tiling(attributes, p, "query_tile", "key_box"), dbias,
                                     tiling(attributes, p, "query_box", "key_tile"),
                                     splits("bias_splits"), splits("additional_splits")};
  const auto at_once = hopper_gradients(attributes, p);
  const auto apart = hopper_backward(attributes, p);
  const int64_t hopper = at_once ? cuda::gradients_sm90_workspace(p)
                         : apart ? cuda::backward_sm90_workspace(call)
                                 : 0;
  const int64_t size = hopper + cuda::backward_fused_workspace(call, plan);
  if (call.workspace_size < size) {
    refuse("the workspace must hold ", size, " elements, got ", call.workspace_size);
  }
  BackwardCall rest = call;
  cudaError_t status = cudaSuccess;
  if (call.out != nullptr && (at_once || !apart)) status = cuda::make_delta(call, stream);
  if (status != cudaSuccess) return status;
  if (at_once || apart) {
    status = at_once ? cuda::gradients_sm90(call, *at_once, call.workspace, stream)
                     : cuda::backward_sm90(call, *apart, call.workspace, stream);
    if (status != cudaSuccess) return status;
    rest.dquery = rest.dkey = rest.dvalue = nullptr;
    rest.workspace += hopper;
  }
  return cuda::backward_fused(rest, plan, attribute<bool>(attributes, "highest_precision"),
                              rest.workspace, stream);
}

using UnfusedNaive = cudaError_t(const cuda::UnfusedCall&, cudaStream_t);
using UnfusedGemm = cudaError_t(const cuda::UnfusedCall&, const cuda::UnfusedTiling&, bool,
                                cudaStream_t);

template <typename Call, UnfusedNaive* kLaunch>
cudaError_t unfused_naive(const Call& call, const ffi::Dictionary&, cudaStream_t stream) {
  return kLaunch(call, stream);
}
template <typename Call, UnfusedGemm* kLaunch>
cudaError_t unfused_gemm(const Call& call, const ffi::Dictionary& attributes,
                         cudaStream_t stream) {
  return kLaunch(call, unfused_tiling(attributes, call.problem),
                 attribute<bool>(attributes, "highest_precision"), stream);
}

template <typename Call, UnfusedNaive* kByRows, UnfusedGemm* kByTiles>
void add_unfused(nb::dict* registrations) {
  add_handler<Call>(registrations, kNaive,
                    handler<Call, kNaive, unfused_naive<Call, kByRows>>());
  add_handler<Call>(registrations, kGemm,
                    handler<Call, kGemm, unfused_gemm<Call, kByTiles>>());
}

nb::dict registrations() {
  nb::dict all;
  add<kNaive, forward_naive, backward_naive>(&all);
  add<kFused, forward_fused, backward_fused>(&all);
  add_unfused<PairCall, cuda::pair_naive, cuda::pair_gemm>(&all);
  add_unfused<GatherCall, cuda::gather_naive, cuda::gather_gemm>(&all);
  add_unfused<ScatterCall, cuda::scatter_naive, cuda::scatter_gemm>(&all);
  return all;
}

// Starts no context, unlike most calls of the runtime.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) return 0;
  return version;
}

}  // namespace
}  // namespace jax_na

NB_MODULE(_cuda, m) {
  m.attr("xla_ffi_api_version") = jax_na::xla_ffi_api_version();
  m.def("registrations", jax_na::registrations);
  m.def("runtime_version", [] { return CUDART_VERSION; });
  m.def("driver_version", jax_na::driver_version);
}
