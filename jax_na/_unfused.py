"""The three products of unfused neighborhood attention, as primitives.

``pair``     queries, keys -> slots      ``slots[t, j] = queries[t] . keys[key j of t]``
``gather``   slots, keys -> queries      ``sum_j slots[t, j] keys[key j of t]``
``scatter``  slots, queries -> keys      ``sum_(t, j) slots[t, j] queries[t]`` over those
                                         queries t, of all heads of the key head's group,
                                         whose key j it is

Each is bilinear, and its derivatives are the other two, so that any order in both modes
runs on the same kernels. Slots that hold no key (:mod:`jax_na._slots`) are 0 in ``pair``
and are not read in the others. Two linear maps go with them, each the transpose of the
other: ``spread`` gives every slot its relative positional bias, ``collect`` sums by it.

Shapes, with any number of batch axes ``B``: queries ``[B, *grid, N, D]``, keys ``[B,
*key_grid, K, D]``, slots ``[B, *grid, N, prod(kernel_size)]``, bias ``[B', N, *table]``,
frame int32 ``[B', 3, rank]`` or None.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad

from jax_na import _primitives, _slots
from jax_na._problem import Problem, accumulation_dtype
from jax_na._sharding import updated

NAMES = {
    "pair": ("queries", "keys", "frame"),
    "gather": ("slots", "keys", "frame"),
    "scatter": ("slots", "queries", "frame"),
    "spread": ("bias", "frame"),
    "collect": ("slots", "frame"),
}


# ---- The products --------------------------------------------------------------------


def pair(
    queries: jax.Array,
    keys: jax.Array,
    frame: jax.Array | None,
    problem: Problem,
    implementation: str | None,
    dtype: Any,
) -> jax.Array:
    """Slots of ``dtype``: the operands' or their accumulation dtype, as below."""
    return _bind(
        pair_p,
        (queries, keys),
        frame,
        problem,
        implementation=implementation,
        dtype=np.dtype(dtype),
    )


def gather(
    slots: jax.Array,
    keys: jax.Array,
    frame: jax.Array | None,
    problem: Problem,
    implementation: str | None,
    dtype: Any,
) -> jax.Array:
    """Queries of ``dtype``."""
    return _bind(
        gather_p,
        (slots, keys),
        frame,
        problem,
        implementation=implementation,
        dtype=np.dtype(dtype),
    )


def scatter(
    slots: jax.Array,
    queries: jax.Array,
    frame: jax.Array | None,
    problem: Problem,
    implementation: str | None,
    dtype: Any,
    key_shape: Sequence[int],
) -> jax.Array:
    """Keys of ``dtype``; ``key_shape`` is ``(*key_grid, K)``."""
    return _bind(
        scatter_p,
        (slots, queries),
        frame,
        problem,
        implementation=implementation,
        dtype=np.dtype(dtype),
        key_shape=tuple(key_shape),
    )


def spread(
    bias: jax.Array, frame: jax.Array | None, problem: Problem, grid: Sequence[int]
) -> jax.Array:
    """The bias of every slot; slots that hold no key get any entry of the table."""
    return _bind(spread_p, (bias,), frame, problem, grid=tuple(grid))


def collect(slots: jax.Array, frame: jax.Array | None, problem: Problem) -> jax.Array:
    """Sums slots to ``[B, N, *table]`` in the accumulation dtype; all are read."""
    return _bind(collect_p, (slots,), frame, problem)


@functools.partial(jax.jit, static_argnames=("problem", "implementation", "dtype"))
def scores(
    queries: jax.Array,
    keys: jax.Array,
    bias: jax.Array | None,
    frame: jax.Array | None,
    problem: Problem,
    implementation: str | None,
    dtype: Any,
) -> jax.Array:
    """``scale * queries . keys + bias``, -inf in slots that hold no key."""
    first, last = grid_axes(queries, problem)
    grid, key_grid = queries.shape[first:last], keys.shape[first:last]
    accumulation = accumulation_dtype(queries.dtype)
    products = pair(queries, keys, frame, problem, implementation, accumulation)
    result = problem.scale * products
    if bias is not None:
        result += spread(bias, frame, problem, grid)
    held = _slots.held(problem, grid, key_grid, frame, first)
    if held is not None:
        result = jnp.where(held, result, -jnp.inf)
    return result.astype(dtype)


def grid_axes(array: Any, problem: Problem) -> tuple[int, int]:
    """The first axis of the grid of queries, keys or slots, and the one after it."""
    return array.ndim - problem.rank - 2, array.ndim - 2


def _bind(
    primitive: Primitive,
    operands: tuple[jax.Array, ...],
    frame: jax.Array | None,
    problem: Problem,
    **params: Any,
) -> jax.Array:
    # Two calls that differ in nothing that matters share their compiled code.
    problem = dataclasses.replace(problem, scale=1.0, deterministic_grads=None)
    frames = () if frame is None else (frame,)
    (result,) = primitive.bind(*operands, *frames, problem=problem, **params)
    return result


def frame_of(frames: tuple[jax.Array, ...]) -> jax.Array | None:
    return frames[0] if frames else None


# ---- Abstract evaluation -------------------------------------------------------------


def _pair_abstract(
    queries: Any, keys: Any, *_: Any, problem: Problem, dtype: Any, **params: Any
) -> tuple[Any]:
    del keys, params
    shape = (*queries.shape[:-1], int(np.prod(problem.kernel_size)))
    return (updated(queries, shape, dtype, queries.ndim - 1),)


def _gather_abstract(
    slots: Any, keys: Any, *_: Any, dtype: Any, **params: Any
) -> tuple[Any]:
    del params
    shape = (*slots.shape[:-1], keys.shape[-1])
    return (updated(slots, shape, dtype, slots.ndim - 1),)


def _scatter_abstract(
    slots: Any,
    queries: Any,
    *_: Any,
    problem: Problem,
    dtype: Any,
    key_shape: tuple[int, ...],
    **params: Any,
) -> tuple[Any]:
    del params
    first, _last = grid_axes(slots, problem)
    shape = (*slots.shape[:first], *key_shape, queries.shape[-1])
    return (updated(queries, shape, dtype, slots.ndim - 1),)


def _spread_abstract(
    bias: Any, *frames: Any, problem: Problem, grid: tuple[int, ...]
) -> tuple[Any]:
    batch_rank = bias.ndim - problem.rank - 1
    batches = [array.shape[:batch_rank] for array in (bias, *frames)]
    shape = (
        *np.broadcast_shapes(*batches),
        *grid,
        bias.shape[batch_rank],
        int(np.prod(problem.kernel_size)),
    )
    return (updated(bias, shape, bias.dtype, batch_rank),)


def _collect_abstract(slots: Any, *_: Any, problem: Problem) -> tuple[Any]:
    first, _last = grid_axes(slots, problem)
    shape = (*slots.shape[:first], slots.shape[-2], *problem.bias_shape)
    dtype = accumulation_dtype(slots.dtype)
    return (updated(slots, shape, dtype, first),)


# ---- Batching ------------------------------------------------------------------------


def _batch(
    name: str, axis_data: Any, arrays: Any, axes: Any, **params: Any
) -> tuple[Any, Any]:
    names = NAMES[name][: len(arrays)]
    return _primitives._batch(
        PRIMITIVES[name], names, frozenset(), axis_data, arrays, axes, params
    )


def _make(name: str, abstract: Any) -> Primitive:
    return _primitives._make(
        f"neighborhood_attention_{name}", abstract, functools.partial(_batch, name)
    )


pair_p = _make("pair", _pair_abstract)
gather_p = _make("gather", _gather_abstract)
scatter_p = _make("scatter", _scatter_abstract)
spread_p = _make("spread", _spread_abstract)
collect_p = _make("collect", _collect_abstract)

PRIMITIVES = {
    "pair": pair_p,
    "gather": gather_p,
    "scatter": scatter_p,
    "spread": spread_p,
    "collect": collect_p,
}


# ---- Differentiation -----------------------------------------------------------------

# The gradient of one operand of a primitive: from the cotangent of the result, the
# operand's aval, the other operand, the frame and the primitive's parameters. Operands
# of a product have one dtype, so that a wide cotangent is rounded to it.
_Gradient = Callable[..., jax.Array]


def _pair_to_queries(
    ct: Any, queries: Any, keys: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    dtype = queries.dtype
    return gather(
        ct.astype(dtype), keys, frame, problem, params["implementation"], dtype
    )


def _to_keys(
    slots: Any, keys: Any, queries: Any, frame: Any, problem: Problem, params: Any
) -> jax.Array:
    first, _ = grid_axes(keys, problem)
    return scatter(
        slots,
        queries,
        frame,
        problem,
        params["implementation"],
        keys.dtype,
        keys.shape[first:-1],
    )


def _pair_to_keys(
    ct: Any, keys: Any, queries: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    return _to_keys(ct.astype(keys.dtype), keys, queries, frame, problem, params)


def _gather_to_slots(
    ct: Any, slots: Any, keys: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    dtype = slots.dtype
    return pair(ct.astype(dtype), keys, frame, problem, params["implementation"], dtype)


def _gather_to_keys(
    ct: Any, keys: Any, slots: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    return _to_keys(slots, keys, ct.astype(keys.dtype), frame, problem, params)


def _scatter_to_slots(
    ct: Any, slots: Any, queries: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    dtype = slots.dtype
    keys = ct.astype(dtype)
    return pair(queries, keys, frame, problem, params["implementation"], dtype)


def _scatter_to_queries(
    ct: Any, queries: Any, slots: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    dtype = queries.dtype
    keys = ct.astype(dtype)
    return gather(slots, keys, frame, problem, params["implementation"], dtype)


def _spread_to_bias(
    ct: Any, bias: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    gradient = collect(ct, frame, problem)
    axes = tuple(
        axis
        for axis, (size, full) in enumerate(
            zip(bias.shape, gradient.shape, strict=True)
        )
        if size != full
    )
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


def _collect_to_slots(
    ct: Any, slots: Any, frame: Any, problem: Problem, **params: Any
) -> jax.Array:
    first, last = grid_axes(slots, problem)
    return spread(ct, frame, problem, slots.shape[first:last]).astype(slots.dtype)


def _jvp(
    primitive: Primitive, linear: int, primals: Any, tangents: Any, **params: Any
) -> Any:
    """Of a map that is linear in each of its first ``linear`` operands."""
    outputs = primitive.bind(*primals, **params)
    total = None
    for position, tangent in enumerate(tangents[:linear]):
        if isinstance(tangent, ad.Zero):
            continue
        operands = list(primals)
        operands[position] = tangent
        (term,) = primitive.bind(*operands, **params)
        total = term if total is None else total + term
    if total is None:
        total = ad.Zero(jax.typeof(outputs[0]).to_tangent_aval())
    return outputs, [total]


def _transpose(
    gradients: tuple[_Gradient, ...], cotangents: Any, *operands: Any, **params: Any
) -> list[Any]:
    (ct,) = cotangents
    linear, frame = operands[: len(gradients)], frame_of(operands[len(gradients) :])
    results: list[Any] = [None] * len(operands)
    for position, (gradient, operand) in enumerate(zip(gradients, linear, strict=True)):
        if not ad.is_undefined_primal(operand):
            continue
        aval = operand.aval
        others = linear[:position] + linear[position + 1 :]
        results[position] = (
            ad.Zero(aval)
            if isinstance(ct, ad.Zero)
            else gradient(ct, aval, *others, frame, **params)
        )
    return results


_GRADIENTS: dict[Primitive, tuple[_Gradient, ...]] = {
    pair_p: (_pair_to_queries, _pair_to_keys),
    gather_p: (_gather_to_slots, _gather_to_keys),
    scatter_p: (_scatter_to_slots, _scatter_to_queries),
    spread_p: (_spread_to_bias,),
    collect_p: (_collect_to_slots,),
}
for _primitive, _rules in _GRADIENTS.items():
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive, len(_rules))
    ad.primitive_transposes[_primitive] = functools.partial(_transpose, _rules)
