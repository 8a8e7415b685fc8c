// Which Hopper kernel runs a forward pass.
#include "plans.cuh"
#include "sm90.h"
#include "variants.h"

namespace jax_na::cuda {
namespace {

using namespace sm90;

TokenArray token_array(const Problem& p, const void* data, const int32_t (&grid)[kMaxRank],
                       int32_t heads, int32_t dim) {
  return {data, p.element_type, p.batch, {grid[0], grid[1], grid[2]}, heads, dim};
}

TokenBox token_box(const Problem& p, const int32_t (&extent)[kMaxRank], int32_t channels) {
  TokenBox box{{extent[0], extent[1], extent[2]}, {}, channels};
  for (int a = 0; a < kMaxRank; ++a) box.dilation[a] = p.window[a].dilation;
  return box;
}

template <typename T>
cudaError_t with_type(const ForwardPlan& plan, const HopperTiling& tiling, cudaStream_t stream) {
  switch (sm90::padded_dim(plan.call.problem)) {
    case 32:
      return launch_forward<T, 32>(plan, tiling.columns, tiling.groups, stream);
    case 64:
      return launch_forward<T, 64>(plan, tiling.columns, tiling.groups, stream);
    case 96:
      return launch_forward<T, 96>(plan, tiling.columns, tiling.groups, stream);
    case 128:
      return launch_forward<T, 128>(plan, tiling.columns, tiling.groups, stream);
    case 192:
      return launch_forward<T, 192>(plan, tiling.columns, tiling.groups, stream);
    case 256:
      return launch_forward<T, 256>(plan, tiling.columns, tiling.groups, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

bool is_box(const int32_t (&box)[kMaxRank], int32_t most) {
  int64_t size = 1;
  for (const int32_t extent : box) {
    if (extent < 1) return false;
    size *= extent;
  }
  return size <= most;
}

}  // namespace

cudaError_t forward_sm90(const ForwardCall& call, const HopperTiling& tiling,
                         cudaStream_t stream) {
  const Problem& p = call.problem;
  if (p.batch == 0 || p.query_tokens() == 0 || p.heads == 0) return cudaSuccess;
  const int dim = sm90::padded_dim(p);
  if (dim == 0 || p.head_dim % 8 != 0 || p.value_dim % 8 != 0 ||
      !is_box(tiling.row_box, kGroupRows) || !is_box(tiling.column_box, tiling.columns)) {
    return cudaErrorInvalidValue;
  }
  ForwardPlan plan{};
  plan.call = call;
  Cut& cut = plan.cut;
  cut.group_axis = kMaxRank - p.rank;
  cut.rows = BoxOrder(tiling.row_box);
  cut.columns = BoxOrder(tiling.column_box);
  for (int a = 0; a < kMaxRank; ++a) cut.column_extent[a] = Divisor(tiling.column_box[a]);
  int32_t cta[kMaxRank] = {tiling.row_box[0], tiling.row_box[1], tiling.row_box[2]};
  cta[cut.group_axis] *= tiling.groups;
  cut.ctas = TileGrid(p.query_grid, p.window, cta);
  plan.group = Divisor(p.heads / p.key_heads);
  plan.key_heads = Divisor(p.key_heads);
  const int64_t tiles = p.batch * p.heads * cut.ctas.order.size;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  plan.tiles = static_cast<int32_t>(tiles);

  const int32_t channels = dim % 64 == 0 ? 64 : 32;
  const TokenBox rows = token_box(p, tiling.row_box, channels);
  const TokenBox columns = token_box(p, tiling.column_box, channels);
  if (!box_is_copyable(rows) || !box_is_copyable(columns)) return cudaErrorInvalidValue;
  const auto map = [&](const TokenArray& array, const TokenBox& box, CUtensorMap* result) {
    return make_tensor_map(array, box, result);
  };
  cudaError_t status = map(
      token_array(p, call.in.query, p.query_grid, p.heads, p.head_dim), rows, &plan.query);
  if (status == cudaSuccess && p.key_tokens() > 0) {
    status = map(token_array(p, call.in.key, p.key_grid, p.key_heads, p.head_dim), columns,
                 &plan.key);
    if (status == cudaSuccess) {
      status = map(token_array(p, call.in.value, p.key_grid, p.key_heads, p.value_dim), columns,
                   &plan.value);
    }
  }
  if (status == cudaSuccess && p.additional > 0) {
    const int32_t list[kMaxRank] = {1, 1, p.additional};
    const TokenBox piece{{1, 1, cut.columns.size}, {1, 1, 1}, channels};
    status = map(token_array(p, call.in.additional_key, list, p.key_heads, p.head_dim), piece,
                 &plan.additional_key);
    if (status == cudaSuccess) {
      status = map(token_array(p, call.in.additional_value, list, p.key_heads, p.value_dim),
                   piece, &plan.additional_value);
    }
  }
  if (status != cudaSuccess) return status;
  return p.element_type == ElementType::kBF16 ? with_type<__nv_bfloat16>(plan, tiling, stream)
                                              : with_type<__half>(plan, tiling, stream);
}

}  // namespace jax_na::cuda
