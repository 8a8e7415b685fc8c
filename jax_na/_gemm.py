"""Attention composed of the unfused products: the 'gemm' implementation.

Scores and weights of every window are arrays in memory, ``[B, *grid, N, S]``, as in the
paper's GEMM-based neighborhood attention; what lies between the products is left to XLA,
which fuses it. Scores and their gradients before softmax are in the accumulation dtype,
because an error of a score is a relative error of its weight, and large scores have
large errors in short dtypes. Weights and the gradients of scores, which enter products,
have the operands' dtype, as in the fused kernels. Weights are relative to the largest of
a query there, which is then exactly 1.

The interface is that of :mod:`jax_na._xla`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_na import _slots, _unfused
from jax_na._problem import Operands, Problem, accumulation_dtype


class _Masks(NamedTuple):
    """None where a mask is True everywhere.

    Attributes:
        held: ``[B', *grid, 1, S]``: which slots hold a key.
        exists: ``[B', *grid, 1, 1]``: which queries are tokens of the grid.
    """

    held: jax.Array | None
    exists: jax.Array | None


def _masks(operands: Operands, problem: Problem) -> _Masks:
    first, last = _unfused.grid_axes(operands.query, problem)
    grid, key_grid = (a.shape[first:last] for a in (operands.query, operands.key))
    exists = _slots.exists(problem, grid, operands.frame, first)
    return _Masks(
        _slots.held(problem, grid, key_grid, operands.frame, first),
        None if exists is None else exists[..., None, None],
    )


def _select(mask: jax.Array | None, array: jax.Array, other: float) -> jax.Array:
    return array if mask is None else jnp.where(mask, array, other)


# ---- Additional keys -----------------------------------------------------------------


def _grouped(array: jax.Array, operands: Operands, problem: Problem) -> jax.Array:
    """``[B, *grid, N, channels]`` to ``[B, tokens, K, G, channels]``."""
    first, last = _unfused.grid_axes(array, problem)
    key_heads = operands.key.shape[-2]
    heads = (key_heads, array.shape[-2] // key_heads)
    tokens = math.prod(array.shape[first:last])
    return array.reshape(*array.shape[:first], tokens, *heads, array.shape[-1])


def _product(
    subscripts: str, first: jax.Array, second: jax.Array, problem: Problem
) -> jax.Array:
    return jnp.einsum(
        subscripts,
        first.astype(second.dtype),
        second,
        precision=problem.precision,
        preferred_element_type=accumulation_dtype(second.dtype),
    )


def _pair_additional(
    queries: jax.Array, keys: jax.Array, operands: Operands, problem: Problem
) -> jax.Array:
    """``[B, *grid, N, M]``."""
    grouped = _grouped(queries, operands, problem)
    products = _product("...tkgd,...mkd->...tkgm", grouped, keys, problem)
    return products.reshape(*queries.shape[:-1], keys.shape[-3])


def _gather_additional(
    weights: jax.Array, keys: jax.Array, operands: Operands, problem: Problem
) -> jax.Array:
    """``[B, *grid, N, channels]`` in the accumulation dtype."""
    grouped = _grouped(weights, operands, problem)
    sums = _product("...tkgm,...mkd->...tkgd", grouped, keys, problem)
    return sums.reshape(*weights.shape[:-1], keys.shape[-1])


def _scatter_additional(
    weights: jax.Array, queries: jax.Array, operands: Operands, problem: Problem
) -> jax.Array:
    """``[B, M, K, channels]`` in the accumulation dtype."""
    return _product(
        "...tkgm,...tkgd->...mkd",
        _grouped(weights, operands, problem),
        _grouped(queries, operands, problem),
        problem,
    )


# ---- Attention -----------------------------------------------------------------------


def _scores(
    operands: Operands, problem: Problem, masks: _Masks, implementation: str
) -> list[jax.Array]:
    """Scores of the window's slots, and of the additional keys where there are any."""
    accumulation = accumulation_dtype(operands.query.dtype)
    scores = [
        _unfused.scores(
            operands.query,
            operands.key,
            operands.bias,
            operands.frame,
            problem,
            implementation,
            accumulation,
        )
    ]
    if operands.additional_key is not None:
        products = _pair_additional(
            operands.query, operands.additional_key, operands, problem
        )
        scores.append(_select(masks.exists, problem.scale * products, -jnp.inf))
    return scores


def forward(
    operands: Operands, problem: Problem, implementation: str = "gemm"
) -> tuple[jax.Array, jax.Array]:
    """``(out, lse)``: out in the query's dtype, lse in the accumulation dtype."""
    dtype, accumulation = operands.query.dtype, accumulation_dtype(operands.query.dtype)
    masks = _masks(operands, problem)
    scores = _scores(operands, problem, masks, implementation)
    peaks = [part.max(axis=-1, keepdims=True) for part in scores]
    peak = peaks[0] if len(peaks) == 1 else jnp.maximum(*peaks)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = [jnp.exp(part - peak) for part in scores]
    total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
    # A row that sees nothing: out 0, lse -inf.
    empty = total == 0
    out = _unfused.gather(
        weights[0].astype(dtype),
        operands.value,
        operands.frame,
        problem,
        implementation,
        accumulation,
    )
    if operands.additional_value is not None:
        out += _gather_additional(
            weights[1], operands.additional_value, operands, problem
        )
    out /= jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return out.astype(dtype), lse[..., 0]


def backward(
    operands: Operands,
    problem: Problem,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    wrt: frozenset[str],
    implementation: str = "gemm",
) -> dict[str, jax.Array]:
    """Gradients of the operands named in ``wrt``, in their shapes and dtypes."""
    dtype, accumulation = dout.dtype, accumulation_dtype(dout.dtype)
    masks = _masks(operands, problem)
    delta = (dout.astype(accumulation) * out.astype(accumulation)).sum(axis=-1)
    if dlse is not None:
        delta = delta - dlse
    lse, delta = lse[..., None], delta[..., None]

    scores = _scores(operands, problem, masks, implementation)
    weights = [jnp.where(lse == -jnp.inf, 0, jnp.exp(part - lse)) for part in scores]

    def by_score(weights: jax.Array, dweights: jax.Array, mask: Any) -> jax.Array:
        return _select(mask, weights * (dweights - delta), 0).astype(dtype)

    dscores: list[jax.Array] = []
    if wrt - {"value", "additional_value"}:
        dweights = _unfused.pair(
            dout, operands.value, operands.frame, problem, implementation, accumulation
        )
        dscores.append(by_score(weights[0], dweights, masks.held))
    if wrt & {"query", "additional_key"} and operands.additional_key is not None:
        dweights = _pair_additional(dout, operands.additional_value, operands, problem)
        dscores.append(by_score(weights[1], dweights, masks.exists))

    def scattered(slots: jax.Array, queries: jax.Array) -> jax.Array:
        first, _ = _unfused.grid_axes(operands.key, problem)
        return _unfused.scatter(
            slots,
            queries,
            operands.frame,
            problem,
            implementation,
            accumulation,
            operands.key.shape[first:-1],
        )

    gradients: dict[str, jax.Array] = {}
    if "query" in wrt:
        dquery = _unfused.gather(
            dscores[0],
            operands.key,
            operands.frame,
            problem,
            implementation,
            accumulation,
        )
        if operands.additional_key is not None:
            dquery += _gather_additional(
                dscores[1], operands.additional_key, operands, problem
            )
        gradients["query"] = problem.scale * dquery
    if "key" in wrt:
        gradients["key"] = problem.scale * scattered(dscores[0], operands.query)
    if "value" in wrt:
        gradients["value"] = scattered(weights[0].astype(dtype), dout)
    if "bias" in wrt:
        gradients["bias"] = _bias_gradient(dscores[0], operands, problem)
    # What queries outside of the grid hold must not matter, and 0 * NaN would be NaN.
    if "additional_key" in wrt:
        query = _select(masks.exists, operands.query, 0)
        dkey = _scatter_additional(dscores[1], query, operands, problem)
        gradients["additional_key"] = problem.scale * dkey
    if "additional_value" in wrt:
        gradients["additional_value"] = _scatter_additional(
            weights[1].astype(dtype), _select(masks.exists, dout, 0), operands, problem
        )
    return {
        name: gradient.astype(getattr(operands, name).dtype)
        for name, gradient in gradients.items()
    }


def _bias_gradient(
    dscores: jax.Array, operands: Operands, problem: Problem
) -> jax.Array:
    """Sums over the batch axes where the bias has size 1, before anything else."""
    bias, frame = operands.bias, operands.frame
    batch_rank = bias.ndim - problem.rank - 1

    def shared(array: jax.Array) -> jax.Array:
        axes = tuple(
            axis
            for axis in range(batch_rank)
            if bias.shape[axis] == 1 and (frame is None or frame.shape[axis] == 1)
        )
        return array.sum(axis=axes, keepdims=True, dtype=bias.dtype) if axes else array

    gradient = _unfused.collect(shared(dscores), frame, problem)
    axes = tuple(
        axis
        for axis in range(batch_rank)
        if bias.shape[axis] == 1 and gradient.shape[axis] != 1
    )
    return gradient.sum(axis=axes, keepdims=True)
