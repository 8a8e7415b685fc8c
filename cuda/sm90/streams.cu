#include "streams.h"

namespace jax_na::cuda::sm90 {
namespace {

bool is_box(const int32_t (&box)[kMaxRank], int32_t most) {
  int64_t size = 1;
  for (const int32_t extent : box) {
    if (extent < 1) return false;
    size *= extent;
  }
  return size <= most;
}

// What the two sides of a launch have in common.
struct Grid {
  const int32_t (&tokens)[kMaxRank];
  int32_t heads;
  const void* array[2];
};

cudaError_t make_streams(const Problem& p, const HopperTiling& tiling, const Grid& rows,
                         const Grid& columns, bool has_bias, Streams* streams) {
  if (!is_box(tiling.row_box, kGroupRows) || !is_box(tiling.column_box, tiling.columns) ||
      tiling.groups < 1) {
    return cudaErrorInvalidValue;
  }
  Cut& cut = streams->cut;
  cut.group_axis = kMaxRank - p.rank;
  cut.rows = BoxOrder(tiling.row_box);
  cut.columns = BoxOrder(tiling.column_box);
  int32_t cta[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    cut.column_extent[a] = Divisor(tiling.column_box[a]);
    cta[a] = tiling.row_box[a] * (a == cut.group_axis ? tiling.groups : 1);
  }
  int32_t entries = 0;
  for (int a = cut.group_axis; a < kMaxRank; ++a) {
    cut.first_entry[a] = entries;
    entries += tiling.column_box[a];
  }
  cut.ctas = TileGrid(rows.tokens, p.window, cta);
  const int64_t tiles = p.batch * rows.heads * cut.ctas.order.size;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  streams->tiles = static_cast<int32_t>(tiles);
  streams->group = Divisor(rows.heads / p.key_heads);
  streams->key_heads = Divisor(p.key_heads);
  streams->members = columns.heads / p.key_heads;
  if (has_bias && streams->members * p.bias_size() > kLargestBias) return cudaErrorInvalidValue;
  streams->dim[0] = p.head_dim;
  streams->dim[1] = p.value_dim;

  const auto make_maps = [&](const Grid& side, const int32_t (&extent)[kMaxRank],
                             CUtensorMap(&maps)[2]) {
    TokenBox box{{extent[0], extent[1], extent[2]}, {}, channels_of_block(padded_dim(p))};
    for (int a = 0; a < kMaxRank; ++a) box.dilation[a] = p.window[a].dilation;
    return make_tensor_maps(p, side.tokens, side.heads, side.array, box, maps);
  };
  const cudaError_t status = make_maps(rows, tiling.row_box, streams->row);
  return status != cudaSuccess ? status
                               : make_maps(columns, tiling.column_box, streams->column);
}

}  // namespace

bool supported(const Problem& p) {
  return (p.element_type == ElementType::kBF16 || p.element_type == ElementType::kF16) &&
         p.head_dim > 0 && p.value_dim > 0 && p.head_dim % 8 == 0 && p.value_dim % 8 == 0 &&
         padded_dim(p) > 0 && p.query_tokens() < INT32_MAX && p.key_tokens() < INT32_MAX;
}

cudaError_t make_query_streams(const Problem& p, const HopperTiling& tiling,
                               const TokenPair& queries, const Inputs& in, Streams* streams) {
  const Grid rows{p.query_grid, p.heads, {queries.first, queries.second}};
  const Grid columns{p.key_grid, p.key_heads, {in.key, in.value}};
  const cudaError_t status =
      make_streams(p, tiling, rows, columns, in.bias != nullptr, streams);
  if (status != cudaSuccess || p.additional == 0) return status;
  const int32_t list[kMaxRank] = {1, 1, p.additional};
  const void* const arrays[2] = {in.additional_key, in.additional_value};
  const TokenBox piece{
      {1, 1, streams->cut.columns.size}, {1, 1, 1}, channels_of_block(padded_dim(p))};
  return make_tensor_maps(p, list, p.key_heads, arrays, piece, streams->list);
}

cudaError_t make_key_streams(const Problem& p, const HopperTiling& tiling, const Inputs& in,
                             const TokenPair& queries, Streams* streams) {
  const Grid rows{p.key_grid, p.key_heads, {in.key, in.value}};
  const Grid columns{p.query_grid, p.heads, {queries.first, queries.second}};
  return make_streams(p, tiling, rows, columns, in.bias != nullptr, streams);
}

}  // namespace jax_na::cuda::sm90
