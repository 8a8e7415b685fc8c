"""Portable implementation in pure JAX: any backend, any floating-point dtype.

Tile by tile (:mod:`jax_na._blocks`): gather the block of tokens that a tile's windows
cover, and run dense masked attention between the two, in memory linear in the number of
tokens. Derivatives of higher order differentiate this code.

Values that are not finite reach only rows that see them. Scores take one query and one
key each, and are selected, never multiplied. Weighted sums of tokens, where 0 * NaN
would be NaN, leave out tokens that are not finite and make NaN of the rows that give
them weight.

A tile of queries is ``[B, K, c, G, T, channels]`` and its block of keys ``[B, K, c, S,
channels]`` below; where keys own the tiles, it is the other way round. ``g``, ``q`` and
``k`` stand for G, queries and keys in the scores ``[B, K, c, g, q, k]``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_na._blocks import Meeting, Sweep, outer, take
from jax_na._problem import Operands, Problem, accumulation_dtype

_SCORES = "...gqc,...kc->...gqk"
_SUM_OF_KEYS = "...gqk,...kc->...gqc"
_SUM_OF_QUERIES = "...gqk,...gqc->...kc"


# ---- Attention -----------------------------------------------------------------------


def forward(operands: Operands, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """``(out, lse)``: out in the query's dtype, lse in the accumulation dtype."""
    dtype = operands.query.dtype
    sweep = Sweep(problem, operands.query, operands.key, operands.frame)

    def step(totals: None, meeting: Meeting) -> tuple[None, Any]:
        query = sweep.tile(operands.query, meeting)
        key, value = _keys_met(sweep, operands, meeting)
        scores = _scores(query, key, operands.bias, meeting, sweep, problem)
        out, lse = _attend(scores, _visibility(meeting, key), value, problem)
        return totals, (out.astype(dtype), lse)

    _, (out, lse) = sweep.run(step)
    return sweep.untiled(out), sweep.untiled(lse)[..., 0]


def _attend(
    scores: jax.Array, visible: jax.Array, value: jax.Array, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    """``out [..., g, q, channels]`` and ``lse [..., g, q, 1]`` of a tile of queries."""
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    # A row that sees nothing: out 0, lse -inf, and finite detours for the gradients.
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = _weighted_sum(_SUM_OF_KEYS, weights, value, problem) / total
    return jnp.where(empty, 0, out), jnp.where(empty, -jnp.inf, peak + jnp.log(total))


def backward(
    operands: Operands,
    problem: Problem,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    wrt: frozenset[str],
) -> dict[str, jax.Array]:
    """Gradients of the operands named in ``wrt``, in their shapes and dtypes."""
    accumulation = accumulation_dtype(dout.dtype)
    delta = (dout.astype(accumulation) * out.astype(accumulation)).sum(axis=-1)
    if dlse is not None:
        delta = delta - dlse
    rows = (operands.query, dout, lse[..., None], delta[..., None])
    gradients: dict[str, jax.Array] = {}
    if wrt - {"key", "value"}:
        gradients |= _query_gradients(operands, problem, rows, wrt - {"key", "value"})
    if wrt & {"key", "value"}:
        gradients |= _key_gradients(operands, problem, rows, wrt & {"key", "value"})
    return {
        name: gradient.astype(getattr(operands, name).dtype)
        for name, gradient in gradients.items()
    }


def _query_gradients(
    operands: Operands, problem: Problem, rows: Any, wrt: frozenset[str]
) -> dict[str, jax.Array]:
    """Gradients of everything but keys and values: tiles of queries meet keys."""
    sweep = Sweep(problem, operands.query, operands.key, operands.frame)
    shared = wrt - {"query"}

    def step(totals: Any, meeting: Meeting) -> tuple[Any, Any]:
        query, dout, lse, delta = (sweep.tile(array, meeting) for array in rows)
        key, value = _keys_met(sweep, operands, meeting)
        scores = _scores(query, key, operands.bias, meeting, sweep, problem)
        visible = _visibility(meeting, key)
        weights = _weights(scores, visible, lse)
        dscores = _score_gradients(weights, visible, value, dout, delta, problem)
        near = meeting.visible.shape[-1]
        parts = {}
        if "bias" in shared:
            parts["bias"] = _bias_gradient(
                dscores[..., :near], meeting, sweep, operands.bias.shape
            )
        if "additional_key" in shared:
            part = _product(
                _SUM_OF_QUERIES, dscores[..., near:], _finite(query), problem
            )
            parts["additional_key"] = problem.scale * _over_cells(part)
        if "additional_value" in shared:
            part = _weighted_sum(_SUM_OF_QUERIES, weights[..., near:], dout, problem)
            parts["additional_value"] = _over_cells(part)
        totals = {name: total + parts[name] for name, total in totals.items()}
        if "query" not in wrt:
            return totals, {}
        dquery = problem.scale * _product(_SUM_OF_KEYS, dscores, _finite(key), problem)
        return totals, {"query": dquery.astype(query.dtype)}

    totals = {
        name: jnp.zeros_like(getattr(operands, name), dtype=rows[2].dtype)
        for name in shared
    }
    totals, results = sweep.run(step, totals)
    return totals | {name: sweep.untiled(array) for name, array in results.items()}


def _key_gradients(
    operands: Operands, problem: Problem, rows: Any, wrt: frozenset[str]
) -> dict[str, jax.Array]:
    """Gradients of keys and values: their tiles meet the queries that see them."""
    sweep = Sweep(problem, operands.query, operands.key, operands.frame, by_key=True)
    dtype = operands.key.dtype

    def step(totals: None, meeting: Meeting) -> tuple[None, Any]:
        key = _one_group(sweep.tile(operands.key, meeting))
        value = _one_group(sweep.tile(operands.value, meeting))
        query, dout, lse, delta = (sweep.block(array, meeting) for array in rows)
        scores = _scores(query, key, operands.bias, meeting, sweep, problem)
        weights = _weights(scores, meeting.visible, lse)
        results = {}
        if "key" in wrt:
            dscores = _score_gradients(
                weights, meeting.visible, value, dout, delta, problem
            )
            part = _product(_SUM_OF_QUERIES, dscores, _finite(query), problem)
            results["key"] = problem.scale * part
        if "value" in wrt:
            results["value"] = _weighted_sum(_SUM_OF_QUERIES, weights, dout, problem)
        return totals, {
            name: array.astype(dtype)[..., None, :, :]
            for name, array in results.items()
        }

    _, results = sweep.run(step)
    return {name: sweep.untiled(array) for name, array in results.items()}


def _weights(scores: jax.Array, visible: jax.Array, lse: jax.Array) -> jax.Array:
    """``P = softmax(scores)``, from the rows' log-sum-exp."""
    seen = visible & (lse != -jnp.inf)
    return jnp.exp(jnp.where(seen, scores - lse, -jnp.inf))


def _score_gradients(
    weights: jax.Array,
    visible: jax.Array,
    value: jax.Array,
    dout: jax.Array,
    delta: jax.Array,
    problem: Problem,
) -> jax.Array:
    """``dS = P * (dO V^T - delta)``."""
    dweights = _product(_SCORES, dout, value, problem)
    return jnp.where(visible, weights * (dweights - delta), 0)


# ---- Unfused -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="problem")
def qk(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    frame: jax.Array | None,
    problem: Problem,
) -> jax.Array:
    """Scores of every query's window ``[B, *grid, N, prod(kernel_size)]``.

    Slot j of an axis is the j-th key of the window, the last axis varies fastest; slots
    that no key fills are -inf.
    """
    sweep = Sweep(problem, query, key, frame, by_slot=True)

    def step(totals: None, meeting: Meeting) -> tuple[None, jax.Array]:
        tile = sweep.tile(query, meeting)
        block = _one_group(sweep.block(key, meeting))
        scores = _scores(tile, block, bias, meeting, sweep, problem)
        scores = jnp.where(meeting.visible, scores, -jnp.inf)
        return totals, scores.astype(query.dtype)

    return sweep.untiled(sweep.run(step)[1])


@functools.partial(jax.jit, static_argnames="problem")
def av(
    weights: jax.Array, value: jax.Array, frame: jax.Array | None, problem: Problem
) -> jax.Array:
    """Sums of every query's window, ``[B, *grid, N, Dv]``, weighted slot by slot."""
    sweep = Sweep(problem, weights, value, frame, by_slot=True)

    def step(totals: None, meeting: Meeting) -> tuple[None, jax.Array]:
        held = jnp.where(meeting.visible, sweep.tile(weights, meeting), 0)
        block = _one_group(sweep.block(value, meeting))
        out = _product(_SUM_OF_KEYS, held, block, problem)
        return totals, out.astype(weights.dtype)

    return sweep.untiled(sweep.run(step)[1])


# ---- Products ------------------------------------------------------------------------


def _product(
    subscripts: str, first: jax.Array, tokens: jax.Array, problem: Problem
) -> jax.Array:
    """Matrix products of the tokens' dtype, summed in the accumulation dtype."""
    return jnp.einsum(
        subscripts,
        first.astype(tokens.dtype),
        tokens,
        precision=problem.precision,
        preferred_element_type=accumulation_dtype(tokens.dtype),
    )


def _finite(tokens: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(tokens), tokens, 0)


def _weighted_sum(
    subscripts: str, weights: jax.Array, tokens: jax.Array, problem: Problem
) -> jax.Array:
    """Sums with weights >= 0; a token that is not finite spoils what it has weight in."""
    bad = ~jnp.isfinite(tokens).all(axis=-1, keepdims=True)
    spoiled = _product(subscripts, weights, bad.astype(tokens.dtype), problem) > 0
    total = _product(subscripts, weights, _finite(tokens), problem)
    return total + jnp.where(spoiled, jnp.nan, 0)


def _scores(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    meeting: Meeting,
    sweep: Sweep,
    problem: Problem,
) -> jax.Array:
    """``scale q.k + bias``; additional keys follow those of the window, without bias."""
    scores = problem.scale * _product(_SCORES, query, key, problem)
    if bias is None:
        return scores
    block = _bias_block(bias, meeting, sweep)
    extra = scores.shape[-1] - block.shape[-1]
    return scores + jnp.pad(block, [(0, 0)] * (block.ndim - 1) + [(0, extra)])


# ---- Blocks of keys, and the additional keys -----------------------------------------


def _one_group(array: jax.Array) -> jax.Array:
    """Keys without the axis of query heads per key head."""
    return array[..., 0, :, :]


def _keys_met(
    sweep: Sweep, operands: Operands, meeting: Meeting
) -> tuple[jax.Array, jax.Array]:
    """Blocks of keys and values, the additional ones at their end."""

    def block(array: jax.Array, additional: jax.Array | None) -> jax.Array:
        near = _one_group(sweep.block(array, meeting))
        if additional is None:
            return near
        extra = jnp.swapaxes(additional, -3, -2)[..., :, None, :, :]
        extra = jnp.broadcast_to(extra, (*near.shape[:-2], *extra.shape[-2:]))
        return jnp.concatenate([near, extra], axis=-2)

    return (
        block(operands.key, operands.additional_key),
        block(operands.value, operands.additional_value),
    )


def _visibility(meeting: Meeting, key: jax.Array) -> jax.Array:
    """Who sees whom; every query of the grid sees the additional keys."""
    extra = key.shape[-2] - meeting.visible.shape[-1]
    if not extra:
        return meeting.visible
    shape = (*meeting.queries.shape[:-1], extra)
    return jnp.concatenate(
        [meeting.visible, jnp.broadcast_to(meeting.queries, shape)], axis=-1
    )


def _over_cells(part: jax.Array) -> jax.Array:
    """``[B, K, c, M, channels]`` to ``[B, M, K, channels]``."""
    return jnp.swapaxes(part.sum(axis=-3), -3, -2)


# ---- Relative positional bias --------------------------------------------------------


def _bias_block(bias: jax.Array, meeting: Meeting, sweep: Sweep) -> jax.Array:
    """The bias of every query and key of the cells: ``[B', K, c, g, q, k]``."""
    rows = []
    for corner, kernel_size, (queries, keys) in zip(
        meeting.corners, sweep.problem.kernel_size, sweep.extents
    ):
        offset = jnp.arange(keys) - jnp.arange(queries)[:, None]
        # Rows of pairs that do not see each other may lie beyond the table.
        row = jnp.clip(corner[..., None, None] + offset, 0, 2 * kernel_size - 2)
        rows.append(row)
    sizes = sweep.problem.bias_shape
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    index = outer(jnp.add, [r * stride for r, stride in zip(rows, strides)], sides=2)
    batch = bias.shape[: bias.ndim - len(sizes) - 1]
    heads = (sweep.key_heads, bias.shape[len(batch)] // sweep.key_heads)
    table = jnp.moveaxis(bias.reshape(*batch, *heads, math.prod(sizes)), -1, len(batch))
    pairs = index.reshape(*index.shape[:-2], math.prod(index.shape[-2:]))
    block = take(table[..., None], pairs)
    return block.reshape(*block.shape[:-2], *index.shape[-2:])


def _bias_gradient(
    dscores: jax.Array, meeting: Meeting, sweep: Sweep, shape: tuple[Any, ...]
) -> jax.Array:
    """Sums ``dscores [B, K, c, g, q, k]`` over equal offsets, to the bias's ``shape``.

    Axis by axis: a cell's diagonals, and from there the rows of the table.
    """
    rank = len(sweep.extents)
    queries, keys = zip(*sweep.extents)
    lead = dscores.ndim - 2
    part = dscores.reshape(*dscores.shape[:lead], *queries, *keys)
    for axis in reversed(range(rank)):  # [B, K, c, g, *queries, *keys, *rows]
        part = jnp.moveaxis(part, (lead + axis, lead + 2 * axis + 1), (-2, -1))
        part = _diagonal_sums(part)
        rows = jnp.arange(sweep.problem.bias_shape[axis])
        place = rows - meeting.corners[axis][..., None] + queries[axis] - 1
        place = place[..., None, :, None, :]  # [B', 1, c, 1, rows]
        place = jnp.expand_dims(place, tuple(range(lead, part.ndim - 1)))
        inside = (place >= 0) & (place < part.shape[-1])
        part = jnp.take_along_axis(
            part, jnp.clip(place, 0, part.shape[-1] - 1), axis=-1, mode="clip"
        )
        part = jnp.moveaxis(jnp.where(inside, part, 0), -1, lead + 2 * axis)
    part = part.sum(axis=lead - 2)
    batch_rank = lead - 3
    axes = tuple(axis for axis in range(batch_rank) if shape[axis] == 1)
    return part.sum(axis=axes, keepdims=True).reshape(shape)


def _diagonal_sums(array: jax.Array) -> jax.Array:
    """``[..., q, k]`` to ``[..., q + k - 1]``: sums where ``k - q + (Q - 1)`` is equal."""
    queries, keys = array.shape[-2:]
    lead = array.shape[:-2]
    # Rows of one more element shift each row by one against the row before it.
    rows = jnp.flip(array, axis=-2)
    rows = jnp.pad(rows, [(0, 0)] * (array.ndim - 1) + [(0, queries)])
    flat = rows.reshape(*lead, queries * (keys + queries))[..., :-queries]
    return flat.reshape(*lead, queries, keys + queries - 1).sum(axis=-2)
