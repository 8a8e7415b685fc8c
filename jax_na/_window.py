"""The neighborhood window of one grid axis.

The only statement of the formula in Python; ``ffi/window.h`` is its twin in C++ and
``docs/window.md`` explains it with drawings. Every function works on Python integers,
NumPy arrays and traced JAX arrays alike, broadcasts its arguments, and takes *global*
positions: they count from the start of the whole grid, of which the arrays at hand may
be a piece (:class:`jax_na.Frame`).

With index ``i``, length ``L``, dilation ``d`` and stride ``s``, a token belongs to the
residue class ``g = i mod d`` and is number ``p = i div d`` of its ``n`` tokens. A query
attends within its class: ``kernel_size`` keys around its leader, shifted inward at the
edges, or, when causal, the keys up to itself (Hassani et al., "Generalized Neighborhood
Attention", arXiv 2504.16922, section 3).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Index: TypeAlias = Any  # an int, a NumPy array or a (traced) JAX array


def _namespace(*values: Index) -> Any:
    """NumPy for static values, so that they stay static; jax.numpy for traced ones."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def key_interval(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
) -> tuple[Index, Index, Index]:
    """The keys that the query at ``index`` sees: ``residue + dilation * j``.

    Returns:
        ``(residue, lo, hi)``: the residue class, and the half-open interval of ``j``.
        Meaningful for ``0 <= index < length`` only.
    """
    xp = _namespace(index, length)
    residue, position = index % dilation, index // dilation
    tokens = -((residue - length) // dilation)
    base = position // stride * stride
    if is_causal:
        leader = xp.minimum(base + stride - 1, tokens - 1)
        return residue, xp.maximum(leader - kernel_size + 1, 0), position + 1
    leader = xp.minimum(base + stride // 2, tokens - 1)
    lo = xp.maximum(0, xp.minimum(leader - kernel_size // 2, tokens - kernel_size))
    return residue, lo, xp.minimum(lo + kernel_size, tokens)


def query_interval(
    index: Index,
    length: Index,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
) -> tuple[Index, Index, Index]:
    """The queries that see the key at ``index``: ``residue + dilation * p``.

    Returns:
        ``(residue, q0, q1)``: the residue class, and the half-open interval of ``p``.
        Meaningful for ``0 <= index < length`` only.
    """
    xp = _namespace(index, length)
    residue, position = index % dilation, index // dilation
    tokens = -((residue - length) // dilation)
    last = position >= tokens - kernel_size
    if is_causal:
        q0 = position
        q1 = (position + kernel_size) // stride * stride
    else:
        ahead = stride - stride // 2
        behind = kernel_size - 1 - kernel_size // 2
        q0 = (position - behind + ahead - 1) // stride * stride
        q0 = xp.where(position < kernel_size, 0, q0)
        q1 = (position + kernel_size // 2 + ahead) // stride * stride
    return residue, xp.maximum(q0, 0), xp.minimum(xp.where(last, tokens, q1), tokens)


def axis_visibility(
    query_index: Index,
    key_index: Index,
    length: Index,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
) -> Any:
    """Whether the query sees the key on this axis; False outside ``[0, length)``."""
    residue, lo, hi = key_interval(
        query_index, length, kernel_size, stride, dilation, is_causal
    )
    position = key_index // dilation
    return (
        (query_index >= 0)
        & (query_index < length)
        & (key_index >= 0)
        & (key_index < length)
        & (key_index % dilation == residue)
        & (position >= lo)
        & (position < hi)
    )


def bias_row(
    query_index: Index, key_index: Index, kernel_size: int, dilation: int
) -> Index:
    """Row of the relative positional bias: in ``[0, 2 * kernel_size - 2]`` if visible."""
    return key_index // dilation - query_index // dilation + kernel_size - 1
