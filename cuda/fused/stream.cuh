// The columns of a tile in shared memory: two arrays of the same tokens.
#pragma once

#include <cstdint>

#include "geometry.cuh"
#include "staging.cuh"

namespace jax_na::cuda::fused {

// The tile of one CTA: heads of a group, which read the same keys, are neighbours; then come
// tiles, which share halos, and then key heads. Or, with `all_heads`, all heads are neighbours, so
// that a CTA that goes on by a multiple of their number stays with its own.
struct TilePlace {
  int64_t batch;
  int32_t head, key_head;
  int32_t first[kMaxRank];  // local index of the first token

  __device__ __forceinline__ TilePlace(int32_t index, const TileGrid& grid,
                                       const AxisWindow* window, const Divisor& group,
                                       const Divisor& key_heads, bool all_heads = false) {
    int32_t member = index;
    int32_t rest = group.split(&member), tile;
    if (all_heads) {
      key_head = rest;
      tile = key_heads.split(&key_head);
      batch = grid.divide_size.split(&tile);
    } else {
      tile = rest;
      key_head = grid.divide_size.split(&tile);
      batch = key_heads.split(&key_head);
    }
    head = key_head * group.value + member;
    grid.first_token(tile, window, first);
  }

  // Some classes are shorter than others.
  __device__ __forceinline__ bool exists(const int32_t* grid) const {
    return first[0] < grid[0] && first[1] < grid[1] && first[2] < grid[2];
  }
};

// Keys and values of one key head: those of the grid, then the additional ones.
template <class Layout, int kColumns, int kThreads, int kElementBytes>
struct KeyStream {
  RowSource key, value;
  ColumnEntries entries;

  template <int kRows>
  __device__ __forceinline__ KeyStream(const Problem& p, const Inputs& in,
                                       const TilePlace& place,
                                       const TileTables<kRows, kColumns>& tables)
      : entries{tables.column} {
    const int64_t row = place.batch * p.key_tokens();
    key = row_source(in.key, row, place.key_head, p.key_heads, p.head_dim, kElementBytes);
    value = row_source(in.value, row, place.key_head, p.key_heads, p.value_dim, kElementBytes);
  }

  // To be called before what `walk` has at hand is copied.
  __device__ __forceinline__ void follow(const Walk& walk, const Problem& p, const Inputs& in,
                                         const TilePlace& place) {
    if (entries.in_list() || !walk.in_list || !walk.more()) return;
    entries = {nullptr};
    const int64_t row = place.batch * p.additional;
    key = row_source(in.additional_key, row, place.key_head, p.key_heads, p.head_dim,
                     kElementBytes);
    value = row_source(in.additional_value, row, place.key_head, p.key_heads, p.value_dim,
                       kElementBytes);
  }

  __device__ __forceinline__ void copy_keys(uint8_t* block, const Walk& walk) const {
    copy_columns<Layout, kColumns, kThreads>(entries, walk.token(), walk.guarded_limits(),
                                             ptx::shared_address(block), key);
  }
  __device__ __forceinline__ void copy_values(uint8_t* block, const Walk& walk) const {
    copy_columns<Layout, kColumns, kThreads>(entries, walk.token(), walk.guarded_limits(),
                                             ptx::shared_address(block), value);
  }
  __device__ __forceinline__ void copy_both(uint8_t* keys, uint8_t* values,
                                            const Walk& walk) const {
    copy_columns<Layout, kColumns, kThreads>(entries, walk.token(), walk.guarded_limits(),
                                             ptx::shared_address(keys), key,
                                             ptx::shared_address(values), value);
  }

  // The same to be started in parts, of nothing where the walk is at its end.
  __device__ __forceinline__ ColumnCopy<Layout, kColumns, kThreads> copy_of_both(
      uint8_t* keys, uint8_t* values, const Walk& walk) const {
    return {entries,
            walk.token(),
            walk.guarded_limits(),
            {ptx::shared_address(keys), ptx::shared_address(values)},
            {key, value},
            walk.more()};
  }
};

}  // namespace jax_na::cuda::fused
