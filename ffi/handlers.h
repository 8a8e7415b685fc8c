// What the modules of all platforms share: from a decoded call to a handler under its name.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>
#include <new>
#include <string>

#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_na {

// What a handler computes, by its type of call.
template <typename Call>
constexpr const char* kFunction = nullptr;
template <>
inline constexpr const char* kFunction<ForwardCall> = "forward";
template <>
inline constexpr const char* kFunction<BackwardCall> = "backward";

// Target names are a stable interface: exported programs and jax_na/_ffi.py refer to them.
template <typename Call>
std::string target_name(const char* implementation) {
  return std::string("jax_na_") + kFunction<Call> + "_" + implementation;
}

// Decodes a call and launches it, unless it has nothing to write. Exceptions, also those
// that `launch` throws, end here: XLA calls handlers through a C interface.
template <typename Call, typename Launch>
ffi::Error run(const char* implementation, const ffi::RemainingArgs& args,
               const ffi::RemainingRets& rets, const ffi::Dictionary& attributes,
               const Launch& launch) {
  const auto error = [&](ffi::ErrorCode code, const std::string& message) {
    return ffi::Error(code, target_name<Call>(implementation) + ": " + message);
  };
  try {
    Call call;
    if (decode(args, rets, attributes, &call)) launch(call);
    return ffi::Error::Success();
  } catch (const InvalidCall& e) {
    return error(ffi::ErrorCode::kInvalidArgument, e.what());
  } catch (const std::bad_alloc&) {
    return error(ffi::ErrorCode::kResourceExhausted, "out of memory");
  } catch (const std::exception& e) {
    return error(ffi::ErrorCode::kInternal, e.what());
  }
}

// Adds a handler of one implementation to what a module's registrations() returns.
template <typename Call>
void add_handler(nanobind::dict* registrations, const char* implementation,
                 XLA_FFI_Handler* handler) {
  (*registrations)[target_name<Call>(implementation).c_str()] =
      nanobind::capsule(reinterpret_cast<void*>(handler));
}

inline nanobind::tuple xla_ffi_api_version() {
  return nanobind::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_na
