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

// What differs between the maps of tokens and those of sums.
struct Elements {
  CUtensorMapDataType type;
  cuuint64_t bytes;
  CUtensorMapSwizzle swizzle;
};

cudaError_t make_map(const Problem& p, const int32_t (&grid)[kMaxRank], const void* array,
                     cuuint64_t channels, const Elements& elements, const TokenBox& box,
                     CUtensorMap* map) {
  static const auto encode = encode_function();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  cuuint64_t size[5], pitch[4];
  cuuint32_t extent[5], stride[5];
  size[0] = channels;
  extent[0] = box.channels;
  stride[0] = 1;
  pitch[0] = channels * elements.bytes;
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
      encode(map, elements.type, 5, const_cast<void*>(array), size, pitch, extent, stride,
             CU_TENSOR_MAP_INTERLEAVE_NONE, elements.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t make_tensor_maps(const Problem& p, const int32_t (&grid)[kMaxRank], int32_t heads,
                             const void* const (&arrays)[2], const TokenBox& box,
                             CUtensorMap (&maps)[2]) {
  if (int64_t{grid[0]} * grid[1] * grid[2] == 0) return cudaSuccess;
  const Elements elements{
      p.element_type == ElementType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, box.channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B};
  for (int k = 0; k < 2; ++k) {
    if (arrays[k] == nullptr) continue;
    const auto channels = static_cast<cuuint64_t>(heads) * (k == 0 ? p.head_dim : p.value_dim);
    const cudaError_t status =
        make_map(p, grid, arrays[k], channels, elements, box, &maps[k]);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t make_sum_map(const Problem& p, int32_t channels, const float* sums,
                         const TokenBox& box, CUtensorMap* map) {
  if (p.query_tokens() == 0) return cudaSuccess;
  const Elements elements{CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_128B};
  return make_map(p, p.query_grid, sums, static_cast<cuuint64_t>(p.heads) * channels, elements,
                  box, map);
}

}  // namespace jax_na::cuda::sm90
