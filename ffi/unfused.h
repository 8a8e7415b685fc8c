// From the call frame of XLA's FFI to the calls of cuda/unfused.h. As in decode.h, everything
// that the kernels rely on is checked, and this is a stable interface:
//
//   pair     queries, keys, [frame]   -> slots
//   gather   slots, keys, [frame]     -> queries
//   scatter  slots, queries, [frame]  -> keys
//
//   kernel_size, stride, dilation, is_causal (0 or 1)   int64 [rank]
//   has_frame, heads_leading                            bool
//   row_tile (gemm)                                     int64 [rank]
//   highest_precision (gemm)                            bool
//
// Shapes: queries and slots as decode.h has the query, keys as the key. The operands have one
// type; the result has that or its accumulation type.
#pragma once

#include <cstdint>

#include "../cuda/unfused.h"
#include "decode.h"
#include "handlers.h"

namespace jax_na {

struct PairCall : cuda::UnfusedCall {};
struct GatherCall : cuda::UnfusedCall {};
struct ScatterCall : cuda::UnfusedCall {};

template <>
inline constexpr const char* kFunction<PairCall> = "pair";
template <>
inline constexpr const char* kFunction<GatherCall> = "gather";
template <>
inline constexpr const char* kFunction<ScatterCall> = "scatter";

class UnfusedDecoder : public GridDecoder {
 public:
  // `result` is one of the three arrays; the others have the element type.
  UnfusedDecoder(Arrays<ffi::RemainingArgs>* operands, const ffi::Dictionary& attributes,
                 const Array& queries_array, const Array& keys_array, const Array& slots,
                 const Array& result, ffi::DataType element_type, cuda::UnfusedCall* call)
      : GridDecoder(attributes, &call->problem) {
    read_sizes(queries_array, keys_array, keys_array);
    type_ = element_type;
    p_.element_type = element_type_of(element_type);
    p_.scale = 1;
    call->wide_result = result.type != element_type;
    const auto expect = [&](const Array& array, const Shape& shape) {
      const bool wide = call->wide_result && &array == &result;
      return array.expect(wide ? accumulation_type() : element_type, shape);
    };
    call->queries = expect(queries_array, queries({p_.head_dim}));
    call->keys = expect(keys_array, keys(key_grid_, p_.head_dim));
    call->slots = expect(slots, queries({call->window_size()}));
    read_frame(operands);
    operands->expect_end();
  }
};

inline bool decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const ffi::Dictionary& attributes, PairCall* call) {
  *call = {};
  Arrays<ffi::RemainingArgs> operands("operand", args);
  Arrays<ffi::RemainingRets> results("result", rets);
  const Array queries = operands.next("queries"), keys = operands.next("keys");
  const Array slots = results.next("slots");
  results.expect_end();
  UnfusedDecoder(&operands, attributes, queries, keys, slots, slots, keys.type, call);
  return anything_to_write(rets);
}

inline bool decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const ffi::Dictionary& attributes, GatherCall* call) {
  *call = {};
  Arrays<ffi::RemainingArgs> operands("operand", args);
  Arrays<ffi::RemainingRets> results("result", rets);
  const Array slots = operands.next("slots"), keys = operands.next("keys");
  const Array queries = results.next("queries");
  results.expect_end();
  UnfusedDecoder(&operands, attributes, queries, keys, slots, queries, keys.type, call);
  return anything_to_write(rets);
}

inline bool decode(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                   const ffi::Dictionary& attributes, ScatterCall* call) {
  *call = {};
  Arrays<ffi::RemainingArgs> operands("operand", args);
  Arrays<ffi::RemainingRets> results("result", rets);
  const Array slots = operands.next("slots"), queries = operands.next("queries");
  const Array keys = results.next("keys");
  results.expect_end();
  UnfusedDecoder(&operands, attributes, queries, keys, slots, keys, queries.type, call);
  return anything_to_write(rets);
}

// The tile of a plan, one extent per axis of the caller.
inline cuda::UnfusedTiling unfused_tiling(const ffi::Dictionary& attributes, const Problem& p) {
  cuda::UnfusedTiling tiling = {{1, 1, 1}};
  const Shape rows = integers(attributes, "row_tile", p.rank);
  for (int a = 0; a < p.rank; ++a) {
    tiling.row_tile[kMaxRank - p.rank + a] = to_size("row_tile", rows[a], 1);
  }
  return tiling;
}

}  // namespace jax_na
