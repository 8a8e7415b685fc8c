"""The definition of neighborhood attention as a plain JAX function.

Where :mod:`jax_na._reference` is the oracle for numbers, this is the oracle for
transformations: JAX itself differentiates, maps and splits it. It is dense, O(n^2).
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

import jax_na
from jax_na import _window


def _per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: tuple[int, ...],
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    rel_pos_bias: jax.Array | None = None,
    additional_keys: jax.Array | None = None,
    additional_values: jax.Array | None = None,
    frame: jax_na.Frame | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``jax_na.neighborhood_attention(..., return_lse=True)``."""
    rank = len(kernel_size)
    batch = query.shape[: -rank - 2]
    if frame is None:
        frame = jax_na.Frame(query.shape[-rank - 2 : -2])
    placement = jnp.broadcast_to(frame._pack(batch, rank), (*batch, 3, rank))
    window = tuple(
        zip(
            kernel_size,
            _per_axis(stride, rank),
            _per_axis(dilation, rank),
            _per_axis(is_causal, rank),
            strict=True,
        )
    )
    attend = functools.partial(_one_sample, rel_pos_bias, window)
    for _ in batch:
        attend = jax.vmap(attend)
    return attend(query, key, value, additional_keys, additional_values, placement)


def _one_sample(
    bias: jax.Array | None,
    window: tuple[tuple[int, int, int, bool], ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    additional_keys: jax.Array | None,
    additional_values: jax.Array | None,
    placement: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    rank, heads = len(window), query.shape[-2]
    group = heads // key.shape[-2]
    visible, inside, rows = [], [], []
    for axis, (size, stride, dilation, is_causal) in enumerate(window):
        length, query_origin, key_origin = placement[:, axis]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = query.shape[axis], key.shape[axis]
        queries = query_origin + jnp.arange(query.shape[axis])[:, None]
        keys = key_origin + jnp.arange(key.shape[axis])
        sees = _window.axis_visibility(
            queries, keys, length, size, stride, dilation, is_causal
        )
        row = jnp.clip(_window.bias_row(queries, keys, size, dilation), 0, 2 * size - 2)
        visible.append(sees.reshape(shape))
        rows.append(row.reshape(shape))
        exists = (queries >= 0) & (queries < length)
        inside.append(exists.reshape([*shape[:rank], *[1] * rank]))

    def flat(array: jax.Array) -> jax.Array:  # [heads, tokens, channels]
        return jnp.moveaxis(array.reshape(-1, *array.shape[-2:]), 1, 0)

    def repeated(array: jax.Array) -> jax.Array:
        return jnp.repeat(flat(array), group, axis=0)

    tokens = (query[..., 0, 0].size, key[..., 0, 0].size)
    seen = functools.reduce(operator.and_, visible).reshape(tokens)
    scores = jnp.einsum("hqd,hkd->hqk", flat(query), repeated(key), precision="highest")
    scores *= query.shape[-1] ** -0.5
    if bias is not None:
        scores += bias[(slice(None), *rows)].reshape(heads, *tokens)
    values = repeated(value)
    if additional_keys is not None:
        extra = jnp.einsum(
            "hqd,hkd->hqk",
            flat(query),
            repeated(additional_keys),
            precision="highest",
        )
        scores = jnp.concatenate([scores, extra * query.shape[-1] ** -0.5], axis=-1)
        values = jnp.concatenate([values, repeated(additional_values)], axis=1)
        exists = functools.reduce(operator.and_, inside)
        exists = jnp.broadcast_to(exists, (*query.shape[:rank], *[1] * rank))
        exists = jnp.broadcast_to(exists.reshape(-1, 1), extra.shape[1:])
        seen = jnp.concatenate([seen, exists], axis=-1)
    # Rows that see nothing: weights 0, and a finite detour for the gradient.
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(jnp.where(seen, scores - jnp.where(seen, peak, 0), -jnp.inf))
    total = weights.sum(axis=-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + jnp.where(empty, 0, peak))
    out = jnp.einsum("hqk,hkd->hqd", weights / total, values, precision="highest")
    out = jnp.moveaxis(out, 0, 1).reshape(*query.shape[:-1], value.shape[-1])
    lse = lse[..., 0].T.reshape(query.shape[:-1])
    return out, lse
