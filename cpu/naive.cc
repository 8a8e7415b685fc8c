// The kernels by definition: for every query its visible keys, for every key the queries
// that see it, one dot product at a time. Correct for everything, and what the fused
// kernels are compared with.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elements.h"
#include "kernels.h"
#include "naive.h"

namespace jax_na::cpu {
namespace {

// What one token sees on the other grid.
struct Visible {
  AxisRange axis[kMaxRank];

  int64_t count() const {
    return int64_t(axis[0].count) * axis[1].count * axis[2].count;
  }
};

struct Position {
  int32_t axis[kMaxRank];
};

Position position_of(int64_t token, const int32_t* grid) {
  const int64_t line = token / grid[2];
  return {{static_cast<int32_t>(line / grid[1]), static_cast<int32_t>(line % grid[1]),
           static_cast<int32_t>(token % grid[2])}};
}

bool query_in_grid(const Problem& p, int64_t batch, const Position& query) {
  for (int a = 0; a < kMaxRank; ++a) {
    if (!jax_na::query_in_grid(p.axis_frame(batch, a), query.axis[a])) return false;
  }
  return true;
}

Visible visible_keys(const Problem& p, int64_t batch, const Position& query) {
  Visible v;
  for (int a = 0; a < kMaxRank; ++a) {
    v.axis[a] = keys_of_query(p.window[a], p.axis_frame(batch, a), query.axis[a]);
  }
  return v;
}

Visible visible_queries(const Problem& p, int64_t batch, const Position& key) {
  Visible v;
  for (int a = 0; a < kMaxRank; ++a) {
    v.axis[a] = queries_of_key(p.window[a], p.axis_frame(batch, a), key.axis[a]);
  }
  return v;
}

// Calls fn(token, bias index) for all that is visible. `bias_step` is +1 where the
// visible tokens are keys, -1 where they are queries.
template <typename Fn>
void for_each_visible(const Problem& p, const Visible& v, const int32_t* grid, int bias_step,
                      const Fn& fn) {
  for (int32_t z = 0; z < v.axis[0].count; ++z) {
    for (int32_t y = 0; y < v.axis[1].count; ++y) {
      const int64_t line =
          int64_t(v.axis[0].first + z * p.window[0].dilation) * grid[1] +
          v.axis[1].first + y * p.window[1].dilation;
      const int64_t bias_line =
          int64_t(v.axis[0].bias_row + bias_step * z) * p.bias_extent(1) +
          v.axis[1].bias_row + bias_step * y;
      for (int32_t x = 0; x < v.axis[2].count; ++x) {
        fn(line * grid[2] + v.axis[2].first + x * p.window[2].dilation,
           bias_line * p.bias_extent(2) + v.axis[2].bias_row + bias_step * x);
      }
    }
  }
}

// Offsets of rows in the arrays of one problem, in elements.
struct Layout {
  const Problem& p;

  int64_t query_row(int64_t b, int64_t token, int32_t h) const {
    return (b * p.query_tokens() + token) * p.heads + h;
  }
  int64_t key_row(int64_t b, int64_t token, int32_t kh) const {
    return (b * p.key_tokens() + token) * p.key_heads + kh;
  }
  int64_t additional_row(int64_t b, int32_t m, int32_t kh) const {
    return (b * p.additional + m) * p.key_heads + kh;
  }
  int64_t bias_table(int64_t b, int32_t h) const {
    return b * p.bias_batch_stride + h * p.bias_size();
  }
  int32_t group() const { return p.heads / p.key_heads; }
};

template <typename E>
typename E::Accum dot(const void* a, int64_t a_row, const void* b, int64_t b_row, int32_t dim) {
  typename E::Accum sum = 0;
  for (int32_t d = 0; d < dim; ++d) {
    sum += load_element<E>(a, a_row * dim + d) * load_element<E>(b, b_row * dim + d);
  }
  return sum;
}

// sum += weight * row
template <typename E>
void add_row(typename E::Accum weight, const void* array, int64_t row, int32_t dim,
             typename E::Accum* sum) {
  for (int32_t d = 0; d < dim; ++d) sum[d] += weight * load_element<E>(array, row * dim + d);
}

template <typename E>
void store_row(const typename E::Accum* values, typename E::Accum factor, void* array,
               int64_t row, int32_t dim) {
  for (int32_t d = 0; d < dim; ++d) store_element<E>(array, row * dim + d, values[d] * factor);
}

template <typename E>
class Forward {
 public:
  using Accum = typename E::Accum;

  explicit Forward(const ForwardCall& call) : call_(call), p_(call.problem), layout_{p_} {}

  void query(int64_t b, int64_t token, int32_t h) {
    constexpr Accum kInfinity = std::numeric_limits<Accum>::infinity();
    const Position position = position_of(token, p_.query_grid);
    const bool in_grid = query_in_grid(p_, b, position);
    const Visible keys = visible_keys(p_, b, position);
    const int32_t additional = in_grid ? p_.additional : 0;
    const int32_t kh = h / layout_.group();
    const int64_t row = layout_.query_row(b, token, h);
    const Accum scale = static_cast<Accum>(p_.scale);
    const Accum* bias = static_cast<const Accum*>(call_.in.bias);

    scores_.clear();
    for_each_visible(p_, keys, p_.key_grid, +1, [&](int64_t key, int64_t bias_index) {
      Accum s = scale * dot<E>(call_.in.query, row, call_.in.key,
                               layout_.key_row(b, key, kh), p_.head_dim);
      if (bias != nullptr) s += bias[layout_.bias_table(b, h) + bias_index];
      scores_.push_back(s);
    });
    for (int32_t m = 0; m < additional; ++m) {
      scores_.push_back(scale * dot<E>(call_.in.query, row, call_.in.additional_key,
                                       layout_.additional_row(b, m, kh), p_.head_dim));
    }

    Accum largest = -kInfinity;
    for (Accum s : scores_) largest = std::max(largest, s);
    if (largest == -kInfinity) largest = 0;  // all weights are 0 (or NaN), never exp(nan)
    Accum total = 0;
    for (Accum& s : scores_) total += s = std::exp(s - largest);

    out_.assign(p_.value_dim, 0);
    const Accum* weight = scores_.data();
    for_each_visible(p_, keys, p_.key_grid, +1, [&](int64_t key, int64_t) {
      add_row<E>(*weight++, call_.in.value, layout_.key_row(b, key, kh), p_.value_dim,
                 out_.data());
    });
    for (int32_t m = 0; m < additional; ++m) {
      add_row<E>(*weight++, call_.in.additional_value, layout_.additional_row(b, m, kh),
                 p_.value_dim, out_.data());
    }
    const bool empty = total == 0;
    store_row<E>(out_.data(), empty ? 0 : 1 / total, call_.out, row, p_.value_dim);
    static_cast<Accum*>(call_.lse)[row] = empty ? -kInfinity : largest + std::log(total);
  }

 private:
  const ForwardCall& call_;
  const Problem& p_;
  const Layout layout_;
  std::vector<Accum> scores_, out_;
};

template <typename E>
class Backward {
 public:
  using Accum = typename E::Accum;

  explicit Backward(const BackwardCall& call)
      : call_(call), p_(call.problem), layout_{p_}, scale_(static_cast<Accum>(p_.scale)) {}

  // dquery of one query.
  void query(int64_t b, int64_t token, int32_t h) {
    const Position position = position_of(token, p_.query_grid);
    const int64_t row = layout_.query_row(b, token, h);
    const int32_t kh = h / layout_.group();
    dquery_.assign(p_.head_dim, 0);
    for_each_visible(
        p_, visible_keys(p_, b, position), p_.key_grid, +1, [&](int64_t key, int64_t r) {
          const int64_t key_row = layout_.key_row(b, key, kh);
          add_row<E>(grid_pair(b, h, row, key_row, r).dscore, call_.in.key, key_row,
                     p_.head_dim, dquery_.data());
        });
    if (p_.additional > 0 && query_in_grid(p_, b, position)) {
      for (int32_t m = 0; m < p_.additional; ++m) {
        const int64_t key_row = layout_.additional_row(b, m, kh);
        add_row<E>(additional_pair(row, key_row).dscore, call_.in.additional_key, key_row,
                   p_.head_dim, dquery_.data());
      }
    }
    store_row<E>(dquery_.data(), scale_, call_.dquery, row, p_.head_dim);
  }

  // dkey and dvalue of one key.
  void key(int64_t b, int64_t token, int32_t kh) {
    const int64_t key_row = layout_.key_row(b, token, kh);
    const Visible queries = visible_queries(p_, b, position_of(token, p_.key_grid));
    clear_key();
    for (int32_t h = kh * layout_.group(); h < (kh + 1) * layout_.group(); ++h) {
      for_each_visible(p_, queries, p_.query_grid, -1, [&](int64_t query, int64_t r) {
        const int64_t row = layout_.query_row(b, query, h);
        add_pair(grid_pair(b, h, row, key_row, r), row);
      });
    }
    store_key(call_.dkey, call_.dvalue, key_row);
  }

  // dadditional_key and dadditional_value of one additional key.
  void additional_key(int64_t b, int32_t m, int32_t kh) {
    const int64_t key_row = layout_.additional_row(b, m, kh);
    clear_key();
    for (int64_t query = 0; query < p_.query_tokens(); ++query) {
      if (!query_in_grid(p_, b, position_of(query, p_.query_grid))) continue;
      for (int32_t h = kh * layout_.group(); h < (kh + 1) * layout_.group(); ++h) {
        const int64_t row = layout_.query_row(b, query, h);
        add_pair(additional_pair(row, key_row), row);
      }
    }
    store_key(call_.dadditional_key, call_.dadditional_value, key_row);
  }

  // One entry of dbias: the sum over the queries of samples [b0, b1) that see the key at
  // that offset.
  void bias_entry(int64_t b0, int64_t b1, int32_t h, int64_t entry) {
    const int32_t extents[kMaxRank] = {p_.bias_extent(0), p_.bias_extent(1),
                                       p_.bias_extent(2)};
    const Position offset = position_of(entry, extents);
    const int32_t kh = h / layout_.group();
    Accum sum = 0;
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t query = 0; query < p_.query_tokens(); ++query) {
        const Visible keys = visible_keys(p_, b, position_of(query, p_.query_grid));
        int64_t key = 0;
        bool sees = true;
        for (int a = 0; a < kMaxRank; ++a) {
          const int32_t t = offset.axis[a] - keys.axis[a].bias_row;
          sees = sees && t >= 0 && t < keys.axis[a].count;
          key = key * p_.key_grid[a] + keys.axis[a].first + t * p_.window[a].dilation;
        }
        if (!sees) continue;
        sum += grid_pair(b, h, layout_.query_row(b, query, h), layout_.key_row(b, key, kh),
                         entry)
                   .dscore;
      }
    }
    static_cast<Accum*>(call_.dbias)[layout_.bias_table(b0, h) + entry] = sum;
  }

 private:
  struct Pair {
    Accum weight;  // P, the softmax weight
    Accum dscore;  // gradient of the score, after scaling
  };

  Pair grid_pair(int64_t b, int32_t h, int64_t row, int64_t key_row, int64_t bias_index) const {
    const Accum* bias = static_cast<const Accum*>(call_.in.bias);
    const Accum added = bias == nullptr ? 0 : bias[layout_.bias_table(b, h) + bias_index];
    return pair(row, call_.in.key, call_.in.value, key_row, added);
  }
  Pair additional_pair(int64_t row, int64_t key_row) const {
    return pair(row, call_.in.additional_key, call_.in.additional_value, key_row, 0);
  }
  Pair pair(int64_t row, const void* keys, const void* values, int64_t key_row,
            Accum bias) const {
    const Accum lse = static_cast<const Accum*>(call_.lse)[row];
    if (lse == -std::numeric_limits<Accum>::infinity()) return {0, 0};
    const Accum score =
        scale_ * dot<E>(call_.in.query, row, keys, key_row, p_.head_dim) + bias;
    const Accum weight = std::exp(score - lse);
    const Accum dweight = dot<E>(call_.dout, row, values, key_row, p_.value_dim);
    return {weight, weight * (dweight - static_cast<const Accum*>(call_.delta)[row])};
  }

  void clear_key() {
    dkey_.assign(p_.head_dim, 0);
    dvalue_.assign(p_.value_dim, 0);
  }
  void add_pair(const Pair& pair, int64_t row) {
    add_row<E>(pair.dscore, call_.in.query, row, p_.head_dim, dkey_.data());
    add_row<E>(pair.weight, call_.dout, row, p_.value_dim, dvalue_.data());
  }
  void store_key(void* dkey, void* dvalue, int64_t key_row) {
    if (dkey != nullptr) store_row<E>(dkey_.data(), scale_, dkey, key_row, p_.head_dim);
    if (dvalue != nullptr) store_row<E>(dvalue_.data(), 1, dvalue, key_row, p_.value_dim);
  }

  const BackwardCall& call_;
  const Problem& p_;
  const Layout layout_;
  const Accum scale_;
  std::vector<Accum> dquery_, dkey_, dvalue_;
};

}  // namespace

void forward_naive_query(const ForwardCall& call, int64_t batch, int64_t token, int32_t head) {
  with_element(call.problem.element_type,
               [&](auto e) { Forward<decltype(e)>(call).query(batch, token, head); });
}

void backward_naive_query(const BackwardCall& call, int64_t batch, int64_t token,
                          int32_t head) {
  with_element(call.problem.element_type,
               [&](auto e) { Backward<decltype(e)>(call).query(batch, token, head); });
}

void backward_naive_key(const BackwardCall& call, int64_t batch, int64_t token,
                        int32_t key_head) {
  with_element(call.problem.element_type,
               [&](auto e) { Backward<decltype(e)>(call).key(batch, token, key_head); });
}

void forward_naive(const ForwardCall& call, const ParallelFor& parallel_for) {
  const Problem& p = call.problem;
  with_element(p.element_type, [&](auto e) {
    parallel_for(p.batch * p.query_tokens(), [&](int64_t i) {
      Forward<decltype(e)> forward(call);
      for (int32_t h = 0; h < p.heads; ++h) {
        forward.query(i / p.query_tokens(), i % p.query_tokens(), h);
      }
    });
  });
}

void backward_naive(const BackwardCall& call, const ParallelFor& parallel_for) {
  const Problem& p = call.problem;
  with_element(p.element_type, [&](auto e) {
    using Kernel = Backward<decltype(e)>;
    if (call.dquery != nullptr) {
      parallel_for(p.batch * p.query_tokens(), [&](int64_t i) {
        Kernel kernel(call);
        for (int32_t h = 0; h < p.heads; ++h) {
          kernel.query(i / p.query_tokens(), i % p.query_tokens(), h);
        }
      });
    }
    if (call.dkey != nullptr || call.dvalue != nullptr) {
      parallel_for(p.batch * p.key_tokens(), [&](int64_t i) {
        Kernel kernel(call);
        for (int32_t kh = 0; kh < p.key_heads; ++kh) {
          kernel.key(i / p.key_tokens(), i % p.key_tokens(), kh);
        }
      });
    }
    if (call.dadditional_key != nullptr || call.dadditional_value != nullptr) {
      parallel_for(p.batch * p.additional * p.key_heads, [&](int64_t i) {
        const int64_t row = i / p.key_heads;
        Kernel(call).additional_key(row / p.additional,
                                    static_cast<int32_t>(row % p.additional),
                                    static_cast<int32_t>(i % p.key_heads));
      });
    }
    if (call.dbias != nullptr) {
      // One table for all samples, or one for each.
      const bool shared = p.bias_batch_stride == 0;
      parallel_for((shared ? 1 : p.batch) * p.heads * p.bias_size(), [&](int64_t i) {
        const int64_t table = i / p.bias_size();
        const int64_t b0 = table / p.heads;
        Kernel(call).bias_entry(b0, shared ? p.batch : b0 + 1,
                                static_cast<int32_t>(table % p.heads), i % p.bias_size());
      });
    }
  });
}

}  // namespace jax_na::cpu
