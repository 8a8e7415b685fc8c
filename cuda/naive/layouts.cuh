// Host side of the naive kernels: which row layout suits a call, and how many blocks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../../ffi/problem.h"
#include "rows.cuh"

namespace jax_na::cuda {

// Blocks take their share of the work in a loop, because it may exceed what the x axis of
// a launch grid can count.
inline unsigned block_count(int64_t items, int64_t items_per_block) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  return static_cast<unsigned>(
      std::min((items + items_per_block - 1) / items_per_block, kMaxBlocks));
}

// Whether all pointers allow 16-byte accesses. Null ones do.
inline bool aligned_for_vectors(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

template <int kRegisters, typename T, typename Fn>
cudaError_t with_layout_of(const Problem& p, bool aligned, const Fn& fn) {
  constexpr int kElements = kRegisters * 4 / sizeof(AccumOf<T>);
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kLoads = kElements / kVector;
  if (!aligned || p.head_dim % kVector != 0 || p.value_dim % kVector != 0) {
    return fn(RowLayout<T, 1, 4, 16, true>{});
  }
  const int32_t dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 32) return fn(RowLayout<T, kVector, kLoads, 32 / kElements, false>{});
  if (dim <= 64) return fn(RowLayout<T, kVector, kLoads, 64 / kElements, false>{});
  if (dim <= 128) return fn(RowLayout<T, kVector, kLoads, 128 / kElements, false>{});
  if constexpr (256 / kElements <= kWarpLanes) {
    if (dim <= 256) return fn(RowLayout<T, kVector, kLoads, 256 / kElements, false>{});
  }
  return fn(RowLayout<T, kVector, kLoads, kWarpLanes, true>{});
}

// Calls fn(RowLayout{}), which returns the status of its launch, with the layout for the
// rows of a call. `kRegisters`: how many a lane's part of a widened row may take.
// `aligned`: whether all rows may be accessed as vectors, their length permitting.
template <int kRegisters, typename Fn>
cudaError_t with_layout(const Problem& p, bool aligned, const Fn& fn) {
  switch (p.element_type) {
    case ElementType::kF16:
      return with_layout_of<kRegisters, __half>(p, aligned, fn);
    case ElementType::kBF16:
      return with_layout_of<kRegisters, __nv_bfloat16>(p, aligned, fn);
    case ElementType::kF32:
      return with_layout_of<kRegisters, float>(p, aligned, fn);
    case ElementType::kF64:
      return with_layout_of<kRegisters, double>(p, aligned, fn);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_na::cuda
