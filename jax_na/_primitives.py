"""The three primitives of neighborhood attention: abstract evaluation and batching.

``forward_p``   operands -> out, lse
``tangent_p``   tangents, operands, out, lse -> tangents of out and lse; linear in the
                tangents, and its transpose is ``backward_p``
``backward_p``  dout, [dlse,] out, lse, operands -> gradients of the operands in ``wrt``

Their operands are the present fields of :class:`jax_na._problem.Operands`, in order;
``present`` names them. All take any number of leading batch axes, so that ``vmap`` only
adds one and never reshapes: folding axes would make XLA gather sharded ones.
``_autodiff.py`` holds the differentiation rules, ``_lowering.py`` the lowering rules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, xla

from jax_na._problem import Operands, Problem, accumulation_dtype
from jax_na._sharding import updated
from jax_na._support import Traits

#: Operands whose batch axes may have size 1: one table or frame for many samples.
BROADCASTABLE = frozenset({"bias", "frame"})


def pack(operands: Operands) -> tuple[list[jax.Array], tuple[str, ...]]:
    """The present operands and their names."""
    present = tuple(n for n in Operands._fields if getattr(operands, n) is not None)
    return [getattr(operands, name) for name in present], present


def unpack(arrays: Iterable[Any], present: tuple[str, ...]) -> Operands:
    return Operands(**dict(zip(present, arrays, strict=True)))


def traits(operands: Operands) -> Traits:
    """What decides which implementations can run a call."""
    return Traits(
        operands.query.dtype, operands.query.shape[-1], operands.value.shape[-1]
    )


def residual_names(has_dlse: bool) -> tuple[str, ...]:
    """Names of the operands of ``backward_p`` that precede the forward's."""
    return ("dout", "dlse", "out", "lse") if has_dlse else ("dout", "out", "lse")


# ---- Abstract evaluation -------------------------------------------------------------


def _output_avals(operands: Operands) -> tuple[Any, Any]:
    query = operands.query
    rows = query.shape[:-1]
    out = updated(query, (*rows, operands.value.shape[-1]), query.dtype, query.ndim - 1)
    lse = updated(query, rows, accumulation_dtype(query.dtype), query.ndim - 1)
    return out, lse


def _forward_abstract(
    *avals: Any, present: tuple[str, ...], problem: Problem, implementation: str | None
) -> tuple[Any, Any]:
    return _output_avals(unpack(avals, present))


def _tangent_abstract(
    *avals: Any,
    tangents: tuple[str, ...],
    present: tuple[str, ...],
    problem: Problem,
    implementation: str | None,
) -> tuple[Any, Any]:
    return _output_avals(unpack(avals[len(tangents) : -2], present))


def _backward_abstract(
    *avals: Any,
    present: tuple[str, ...],
    has_dlse: bool,
    wrt: tuple[str, ...],
    problem: Problem,
    implementation: str | None,
) -> tuple[Any, ...]:
    operands = unpack(avals[len(residual_names(has_dlse)) :], present)
    return tuple(getattr(operands, name) for name in wrt)


# ---- Batching ------------------------------------------------------------------------

# jax 0.10 to 0.12 differ in whether the explicit mesh axis is an argument.
_TAKES_MESH_AXIS = len(inspect.signature(batching.bdim_at_front).parameters) > 3


def _full(array: jax.Array, axis: int | None, axis_data: Any) -> jax.Array:
    """The mapped axis in front, of full size."""
    extra = (axis_data.explicit_mesh_axis,) if _TAKES_MESH_AXIS else ()
    return batching.bdim_at_front(array, axis, axis_data.size, *extra)


def _broadcastable(array: jax.Array, axis: int | None, axis_data: Any) -> jax.Array:
    """The mapped axis in front, of size 1 where the operand is not mapped."""
    if axis is None:
        return jnp.expand_dims(array, 0)
    return _full(array, axis, axis_data)


def _batch(
    primitive: Primitive,
    names: Sequence[str],
    full: frozenset[str],
    axis_data: Any,
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
    params: dict[str, Any],
) -> tuple[list[jax.Array], list[int | None]]:
    """Binds with a new leading batch axis; ``full`` names operands to broadcast."""
    if all(axis is None for axis in axes):
        outputs = primitive.bind(*arrays, **params)
        return outputs, [None] * len(outputs)
    batched = [
        (_broadcastable if name in BROADCASTABLE and name not in full else _full)(
            array, axis, axis_data
        )
        for name, array, axis in zip(names, arrays, axes, strict=True)
    ]
    outputs = primitive.bind(*batched, **params)
    return outputs, [0] * len(outputs)


def _forward_batch(
    axis_data: Any, arrays: Any, axes: Any, *, present: tuple[str, ...], **params: Any
) -> Any:
    params["present"] = present
    return _batch(forward_p, present, frozenset(), axis_data, arrays, axes, params)


def _tangent_batch(
    axis_data: Any,
    arrays: Any,
    axes: Any,
    *,
    tangents: tuple[str, ...],
    present: tuple[str, ...],
    **params: Any,
) -> Any:
    params.update(tangents=tangents, present=present)
    names = (*tangents, *present, "out", "lse")
    # The gradient takes the bias's shape, so the bias and its tangent batch alike.
    mapped = {name for name, axis in zip(names, axes) if axis is not None}
    full = frozenset({"bias"} & mapped)
    return _batch(tangent_p, names, full, axis_data, arrays, axes, params)


def _backward_batch(
    axis_data: Any,
    arrays: Any,
    axes: Any,
    *,
    present: tuple[str, ...],
    has_dlse: bool,
    wrt: tuple[str, ...],
    **params: Any,
) -> Any:
    params.update(present=present, has_dlse=has_dlse, wrt=wrt)
    names = (*residual_names(has_dlse), *present)
    # A mapped gradient of an unmapped bias is one gradient per example.
    full = frozenset({"bias"} & set(wrt))
    return _batch(backward_p, names, full, axis_data, arrays, axes, params)


# ---- Primitives ----------------------------------------------------------------------


def _make(name: str, abstract: Any, batch: Any) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)

    batching.fancy_primitive_batchers[primitive] = batch
    return primitive


forward_p = _make("neighborhood_attention", _forward_abstract, _forward_batch)
tangent_p = _make("neighborhood_attention_tangent", _tangent_abstract, _tangent_batch)
backward_p = _make(
    "neighborhood_attention_backward", _backward_abstract, _backward_batch
)
