// The extension module jax_na._cpu: the CPU kernels as XLA custom calls.
#include <nanobind/nanobind.h>

#include <functional>

#include "../cpu/kernels.h"
#include "handlers.h"
#include "parallel.h"
#include "window.h"

namespace nb = nanobind;

namespace jax_na {
namespace {

template <typename Call>
using Kernel = void(const Call&, const cpu::ParallelFor&);

template <typename Call, const char* kName, Kernel<Call>* kKernel>
ffi::Error handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Dictionary attributes) {
  return run<Call>(kName, args, rets, attributes, [&](const Call& call) {
    kKernel(call, [&](int64_t n, const std::function<void(int64_t)>& fn) {
      parallel_for(pool, n, fn);
    });
  });
}

template <typename Call, const char* kName, Kernel<Call>* kKernel>
XLA_FFI_Handler* handler() {
  constexpr auto kHandle = handle<Call, kName, kKernel>;
  XLA_FFI_DEFINE_HANDLER(
      bound, kHandle,
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
  return bound;
}

template <const char* kName, Kernel<ForwardCall>* kForward, Kernel<BackwardCall>* kBackward>
void add(nb::dict* registrations) {
  add_handler<ForwardCall>(registrations, kName, handler<ForwardCall, kName, kForward>());
  add_handler<BackwardCall>(registrations, kName, handler<BackwardCall, kName, kBackward>());
}

constexpr char kNaive[] = "naive";
constexpr char kFused[] = "fused";

nb::dict registrations() {
  nb::dict all;
  add<kNaive, cpu::forward_naive, cpu::backward_naive>(&all);
  add<kFused, cpu::forward_fused, cpu::backward_fused>(&all);
  return all;
}

// window.h as Python sees it: `find` is keys_of_query or queries_of_key.
template <AxisRange (*find)(const AxisWindow&, const AxisFrame&, int32_t)>
nb::tuple axis_range(int32_t kernel_size, int32_t stride, int32_t dilation, bool is_causal,
                     int32_t length, int32_t query_origin, int32_t query_length,
                     int32_t key_origin, int32_t key_length, int32_t index) {
  const AxisRange range =
      find({kernel_size, stride, dilation, is_causal},
           {length, query_origin, query_length, key_origin, key_length}, index);
  return nb::make_tuple(range.first, range.count, range.bias_row);
}

template <AxisRange (*find)(const AxisWindow&, const AxisFrame&, int32_t)>
void define_axis_range(nb::module_& m, const char* name, const char* index) {
  m.def(name, axis_range<find>, nb::arg("kernel_size"), nb::arg("stride"), nb::arg("dilation"),
        nb::arg("is_causal"), nb::arg("length"), nb::arg("query_origin"),
        nb::arg("query_length"), nb::arg("key_origin"), nb::arg("key_length"), nb::arg(index));
}

}  // namespace
}  // namespace jax_na

NB_MODULE(_cpu, m) {
  m.attr("xla_ffi_api_version") = jax_na::xla_ffi_api_version();
  m.def("registrations", jax_na::registrations);
  m.def("fused_instruction_set", jax_na::cpu::fused_instruction_set);
  jax_na::define_axis_range<jax_na::keys_of_query>(m, "keys_of_query", "query");
  jax_na::define_axis_range<jax_na::queries_of_key>(m, "queries_of_key", "key");
}
