#include "tensor_map.h"

namespace jax_na::cuda::sm90 {
namespace {

constexpr int32_t kMostElements = 256;  // of a box on one axis, before striding
constexpr int32_t kLargestStride = 8;

// The driver's function; the extension does not link to the driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

int32_t spanned(const TokenBox& box, int axis) {
  return (box.extent[axis] - 1) * box.dilation[axis] + 1;
}

}  // namespace

bool box_is_copyable(const TokenBox& box) {
  for (int a = 0; a < kMaxRank; ++a) {
    if (spanned(box, a) > kMostElements || box.dilation[a] > kLargestStride) return false;
  }
  return true;
}

cudaError_t make_tensor_map(const TokenArray& array, const TokenBox& box, CUtensorMap* map) {
  static const auto encode = encode_function();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const bool sums = array.type == ElementType::kF32;
  const cuuint64_t token_bytes = cuuint64_t{static_cast<uint32_t>(array.heads)} * array.dim *
                                 (sums ? 4 : 2);
  cuuint64_t size[5] = {static_cast<cuuint64_t>(array.heads) * array.dim, 0, 0, 0,
                        static_cast<cuuint64_t>(array.batch)};
  cuuint64_t pitch[4] = {token_bytes, 0, 0, 0};
  cuuint32_t extent[5] = {static_cast<cuuint32_t>(box.channels), 0, 0, 0, 1};
  cuuint32_t stride[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < kMaxRank; ++i) {  // the copy engine counts axes from the last
    const int axis = kMaxRank - 1 - i;
    size[1 + i] = array.grid[axis];
    pitch[1 + i] = pitch[i] * array.grid[axis];
    extent[1 + i] = spanned(box, axis);
    stride[1 + i] = box.dilation[axis];
  }
  const auto type = sums                                 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : array.type == ElementType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int row_bytes = box.channels * (sums ? 4 : 2);
  const CUresult status =
      encode(map, type, 5, const_cast<void*>(array.data), size, pitch, extent, stride,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_na::cuda::sm90
