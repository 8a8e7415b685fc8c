// Whether the kernels for Hopper run a call, and how: by the plan that the call may carry, and by
// the device that it runs on. A call for any other device, or of a program that was exported
// without such a plan, is one for the portable kernels. Attributes of a pass:
//
//   sm90_<pass>_row_box, sm90_<pass>_column_box   int64 [rank]
//   sm90_<pass>_kernel                            int64 [2]: columns, groups
//   sm90_<pass>_masks_by_product                  int64 [1]: 0 or 1, which is where it is left out
//
// They are a stable interface, as those of decode.h are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "../cuda/sm90/sm90.h"
#include "../cuda/sm90/variants.h"
#include "decode.h"

namespace jax_na {

// Of the current device, which XLA has made that of the stream. Not so for newer devices: they
// lack the instructions.
inline bool device_is_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
             cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) ==
             cudaSuccess &&
         major == 9 && minor == 0;
}

// The plan of a pass, where the call carries one.
inline std::optional<cuda::HopperTiling> hopper_tiling(const ffi::Dictionary& attributes,
                                                       const Problem& p,
                                                       const std::string& pass) {
  const std::string row_box = "sm90_" + pass + "_row_box";
  const std::string column_box = "sm90_" + pass + "_column_box";
  const std::string kernel = "sm90_" + pass + "_kernel";
  if (!attributes.contains(kernel)) return std::nullopt;
  const Shape shape = integers(attributes, kernel.c_str(), 2);
  const std::string product = "sm90_" + pass + "_masks_by_product";
  cuda::HopperTiling tiling = {{1, 1, 1}, {1, 1, 1}, to_size(kernel, shape[1], 1),
                               to_size(kernel, shape[0], 1), true};
  if (attributes.contains(product)) {
    tiling.masks_by_product = integers(attributes, product.c_str(), 1)[0] != 0;
  }
  const Shape rows = integers(attributes, row_box.c_str(), p.rank);
  const Shape columns = integers(attributes, column_box.c_str(), p.rank);
  for (int a = 0; a < p.rank; ++a) {
    tiling.row_box[kMaxRank - p.rank + a] = to_size(row_box, rows[a], 1);
    tiling.column_box[kMaxRank - p.rank + a] = to_size(column_box, columns[a], 1);
  }
  return tiling;
}

// Whether table `Kernels` has the kernel of a tiling, among those for padded head dimensions
// `kDims`: an exported program may ask for one that a later version has no more.
template <template <int> class Kernels, int... kDims>
bool is_compiled(const Problem& p, const cuda::HopperTiling& tiling) {
  bool found = false;
  const auto search = [&](int dim, const auto& variants) {
    if (dim != cuda::sm90::padded_dim(p)) return;
    for (const cuda::sm90::Variant& variant : variants) {
      found |= variant.columns == tiling.columns && variant.groups == tiling.groups;
    }
  };
  (search(kDims, Kernels<kDims>::kList), ...);
  return found;
}

// How the kernels for Hopper run a pass; nothing where the portable ones do.
inline std::optional<cuda::HopperTiling> hopper_forward(const ffi::Dictionary& attributes,
                                                        const Problem& p) {
  const auto tiling = hopper_tiling(attributes, p, "forward");
  if (!tiling || !is_compiled<cuda::sm90::Forward, 32, 64, 96, 128, 192, 256>(p, *tiling) ||
      !device_is_hopper()) {
    return std::nullopt;
  }
  return tiling;
}

// All gradients at once; comes before those apart.
inline std::optional<cuda::HopperTiling> hopper_gradients(const ffi::Dictionary& attributes,
                                                          const Problem& p) {
  const auto tiling = hopper_tiling(attributes, p, "gradients");
  if (!tiling || !is_compiled<cuda::sm90::Gradients, 32, 64, 128>(p, *tiling) ||
      !device_is_hopper()) {
    return std::nullopt;
  }
  return tiling;
}

inline std::optional<cuda::HopperBackwardTiling> hopper_backward(
    const ffi::Dictionary& attributes, const Problem& p) {
  const auto dquery = hopper_tiling(attributes, p, "dquery");
  const auto dkey_dvalue = hopper_tiling(attributes, p, "dkey_dvalue");
  if (!dquery || !is_compiled<cuda::sm90::DQuery, 32, 64, 96, 128>(p, *dquery) ||
      !dkey_dvalue || !is_compiled<cuda::sm90::DKey, 32, 64, 96, 128>(p, *dkey_dvalue) ||
      !device_is_hopper()) {
    return std::nullopt;
  }
  return cuda::HopperBackwardTiling{*dquery, *dkey_dvalue};
}

}  // namespace jax_na
