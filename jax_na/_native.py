"""One native kernel call as XLA sees it: custom call, layouts, sharding rule.

The kernels read one memory layout, the public heads-last one, under two logical shapes:

- plain: ``[*batch, *grid, heads, channels]``, for programs of one device;
- heads leading: ``[*batch, K, G, *grid, channels]`` with the *same* memory, declared by
  the custom call's operand layouts. XLA can then split the call over its leading axes by
  itself (``jax.ffi.register_ffi_target_as_batch_partitionable``), with no callback into
  Python, so that sharded programs can be exported. On a GPU the change of logical shape
  is free; on a CPU XLA copies, so programs of one device never pay for it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir


class Kind(enum.Enum):
    """What the axes of an array mean; ``B`` is any number of batch axes."""

    QUERY = "[B, *grid, N, channels]"
    KEY = "[B, *grid or M, K, channels]"
    ROW = "[B, *grid, N]"
    BIAS = "[B, N, *table]"
    FRAME = "[B, 3, rank]"
    WORKSPACE = "[B or 1, K, elements]"


class Result(NamedTuple):
    """A result of a native call, in the plain logical shape."""

    kind: Kind
    shape: tuple[Any, ...]
    dtype: Any


#: Attributes of the custom call as ``((name, value), ...)``; a tuple is an int64 array.
Attributes = tuple[tuple[str, Any], ...]


# ---- Logical shapes ------------------------------------------------------------------


def _heads_axis(kind: Kind, ndim: int, batch_rank: int) -> int:
    if kind is Kind.BIAS:
        return batch_rank
    return ndim - 1 if kind is Kind.ROW else ndim - 2


def _leading_order(kind: Kind, ndim: int, batch_rank: int) -> tuple[int, ...]:
    """Permutation from the plain shape, its heads split in (K, G), to heads leading."""
    if kind in (Kind.FRAME, Kind.WORKSPACE):
        return tuple(range(ndim))
    count = 1 if kind is Kind.KEY else 2
    axis = _heads_axis(kind, ndim - count + 1, batch_rank)
    heads = range(axis, axis + count)
    rest = (a for a in range(batch_rank, ndim) if a not in heads)
    return (*range(batch_rank), *heads, *rest)


def _to_leading(
    kind: Kind, array: jax.Array, batch_rank: int, key_heads: int
) -> jax.Array:
    if kind is Kind.FRAME:
        shape = (*array.shape[:batch_rank], key_heads, *array.shape[batch_rank:])
        return jnp.broadcast_to(jnp.expand_dims(array, batch_rank), shape)
    if kind is Kind.WORKSPACE:
        return array
    if kind is not Kind.KEY:
        axis = _heads_axis(kind, array.ndim, batch_rank)
        group = array.shape[axis] // key_heads
        shape = (*array.shape[:axis], key_heads, group, *array.shape[axis + 1 :])
        array = array.reshape(shape)
    return array.transpose(_leading_order(kind, array.ndim, batch_rank))


def _from_leading(
    kind: Kind, array: jax.Array, batch_rank: int, shape: tuple[Any, ...]
) -> jax.Array:
    order = _leading_order(kind, array.ndim, batch_rank)
    return array.transpose(np.argsort(order)).reshape(shape)


def _leading_layout(kind: Kind, ndim: int, batch_rank: int) -> tuple[int, ...]:
    """Minor-to-major layout that gives the heads-leading shape the plain memory."""
    inverse = np.argsort(_leading_order(kind, ndim, batch_rank))
    return tuple(int(axis) for axis in reversed(inverse))


# ---- The custom call -----------------------------------------------------------------

native_call_p = Primitive("jax_na_native_call")
native_call_p.multiple_results = True


@native_call_p.def_abstract_eval
def _abstract(*avals: Any, results: tuple[Any, ...], **_: Any) -> tuple[Any, ...]:
    return results


def _factor(index: int) -> str:
    """Shardy's names of the factors of a sharding rule: i to z, then z_1, z_2, ..."""
    return chr(ord("i") + index) if index < 18 else f"z_{index - 17}"


def _sharding_rule(
    avals_in: Sequence[Any], avals_out: Sequence[Any], leading: int
) -> mlir.ir.Attribute:
    """The first ``leading`` axes pass through; every other needs to be replicated."""
    sizes: list[int] = list(avals_in[0].shape[:leading])

    def dimensions(aval: Any) -> str:
        factors = list(range(leading))
        for size in aval.shape[leading:]:
            factors.append(len(sizes))
            sizes.append(size)
        return "[" + ", ".join(map(_factor, factors)) + "]"

    operands = ", ".join(map(dimensions, avals_in))
    results = ", ".join(map(dimensions, avals_out))
    factors = ", ".join(f"{_factor(i)}={size}" for i, size in enumerate(sizes))
    blocked = ", ".join(map(_factor, range(leading, len(sizes))))
    return mlir.ir.Attribute.parse(
        f"#sdy.op_sharding_rule<({operands})->({results}) {{{factors}}} "
        f"need_replication={{{blocked}}}, custom>"
    )


def _lower(
    ctx: Any,
    *operands: Any,
    target: str,
    results: tuple[Any, ...],
    attributes: Attributes,
    leading: int,
    layouts: tuple[tuple[int, ...], ...] | None,
) -> Any:
    options: dict[str, Any] = {}
    if layouts is not None:
        options["operand_layouts"] = layouts[: len(operands)]
        options["result_layouts"] = layouts[len(operands) :]
        options["extra_attributes"] = {
            "mhlo.frontend_attributes": mlir.ir_attribute(
                {"num_batch_dims": str(leading)}
            ),
            "sdy.sharding_rule": _sharding_rule(ctx.avals_in, ctx.avals_out, leading),
        }
    arrays = {
        name: np.asarray(value, np.int64) if isinstance(value, tuple) else value
        for name, value in attributes
    }
    return jax.ffi.ffi_lowering(target, **options)(ctx, *operands, **arrays)


mlir.register_lowering(native_call_p, _lower)


def call(
    target: str,
    operands: Sequence[tuple[Kind, jax.Array]],
    results: Sequence[Result],
    attributes: Attributes,
    *,
    batch_rank: int,
    key_heads: int,
    partitionable: bool,
) -> list[jax.Array]:
    """Calls a kernel on arrays in the plain logical shape.

    With ``partitionable`` every batch axis of every array must be full, and XLA may
    split the call over the batch and the key heads.
    """
    arrays = [array for _, array in operands]
    avals = [jax.core.ShapedArray(r.shape, r.dtype) for r in results]
    layouts = None
    if partitionable:
        kinds = [kind for kind, _ in operands] + [result.kind for result in results]
        arrays = [_to_leading(k, a, batch_rank, key_heads) for k, a in operands]
        shapes = [
            jax.eval_shape(
                lambda array, kind=result.kind: _to_leading(
                    kind, array, batch_rank, key_heads
                ),
                aval,
            )
            for result, aval in zip(results, avals)
        ]
        avals = [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]
        ndims = [a.ndim for a in arrays] + [a.ndim for a in avals]
        layouts = tuple(
            _leading_layout(kind, ndim, batch_rank) for kind, ndim in zip(kinds, ndims)
        )
    outputs = native_call_p.bind(
        *arrays,
        target=target,
        results=tuple(avals),
        attributes=(*attributes, ("heads_leading", partitionable)),
        leading=batch_rank + 1,
        layouts=layouts,
    )
    if partitionable:
        outputs = [
            _from_leading(result.kind, output, batch_rank, result.shape)
            for result, output in zip(results, outputs)
        ]
    return outputs
