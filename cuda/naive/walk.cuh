// Who sees whom, for one row of the query or of the key array at a time.
#pragma once

#include <cstdint>

#include "../../ffi/problem.h"
#include "rows.cuh"

namespace jax_na::cuda {

// One row of a [batch, tokens, heads, channels] array. Rows are dealt out with the tokens
// of one head next to each other, because their windows overlap: what one of them reads,
// its neighbours find in the cache.
struct Row {
  int64_t batch, token;
  int32_t head;
};

__device__ __forceinline__ Row row_at(int64_t i, int64_t tokens, int32_t heads) {
  const int64_t plane = i / tokens;
  return {plane / heads, i % tokens, static_cast<int32_t>(plane % heads)};
}

__device__ __forceinline__ int64_t query_row(const Problem& p, int64_t batch, int64_t token,
                                             int32_t head) {
  return (batch * p.query_tokens() + token) * p.heads + head;
}
__device__ __forceinline__ int64_t key_row(const Problem& p, int64_t batch, int64_t token,
                                           int32_t key_head) {
  return (batch * p.key_tokens() + token) * p.key_heads + key_head;
}
__device__ __forceinline__ int64_t additional_row(const Problem& p, int64_t batch, int64_t m,
                                                  int32_t key_head) {
  return (batch * p.additional + m) * p.key_heads + key_head;
}

// Where the bias table of one sample and head begins.
__device__ __forceinline__ int64_t bias_table(const Problem& p, int64_t batch, int32_t head) {
  return batch * p.bias_batch_stride + head * p.bias_size();
}

__device__ __forceinline__ int32_t key_head_of(const Problem& p, int32_t head) {
  return head / (p.heads / p.key_heads);
}

struct Position {
  int32_t axis[kMaxRank];
};

__device__ __forceinline__ Position position_of(int64_t token, int32_t rows, int32_t columns) {
  const int64_t line = token / columns;
  return {{static_cast<int32_t>(line / rows), static_cast<int32_t>(line % rows),
           static_cast<int32_t>(token % columns)}};
}
__device__ __forceinline__ Position position_of(int64_t token, const int32_t* grid) {
  return position_of(token, grid[1], grid[2]);
}

__device__ __forceinline__ bool query_in_grid(const Problem& p, int64_t batch,
                                              const Position& query) {
  bool inside = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    inside = inside && query_in_grid(p.axis_frame(batch, a), query.axis[a]);
  }
  return inside;
}

// Goes through a box of tokens in the grid of the query or the key array, line by line
// along the last axis. kBiasStep is +1 along the keys of a query, -1 along the queries of
// a key. Starts out with nothing to visit.
template <int kBiasStep>
struct LineWalk {
  int64_t token = 0;   // the first one of the line at hand
  int64_t bias = 0;    // its bias index, in the table of one head
  int32_t length = 0;  // of the line at hand, in tokens; 0 when all lines are done
  int32_t step = 1;    // from token to token

  // `grid` is the one that is walked, here and below.
  __device__ __forceinline__ void visit(const AxisRange (&range)[kMaxRank], const Problem& p,
                                        const int32_t* grid) {
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      first_token_ = (a == 0 ? 0 : first_token_ * grid[a]) + range[a].first;
      first_bias_ = (a == 0 ? 0 : first_bias_ * p.bias_extent(a)) + range[a].bias_row;
    }
    planes_ = range[0].count;
    lines_ = range[1].count;
    full_length_ = range[2].count;
    step = p.window[2].dilation;
    restart(p, grid);
  }

  // One line of the tokens 0 to list_length - 1.
  __device__ __forceinline__ void visit_list(int32_t list_length) {
    planes_ = lines_ = 1;
    length = full_length_ = list_length;
  }

  __device__ __forceinline__ void restart(const Problem& p, const int32_t* grid) {
    plane_ = line_ = 0;
    seek(p, grid);
  }

  __device__ __forceinline__ void next_line(const Problem& p, const int32_t* grid) {
    if (++line_ == lines_) {
      line_ = 0;
      ++plane_;
    }
    seek(p, grid);
  }

 private:
  int64_t first_token_ = 0, first_bias_ = 0;
  int32_t planes_ = 0, lines_ = 0, full_length_ = 0;
  int32_t plane_ = 0, line_ = 0;

  __device__ __forceinline__ void seek(const Problem& p, const int32_t* grid) {
    const int64_t lines = int64_t(plane_) * p.window[0].dilation * grid[1] +
                          int64_t(line_) * p.window[1].dilation;
    const int64_t bias_lines = int64_t(plane_) * p.bias_extent(1) + line_;
    token = first_token_ + lines * grid[2];
    bias = first_bias_ + kBiasStep * bias_lines * p.bias_extent(2);
    length = plane_ < planes_ && line_ < lines_ ? full_length_ : 0;
  }
};

using KeyWalk = LineWalk<+1>;
using QueryWalk = LineWalk<-1>;

// The keys that a query sees.
__device__ __forceinline__ void visit_keys(const Problem& p, int64_t batch,
                                           const Position& query, KeyWalk* walk) {
  AxisRange range[kMaxRank];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    range[a] = keys_of_query(p.window[a], p.axis_frame(batch, a), query.axis[a]);
  }
  walk->visit(range, p, p.key_grid);
}

// The queries that see a key.
__device__ __forceinline__ void visit_queries(const Problem& p, int64_t batch,
                                              const Position& key, QueryWalk* walk) {
  AxisRange range[kMaxRank];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    range[a] = queries_of_key(p.window[a], p.axis_frame(batch, a), key.axis[a]);
  }
  walk->visit(range, p, p.query_grid);
}

// Neighbouring keys of one query: where their rows and their biases are.
template <typename T>
struct KeyLine {
  const T* key;                  // of the first one
  const T* value;                // of the first one
  const AccumOf<T>* bias;        // of the first one; the others follow; null without bias
  int64_t key_step, value_step;  // from one to the next, in elements
  int32_t length;
};

// All keys of one query, as lines. A query has two such sets: the window and the
// additional keys.
template <typename T>
class KeySet {
 public:
  __device__ __forceinline__ static KeySet window(const Problem& p, const Inputs& in,
                                                  const Row& query, const Position& position,
                                                  bool active) {
    KeySet set(p, in.key, in.value, key_row(p, query.batch, 0, key_head_of(p, query.head)));
    if (active) visit_keys(p, query.batch, position, &set.walk_);
    if (in.bias != nullptr) {
      set.bias_ = static_cast<const AccumOf<T>*>(in.bias) +
                  bias_table(p, query.batch, query.head);
    }
    return set;
  }

  __device__ __forceinline__ static KeySet additional(const Problem& p, const Inputs& in,
                                                      const Row& query, bool active) {
    KeySet set(p, in.additional_key, in.additional_value,
               additional_row(p, query.batch, 0, key_head_of(p, query.head)));
    if (active) set.walk_.visit_list(p.additional);
    return set;
  }

  __device__ __forceinline__ bool more() const { return walk_.length > 0; }
  __device__ __forceinline__ void next_line(const Problem& p) {
    walk_.next_line(p, p.key_grid);
  }

  __device__ __forceinline__ KeyLine<T> line(const Problem& p) const {
    const int64_t key_stride = int64_t(p.key_heads) * p.head_dim;
    const int64_t value_stride = int64_t(p.key_heads) * p.value_dim;
    return {keys_ + walk_.token * key_stride,
            values_ + walk_.token * value_stride,
            bias_ == nullptr ? nullptr : bias_ + walk_.bias,
            walk_.step * key_stride,
            walk_.step * value_stride,
            walk_.length};
  }

 private:
  const T* keys_;                     // row of token 0
  const T* values_;                   // row of token 0
  const AccumOf<T>* bias_ = nullptr;  // table of the query's head
  KeyWalk walk_;

  __device__ __forceinline__ KeySet(const Problem& p, const void* keys, const void* values,
                                    int64_t first_row)
      : keys_(static_cast<const T*>(keys) + first_row * p.head_dim),
        values_(static_cast<const T*>(values) + first_row * p.value_dim) {}
};

}  // namespace jax_na::cuda
