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

}  // namespace

cudaError_t make_tensor_maps(const Problem& p, const int32_t (&grid)[kMaxRank], int32_t heads,
                             const void* const (&arrays)[2], const TokenBox& box,
                             CUtensorMap (&maps)[2]) {
  if (int64_t{grid[0]} * grid[1] * grid[2] == 0) return cudaSuccess;
  static const auto encode = encode_function();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const auto type = p.element_type == ElementType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle =
      box.channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  cuuint64_t size[5], pitch[4];
  cuuint32_t extent[5], stride[5];
  for (int k = 0; k < 2; ++k) {
    if (arrays[k] == nullptr) continue;
    const cuuint64_t channels =
        static_cast<cuuint64_t>(heads) * (k == 0 ? p.head_dim : p.value_dim);
    size[0] = channels;
    extent[0] = box.channels;
    stride[0] = 1;
    pitch[0] = channels * 2;
    for (int i = 1; i <= kMaxRank; ++i) {  // the copy engine counts axes from the last
      const int axis = kMaxRank - i;
      size[i] = grid[axis];
      pitch[i] = pitch[i - 1] * grid[axis];
      extent[i] = (box.extent[axis] - 1) * box.dilation[axis] + 1;
      stride[i] = box.dilation[axis];
      if (extent[i] > kMostElements || box.dilation[axis] > kLargestStride) {
        return cudaErrorInvalidValue;
      }
    }
    size[4] = p.batch;
    extent[4] = stride[4] = 1;
    const CUresult status =
        encode(&maps[k], type, 5, const_cast<void*>(arrays[k]), size, pitch, extent, stride,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace jax_na::cuda::sm90
