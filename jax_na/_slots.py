"""The slots of windows: which hold keys, and which entry of the bias belongs to each.

A query has ``prod(kernel_size)`` slots; slot j of an axis is the j-th key of the query's
window there, and the last axis varies fastest. Everything factorises over the axes, so
that a table of all queries and slots only ever exists inside XLA's fusions.

``B`` stands for the batch axes below and ``B'`` for as many that are each full or of size
1; ``S`` is the number of slots.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_na import _window
from jax_na._problem import Problem, accumulation_dtype


class _Axis(NamedTuple):
    """One axis; NumPy arrays, or traced ones where there is a frame.

    Attributes:
        exists: ``[B', L]``: which queries are tokens of the grid.
        held: ``[B', L, k]``: which slots hold a key that the local arrays have.
        first_row: ``[B', L]``: the bias's row of slot 0, in ``[0, k - 1]``.
    """

    exists: Any
    held: Any
    first_row: Any


def _axes(
    problem: Problem,
    grid: Sequence[int],
    key_grid: Sequence[int],
    frame: jax.Array | None,
    batch_rank: int,
) -> list[_Axis]:
    ones = (1,) * batch_rank
    result = []
    for axis, (
        query_length,
        key_length,
        size,
        stride,
        dilation,
        is_causal,
    ) in enumerate(
        zip(
            grid,
            key_grid,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            strict=True,
        )
    ):
        query: Any = np.arange(query_length, dtype=np.int32).reshape(*ones, -1)
        length: Any = query_length
        key_origin: Any = 0
        if frame is not None:
            length, origin, key_origin = (frame[..., i, axis, None] for i in range(3))
            query = query + origin
        residue, lo, hi = _window.key_interval(
            query, length, size, stride, dilation, is_causal
        )
        position = lo[..., None] + np.arange(size, dtype=np.int32)
        local = residue[..., None] + dilation * position
        if frame is not None:
            local = local - key_origin[..., None]
        exists = (query >= 0) & (query < length)
        held = exists[..., None] & (position < hi[..., None])
        first_row = _window.bias_row(query, residue + dilation * lo, size, dilation)
        result.append(
            _Axis(
                exists,
                held & (local >= 0) & (local < key_length),
                first_row.clip(0, size - 1),
            )
        )
    return result


def _outer(
    combine: Callable[[Any, Any], Any], parts: Sequence[Any], batch_rank: int
) -> jax.Array:
    """``[B', L_a, *slots of a]`` of each axis a to ``[B', *grid, *slots]``."""
    rank = len(parts)
    expanded = []
    for axis, part in enumerate(parts):
        shape = list(part.shape[:batch_rank]) + [1] * (2 * rank)
        shape[batch_rank + axis] = part.shape[batch_rank]
        shape[batch_rank + rank + axis] = math.prod(part.shape[batch_rank + 1 :])
        expanded.append(jnp.asarray(part).reshape(shape))
    return functools.reduce(combine, expanded)


def exists(
    problem: Problem, grid: Sequence[int], frame: jax.Array | None, batch_rank: int
) -> jax.Array | None:
    """Which queries are tokens of the grid ``[B', *grid]``; None for all of them."""
    if frame is None:
        return None
    axes = _axes(problem, grid, grid, frame, batch_rank)
    result = _outer(operator.and_, [axis.exists for axis in axes], batch_rank)
    return result.reshape(result.shape[: batch_rank + problem.rank])


def held(
    problem: Problem,
    grid: Sequence[int],
    key_grid: Sequence[int],
    frame: jax.Array | None,
    batch_rank: int,
) -> jax.Array | None:
    """Which slots hold a key ``[B', *grid, 1, S]``; None for all of them."""
    if frame is None and not any(problem.is_causal):
        return None
    axes = _axes(problem, grid, key_grid, frame, batch_rank)
    result = _outer(operator.and_, [axis.held for axis in axes], batch_rank)
    lead = result.shape[: batch_rank + problem.rank]
    return result.reshape(*lead, 1, math.prod(problem.kernel_size))


# ---- Relative positional bias --------------------------------------------------------


def spread_bias(
    bias: jax.Array, frame: jax.Array | None, problem: Problem, grid: Sequence[int]
) -> jax.Array:
    """From ``[B', N, *table]`` to the bias of every slot ``[B, *grid, N, S]``.

    Slots that hold no key get any entry of the table.
    """
    batch_rank = bias.ndim - problem.rank - 1
    index = []
    for number, axis in enumerate(_axes(problem, grid, grid, frame, batch_rank)):
        slots = np.arange(problem.kernel_size[number], dtype=np.int32)
        step = math.prod(problem.bias_shape[number + 1 :])
        index.append((axis.first_row[..., None] + slots) * step)
    rows = _outer(operator.add, index, batch_rank)
    slots_count = math.prod(problem.kernel_size)
    entries = jnp.take_along_axis(
        bias.reshape(*bias.shape[: batch_rank + 1], math.prod(problem.bias_shape)),
        rows.reshape(*rows.shape[:batch_rank], 1, math.prod(grid) * slots_count),
        axis=-1,
        mode="promise_in_bounds",
    )
    entries = entries.reshape(*entries.shape[: batch_rank + 1], *grid, slots_count)
    return jnp.moveaxis(entries, batch_rank, -2)


def collect_bias(
    slots: jax.Array, frame: jax.Array | None, problem: Problem
) -> jax.Array:
    """The transpose of :func:`spread_bias`: sums ``[B, *grid, N, S]`` by entry.

    Axis by axis, and deterministic: first over the queries whose windows begin with the
    same row, a matrix product with zeros and ones; then over the slots and beginnings
    that make the same row.

    Returns:
        ``[B, N, *table]`` in the accumulation dtype.
    """
    rank, batch_rank = problem.rank, slots.ndim - problem.rank - 2
    grid, heads = slots.shape[batch_rank:-2], slots.shape[-2]
    accumulation = accumulation_dtype(slots.dtype)
    samples = tuple(range(batch_rank))
    part = slots.reshape(*slots.shape[:-1], *problem.kernel_size)
    for number, axis in enumerate(_axes(problem, grid, grid, frame, batch_rank)):
        # [B, *grid from this axis on, N, *rows of earlier axes, *slots from here on]
        size = problem.kernel_size[number]
        beginnings = np.arange(size - 1, -1, -1, dtype=np.int32)
        begins = jnp.asarray(axis.first_row[..., None] == beginnings)
        lead = part.shape[:batch_rank]
        part = jax.lax.dot_general(
            jnp.broadcast_to(begins, (*lead, *begins.shape[-2:])).astype(part.dtype),
            part,
            (((batch_rank,), (batch_rank,)), (samples, samples)),
            precision=problem.precision,
            preferred_element_type=accumulation,
        )
        part = jnp.moveaxis(part, (batch_rank, number - rank), (-2, -1))
        part = jnp.moveaxis(_diagonal_sums(part), -1, number - rank)
    return part.reshape(*slots.shape[:batch_rank], heads, *problem.bias_shape)


def _diagonal_sums(array: jax.Array) -> jax.Array:
    """Sums ``[..., n, n]`` to ``[..., 2 n - 1]``: entry ``n - 1 - i + j`` of row i."""
    size = array.shape[-1]
    lead = array.shape[:-2]
    # Rows of one more element than the result has shift each row against the next.
    rows = jnp.flip(array, axis=-2)
    rows = jnp.pad(rows, [(0, 0)] * (array.ndim - 1) + [(0, size)])
    flat = rows.reshape(*lead, 2 * size * size)[..., :-size]
    return flat.reshape(*lead, size, 2 * size - 1).sum(axis=-2)
