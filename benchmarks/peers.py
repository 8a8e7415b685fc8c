"""How JAX users compute neighborhood attention without this library.

Both take and return the shapes of :func:`jax_na.neighborhood_attention`, with as many
key heads as query heads, and are exact:

- ``dense``: ``jax.nn.dot_product_attention`` over all n keys, with a boolean mask;
- ``gather``: the window of every query copied out of the keys and values, then softmax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_na
from jax_na import _window

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def dense(
    grid: Sequence[int], *, implementation: str | None = None, **window: Any
) -> Attention:
    """Masked dense attention; the mask is made once, outside of what is timed.

    Args:
        grid: lengths of the grid's axes.
        implementation: of ``jax.nn.dot_product_attention``.
        **window: ``kernel_size``, ``stride``, ``dilation``, ``is_causal``.
    """
    tokens = math.prod(grid)
    mask = jax_na.window_mask(grid, **window).reshape(tokens, tokens)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        batch = query.shape[: -len(grid) - 2]
        query, key, value = (
            array.reshape(*batch, tokens, *array.shape[-2:])
            for array in (query, key, value)
        )
        out = jax.nn.dot_product_attention(
            query, key, value, mask=mask[None], implementation=implementation
        )
        return out.reshape(*batch, *grid, *out.shape[-2:])

    return attention


def gather(grid: Sequence[int], **window: Any) -> Attention:
    """Attention over gathered windows: prod(kernel_size) copies of keys and values.

    Args:
        grid: lengths of the grid's axes.
        **window: ``kernel_size`` and optionally ``stride`` and ``dilation``.

    Raises:
        NotImplementedError: the window is causal, so that windows differ in length.
    """
    if any(np.atleast_1d(window.pop("is_causal", False))):
        raise NotImplementedError("the gather formulation takes no causal windows")
    indices = _window_indices(grid, **window)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        batch = query.shape[: -len(grid) - 2]
        query, key, value = (
            array.reshape(*batch, math.prod(grid), *array.shape[-2:])
            for array in (query, key, value)
        )
        key, value = (jnp.take(array, indices, axis=-3) for array in (key, value))
        scores = jnp.einsum("...nhd,...nwhd->...nhw", query, key)
        scores = scores.astype(jnp.float32) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores).astype(value.dtype)
        out = jnp.einsum("...nhw,...nwhd->...nhd", weights, value)
        return out.reshape(*batch, *grid, *out.shape[-2:])

    return attention


def _window_indices(
    grid: Sequence[int],
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> np.ndarray:
    """Flat index of each key of every window: ``[tokens, prod(kernel_size)]``."""
    rank = len(grid)
    stride, dilation = (np.broadcast_to(v, rank).tolist() for v in (stride, dilation))
    columns = []  # of each axis: [length, kernel_size]
    for length, k, s, d in zip(grid, kernel_size, stride, dilation, strict=True):
        residue, lo, _ = _window.key_interval(np.arange(length), length, k, s, d, False)
        columns.append(residue[:, None] + d * (lo[:, None] + np.arange(k)))

    def combine(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        # Axis by axis: [queries, slots] with the last axis fastest in both.
        length = len(inner)
        flat = outer[:, None, :, None] * length + inner[None, :, None, :]
        return flat.reshape(len(outer) * length, -1)

    return functools.reduce(combine, columns).astype(np.int32)
