// From the call frame of XLA's FFI to ForwardCall and BackwardCall (problem.h).
//
// A call comes from jax_na/_native.py or from an exported program, which may be of any
// origin: everything that the kernels rely on is checked here. The order of operands and
// results, the attributes and the shapes are a stable interface:
//
//   forward    query, key, value, [bias], [additional_key, additional_value], [frame]
//              -> out, lse
//   backward   dout, lse, delta, then as forward; or, if makes_delta, dout, lse, out, [dlse]
//              -> the gradients that `wrt` asks for, in the order query, key, value, bias,
//                 additional_key, additional_value; then delta, if makes_delta; then, for some
//                 kernels, a float32 workspace of any shape
//
//   kernel_size, stride, dilation, is_causal (0 or 1)   int64 [rank]
//   scale                                               float64
//   has_bias, has_additional, has_frame, heads_leading  bool
//   wrt (backward)                                      int64 [6] of 0 or 1
//   makes_delta (backward; false where absent), has_dlse  bool
//
// Attributes beyond these are ignored. Memory always has the layout of problem.h. The
// logical shapes, with B for any number of batch axes, B' for them all full or all 1, N
// for query heads, K for key heads and G = N / K:
//
//                     plain                        heads_leading
//   query, out        [B, *grid, N, channels]      [B, K, G, *grid, channels]
//   lse, dlse, delta  [B, *grid, N]                [B, K, G, *grid]
//   key, value        [B, *key_grid, K, channels]  [B, K, *key_grid, channels]
//   additional_*      [B, M, K, channels]          [B, K, M, channels]
//   bias              [B', N, *table]              [B, K, G, *table]
//   frame             [B', 3, rank]                [B, K, 3, rank], the same for every K
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_na {

namespace ffi = xla::ffi;

// What is wrong with a call, for its author.
class InvalidCall : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw InvalidCall(message.str());
}

using Shape = std::vector<int64_t>;

inline std::string to_string(const Shape& shape) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < shape.size(); ++i) text << (i > 0 ? ", " : "") << shape[i];
  text << ']';
  return text.str();
}

inline int64_t product(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

inline Shape concatenate(std::initializer_list<Shape> parts) {
  Shape all;
  for (const Shape& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// An operand or result, under the name that error messages give it.
struct Array {
  std::string name;
  ffi::DataType type;
  Shape shape;
  void* data;

  Array(std::string array_name, const ffi::AnyBuffer& buffer)
      : name(std::move(array_name)),
        type(buffer.element_type()),
        shape(buffer.dimensions().begin(), buffer.dimensions().end()),
        data(buffer.untyped_data()) {}

  void* expect(ffi::DataType expected_type, const Shape& expected_shape) const {
    if (type != expected_type || shape != expected_shape) {
      refuse(name, " must be ", expected_type, to_string(expected_shape), ", got ", type,
             to_string(shape));
    }
    return data;
  }

  void expect_rank(size_t rank) const {
    if (shape.size() != rank) {
      refuse(name, " must have ", rank, " axes, got ", to_string(shape));
    }
  }
};

// Operands or results, taken one after the other. `Frame` is ffi::RemainingArgs or
// ffi::RemainingRets.
template <typename Frame>
class Arrays {
 public:
  Arrays(const char* what, const Frame& frame) : what_(what), frame_(frame) {}

  Array next(std::string name) {
    if (taken_ == frame_.size()) refuse("there is no ", what_, " ", name);
    auto buffer = frame_.template get<ffi::AnyBuffer>(taken_++);
    if (!buffer) refuse(what_, " ", name, ": ", buffer.error().message());
    if constexpr (std::is_same_v<Frame, ffi::RemainingRets>) {
      return Array(std::move(name), **buffer);
    } else {
      return Array(std::move(name), *buffer);
    }
  }

  bool more() const { return taken_ < frame_.size(); }

  void expect_end() const {
    if (taken_ != frame_.size()) {
      refuse("takes ", taken_, " ", what_, "s, got ", frame_.size());
    }
  }

 private:
  const char* what_;
  const Frame& frame_;
  size_t taken_ = 0;
};

template <typename T>
T attribute(const ffi::Dictionary& attributes, const char* name) {
  if (!attributes.contains(name)) refuse("attribute ", name, " is missing");
  const auto value = attributes.get<T>(name);
  if (!value) refuse("attribute ", name, ": ", value.error().message());
  return *value;
}

inline Shape integers(const ffi::Dictionary& attributes, const char* name, size_t length) {
  const auto span = attribute<ffi::Span<const int64_t>>(attributes, name);
  const Shape values(span.begin(), span.end());
  if (values.size() != length) {
    refuse("attribute ", name, " must have ", length, " entries, got ", to_string(values));
  }
  return values;
}

// Sizes are small enough that kernels may add two of them in 32 bits.
inline int32_t to_size(const std::string& name, int64_t value, int64_t smallest = 0) {
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (value < smallest || value > kLargest) {
    refuse(name, " must be between ", smallest, " and ", kLargest, ", got ", value);
  }
  return static_cast<int32_t>(value);
}

inline ElementType element_type_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F16:
      return ElementType::kF16;
    case ffi::DataType::BF16:
      return ElementType::kBF16;
    case ffi::DataType::F32:
      return ElementType::kF32;
    case ffi::DataType::F64:
      return ElementType::kF64;
    default:
      refuse("query must be F16, BF16, F32 or F64, got ", type);
  }
}

// Reads the part that all calls share: window, sizes of the arrays, frame. Knows their shapes.
class GridDecoder {
 public:
  ffi::DataType type() const { return type_; }
  ffi::DataType accumulation_type() const {
    return type_ == ffi::DataType::F64 ? ffi::DataType::F64 : ffi::DataType::F32;
  }

  // [B, *grid, N, *channels]
  Shape queries(const Shape& channels) const {
    if (heads_leading_) {
      return concatenate({batch_, {p_.key_heads, group()}, query_grid_, channels});
    }
    return concatenate({batch_, query_grid_, {p_.heads}, channels});
  }
  // [B, *tokens, K, channels]
  Shape keys(const Shape& tokens, int64_t channels) const {
    if (heads_leading_) return concatenate({batch_, {p_.key_heads}, tokens, {channels}});
    return concatenate({batch_, tokens, {p_.key_heads, channels}});
  }
  Shape key_grid() const { return key_grid_; }

 protected:
  GridDecoder(const ffi::Dictionary& attributes, Problem* problem) : p_(*problem) {
    const char* const kKernelSize = "kernel_size";
    const size_t rank = attribute<ffi::Span<const int64_t>>(attributes, kKernelSize).size();
    if (rank < 1 || rank > kMaxRank) {
      refuse("attribute kernel_size must have 1 to ", kMaxRank, " entries, got ", rank);
    }
    const Shape kernel_size = integers(attributes, kKernelSize, rank);
    const Shape stride = integers(attributes, "stride", rank);
    const Shape dilation = integers(attributes, "dilation", rank);
    const Shape is_causal = integers(attributes, "is_causal", rank);
    p_.rank = static_cast<int32_t>(rank);
    for (AxisWindow& window : p_.window) window = {1, 1, 1, false};
    for (size_t i = 0; i < rank; ++i) {
      AxisWindow& window = p_.window[kMaxRank - rank + i];
      window.kernel_size = to_size(kKernelSize, kernel_size[i], 1);
      window.stride = to_size("stride", stride[i], 1);
      window.dilation = to_size("dilation", dilation[i], 1);
      window.is_causal = is_causal[i] != 0;
      if (window.stride > window.kernel_size) {
        refuse("stride must not exceed kernel_size, got ", window.stride, " > ",
               window.kernel_size);
      }
    }
    heads_leading_ = attribute<bool>(attributes, "heads_leading");
    has_frame_ = attribute<bool>(attributes, "has_frame");
  }

  int64_t group() const { return p_.key_heads == 0 ? 0 : p_.heads / p_.key_heads; }

  void read_sizes(const Array& query, const Array& key, const Array& value) {
    type_ = query.type;
    p_.element_type = element_type_of(type_);
    const size_t rank = p_.rank, query_axes = rank + (heads_leading_ ? 3 : 2);
    if (query.shape.size() < query_axes) {
      refuse("query must have at least ", query_axes, " axes, got ", to_string(query.shape));
    }
    const size_t batch_rank = query.shape.size() - query_axes;
    key.expect_rank(batch_rank + rank + 2);
    value.expect_rank(batch_rank + rank + 2);

    const auto query_axis = query.shape.begin() + batch_rank;
    const auto key_axis = key.shape.begin() + batch_rank;
    batch_ = Shape(query.shape.begin(), query_axis);
    p_.batch = product(batch_);
    const auto query_grid = query_axis + (heads_leading_ ? 2 : 0);
    const auto key_grid = key_axis + (heads_leading_ ? 1 : 0);
    query_grid_ = Shape(query_grid, query_grid + rank);
    key_grid_ = Shape(key_grid, key_grid + rank);
    for (int a = 0; a < kMaxRank; ++a) p_.query_grid[a] = p_.key_grid[a] = 1;
    for (size_t i = 0; i < rank; ++i) {
      p_.query_grid[kMaxRank - rank + i] = to_size("an axis of the query's grid", query_grid[i]);
      p_.key_grid[kMaxRank - rank + i] = to_size("an axis of the key's grid", key_grid[i]);
    }
    const int64_t heads = heads_leading_ ? query_axis[0] * query_axis[1] : query_axis[rank];
    p_.heads = to_size("the number of query heads", heads);
    p_.key_heads = to_size("the number of key heads", key_axis[heads_leading_ ? 0 : rank]);
    if (p_.key_heads == 0 ? p_.heads != 0 : p_.heads % p_.key_heads != 0) {
      refuse("the number of query heads must be a multiple of that of key heads, got ",
             p_.heads, " and ", p_.key_heads);
    }
    p_.head_dim = to_size("the query's last axis", query.shape.back());
    p_.value_dim = to_size("the value's last axis", value.shape.back());
  }

  // [B', *rest], or [B, *rest] where the heads lead. Returns whether all B' are 1.
  bool read_batch(const Array& array, const Shape& rest, Shape* expected) const {
    array.expect_rank(batch_.size() + rest.size());
    const Shape own(array.shape.begin(), array.shape.begin() + batch_.size());
    const bool shared = !heads_leading_ && product(own) == 1;
    *expected = concatenate({shared ? own : batch_, rest});
    return shared;
  }

  // Takes the frame, which follows all other operands.
  void read_frame(Arrays<ffi::RemainingArgs>* operands) {
    if (!has_frame_) return check_whole_grid();
    const Array frame = operands->next("frame");
    Shape rest = {3, p_.rank}, expected;
    if (heads_leading_) rest.insert(rest.begin(), p_.key_heads);
    const bool shared = read_batch(frame, rest, &expected);
    p_.frame_batch_stride = shared ? 0 : product(rest);
    p_.frame = static_cast<const int32_t*>(frame.expect(ffi::DataType::S32, expected));
  }

  Problem& p_;
  ffi::DataType type_ = ffi::DataType::INVALID;
  bool heads_leading_ = false;
  Shape batch_, key_grid_;

 private:
  void check_whole_grid() const {
    if (query_grid_ != key_grid_) {
      refuse("without a frame the key's grid must be the query's, got ", to_string(key_grid_),
             " and ", to_string(query_grid_));
    }
    for (int a = 0; a < kMaxRank; ++a) {
      const int64_t extent = int64_t{p_.window[a].kernel_size} * p_.window[a].dilation;
      if (extent > p_.query_grid[a]) {
        refuse("without a frame kernel_size * dilation must not exceed the grid, got ", extent,
               " > ", p_.query_grid[a]);
      }
    }
  }

  bool has_frame_ = false;
  Shape query_grid_;
};

// Reads the part that forward and backward calls share.
class ProblemDecoder : public GridDecoder {
 public:
  ProblemDecoder(Arrays<ffi::RemainingArgs>* operands, const ffi::Dictionary& attributes,
                 Problem* problem, Inputs* inputs)
      : GridDecoder(attributes, problem), in_(*inputs) {
    p_.scale = attribute<double>(attributes, "scale");
    has_bias_ = attribute<bool>(attributes, "has_bias");
    has_additional_ = attribute<bool>(attributes, "has_additional");
    const Array query = operands->next("query");
    const Array key = operands->next("key");
    const Array value = operands->next("value");
    read_sizes(query, key, value);
    in_.query = query.expect(type_, queries({p_.head_dim}));
    in_.key = key.expect(type_, keys(key_grid_, p_.head_dim));
    in_.value = value.expect(type_, keys(key_grid_, p_.value_dim));
    if (has_bias_) read_bias(operands->next("bias"));
    if (has_additional_) {
      const Array additional_key = operands->next("additional_key");
      const Array additional_value = operands->next("additional_value");
      read_additional(additional_key, additional_value);
    }
    read_frame(operands);
  }

  bool has_bias() const { return has_bias_; }
  bool has_additional() const { return has_additional_; }
  Shape additional() const { return {p_.additional}; }
  Shape bias() const { return bias_; }

 private:
  void read_bias(const Array& bias) {
    Shape rest = heads_leading_ ? Shape{p_.key_heads, group()} : Shape{p_.heads};
    for (int a = kMaxRank - p_.rank; a < kMaxRank; ++a) rest.push_back(p_.bias_extent(a));
    const bool shared = read_batch(bias, rest, &bias_);
    p_.bias_batch_stride = shared ? 0 : p_.heads * p_.bias_size();
    in_.bias = bias.expect(accumulation_type(), bias_);
  }

  void read_additional(const Array& key, const Array& value) {
    const size_t axis = batch_.size() + (heads_leading_ ? 1 : 0);
    key.expect_rank(batch_.size() + 3);
    p_.additional = to_size("the number of additional keys", key.shape[axis]);
    in_.additional_key = key.expect(type_, keys(additional(), p_.head_dim));
    in_.additional_value = value.expect(type_, keys(additional(), p_.value_dim));
  }

  Inputs& in_;
  bool has_bias_ = false, has_additional_ = false;
  Shape bias_;
};

// Whether a result has an element.
inline bool anything_to_write(const ffi::RemainingRets& results) {
  for (size_t i = 0; i < results.size(); ++i) {
    if ((**results.get<ffi::AnyBuffer>(i)).element_count() > 0) return true;
  }
  return false;
}

// Decodes one call and returns whether it has anything to write. Throws InvalidCall.
inline bool decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const ffi::Dictionary& attributes, ForwardCall* call) {
  *call = {};
  Arrays<ffi::RemainingArgs> operands("operand", args);
  Arrays<ffi::RemainingRets> results("result", rets);
  const ProblemDecoder d(&operands, attributes, &call->problem, &call->in);
  operands.expect_end();
  call->out = results.next("out").expect(d.type(), d.queries({call->problem.value_dim}));
  call->lse = results.next("lse").expect(d.accumulation_type(), d.queries({}));
  results.expect_end();
  return anything_to_write(rets);
}

inline bool decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const ffi::Dictionary& attributes, BackwardCall* call) {
  *call = {};
  const Problem& p = call->problem;
  Arrays<ffi::RemainingArgs> operands("operand", args);
  Arrays<ffi::RemainingRets> results("result", rets);
  const Array dout = operands.next("dout");
  const Array lse = operands.next("lse");
  const bool makes_delta = attributes.contains("makes_delta") &&
                           attribute<bool>(attributes, "makes_delta");
  std::optional<Array> out, dlse, delta;
  if (makes_delta) {
    out = operands.next("out");
    if (attribute<bool>(attributes, "has_dlse")) dlse = operands.next("dlse");
  } else {
    delta = operands.next("delta");
  }
  const ProblemDecoder d(&operands, attributes, &call->problem, &call->in);
  operands.expect_end();
  call->dout = dout.expect(d.type(), d.queries({p.value_dim}));
  call->lse = lse.expect(d.accumulation_type(), d.queries({}));
  if (out) call->out = out->expect(d.type(), d.queries({p.value_dim}));
  if (dlse) call->dlse = dlse->expect(d.accumulation_type(), d.queries({}));

  const struct {
    const char* name;
    bool exists;
    void** data;
    ffi::DataType type;
    Shape shape;
  } gradients[] = {
      {"query", true, &call->dquery, d.type(), d.queries({p.head_dim})},
      {"key", true, &call->dkey, d.type(), d.keys(d.key_grid(), p.head_dim)},
      {"value", true, &call->dvalue, d.type(), d.keys(d.key_grid(), p.value_dim)},
      {"bias", d.has_bias(), &call->dbias, d.accumulation_type(), d.bias()},
      {"additional_key", d.has_additional(), &call->dadditional_key, d.type(),
       d.keys(d.additional(), p.head_dim)},
      {"additional_value", d.has_additional(), &call->dadditional_value, d.type(),
       d.keys(d.additional(), p.value_dim)},
  };
  const Shape wrt = integers(attributes, "wrt", std::size(gradients));
  for (size_t i = 0; i < wrt.size(); ++i) {
    if (wrt[i] == 0) continue;
    const auto& gradient = gradients[i];
    if (!gradient.exists) refuse("wrt asks for the gradient of an absent ", gradient.name);
    *gradient.data = results.next(std::string("d") + gradient.name)
                         .expect(gradient.type, gradient.shape);
  }
  const bool anything = anything_to_write(rets);
  if (makes_delta) delta = results.next("delta");
  call->delta = delta->expect(d.accumulation_type(), d.queries({}));
  if (results.more()) {
    const Array workspace = results.next("workspace");
    call->workspace = static_cast<float*>(workspace.expect(ffi::DataType::F32, workspace.shape));
    call->workspace_size = product(workspace.shape);
  }
  results.expect_end();
  return anything;
}

}  // namespace jax_na
