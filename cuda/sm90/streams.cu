#include "streams.h"

#include <algorithm>

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

  int64_t size() const { return int64_t{tokens[0]} * tokens[1] * tokens[2]; }
};

// The axes in the order of tiles, the slowest first. Where the columns of a head exceed L2, tiles
// that are at work at one time are to see the same ones, so that they follow each other on the axis
// on which they are shortest beside the window; among equals, last on that of which a window holds
// the least.
void order_axes(const Problem& p, const Grid& rows, const Grid& columns,
                const int32_t (&tile)[kMaxRank], int32_t (&axes)[kMaxRank]) {
  constexpr int64_t kCached = 16 << 20;
  const int64_t bytes = columns.size() * (p.head_dim + p.value_dim) * 2;
  const auto before = [&](int a, int b) {
    const AxisWindow &x = p.window[a], &y = p.window[b];
    const int64_t share_x = int64_t{tile[a]} * y.kernel_size;
    const int64_t share_y = int64_t{tile[b]} * x.kernel_size;
    if (share_x != share_y) return share_x > share_y;
    return int64_t{x.kernel_size} * x.dilation * rows.tokens[b] <
           int64_t{y.kernel_size} * y.dilation * rows.tokens[a];
  };
  for (int i = 0; i < kMaxRank; ++i) axes[i] = i;
  if (bytes > kCached) std::stable_sort(axes + kMaxRank - p.rank, axes + kMaxRank, before);
}

// Whether tiles of queries visit about as many boxes wherever they are in the grid, so that no
// pipeline that stays has much more to do than others.
bool are_even(const Problem& p, const Cut& cut) {
  constexpr double kTolerated = 1.125;  // still pays (NOTES.md)
  double ratio = 1;  // of the most to the mean
  for (int a = cut.group_axis; a < kMaxRank; ++a) {
    const AxisWindow& window = p.window[a];
    const int32_t length = (p.query_grid[a] + window.dilation - 1) / window.dilation;
    const int32_t extent = cut.ctas.tile.extent[a], tiles = (length + extent - 1) / extent;
    int64_t sum = 0, most = 0;
    for (int32_t first = 0; first < length; first += extent) {
      const int32_t last = std::min(first + extent, length) - 1;
      const int64_t columns = class_keys_of_query(window, last, length).end -
                              class_keys_of_query(window, first, length).begin;
      const int64_t boxes = (columns + cut.columns.extent[a] - 1) / cut.columns.extent[a];
      sum += boxes;
      most = std::max(most, boxes);
    }
    ratio *= double(most * tiles) / double(sum);
  }
  return ratio <= kTolerated;
}

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
  int32_t axes[kMaxRank];
  order_axes(p, rows, columns, cta, axes);
  cut.ctas = TileGrid(rows.tokens, p.window, cta, axes);
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

void deal_tiles(int32_t pipelines, Streams* streams) {
  streams->step = pipelines;
  streams->first_spare = streams->tiles;
  streams->stays = false;
}

void deal_tiles_in_place(const Problem& p, int32_t pipelines, bool keeps_head,
                         Streams* streams) {
  deal_tiles(pipelines, streams);
  const int32_t tiles = streams->tiles;
  const int64_t places =
      int64_t{streams->cut.ctas.order.size} * (keeps_head ? p.heads : streams->group.value);
  const auto step = static_cast<int32_t>(pipelines / places * places);
  if (p.frame != nullptr || step == 0) return;
  // Pipelines that are left over are to take tiles that are, in the meantime.
  const int32_t rounds = tiles / step, rest = tiles % step;
  const bool is_shared = rest <= int64_t{pipelines - step} * rounds;
  if (rounds + (is_shared ? 0 : 1) > (tiles + pipelines - 1) / pipelines) return;
  if (!are_even(p, streams->cut)) return;
  streams->step = step;
  if (is_shared) streams->first_spare = tiles - rest;
  streams->stays = true;
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
