"""What the Flax layers of both APIs share: their arguments, checked, and the call."""

from __future__ import annotations

import numbers
import operator
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_na import _ops, _problem
from jax_na._frame import Frame
from jax_na._support import Implementation

# Flax's own defaults, and that of NAT for the relative positional bias.
KERNEL_INIT = jax.nn.initializers.lecun_normal()
BIAS_INIT = jax.nn.initializers.zeros
REL_POS_BIAS_INIT = jax.nn.initializers.truncated_normal(0.02)


class Geometry(NamedTuple):
    """The resolved sizes of a layer.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key and value heads K.
        head_dim: D, of queries, keys and values.
        out_features: features of the output.
        problem: the window, one entry per grid axis.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    out_features: int
    problem: _problem.Problem


def _positive(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a positive integer, got {value!r}.")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a positive integer, got {value!r}.") from None
    if integer < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return integer


def resolve_rank(rank: int | None, kernel_size: Any) -> int:
    """The class's own rank, or the number of entries of ``kernel_size``.

    Raises:
        TypeError: the class fixes no rank and ``kernel_size`` is no sequence.
        ValueError: ``kernel_size`` has not 1, 2 or 3 entries.
    """
    if rank is not None:
        return rank
    return _problem.rank_of(
        kernel_size, "a layer of known rank, such as NeighborhoodAttention2D"
    )


def _check_dropout_rate(value: Any) -> None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"dropout_rate must be a number, got {value!r}.")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"dropout_rate must lie in [0, 1], got {value!r}.")


def make_geometry(
    rank: int,
    *,
    num_heads: Any,
    num_kv_heads: Any,
    in_features: Any,
    qkv_features: Any,
    out_features: Any,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: Any,
    precision: Any,
    deterministic_grads: Any,
    dropout_rate: Any,
) -> Geometry:
    """Checked sizes of a layer, with Flax's defaults filled in.

    Raises:
        TypeError, ValueError: the message names the argument, the value and the rule.
    """
    num_heads = _positive("num_heads", num_heads)
    in_features = _positive("in_features", in_features)
    num_kv_heads = _positive(
        "num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads
    )
    qkv_features = _positive(
        "qkv_features", in_features if qkv_features is None else qkv_features
    )
    out_features = _positive(
        "out_features", in_features if out_features is None else out_features
    )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and "
            f"{num_kv_heads}."
        )
    if qkv_features % num_heads:
        raise ValueError(
            "qkv_features (in_features by default) must be a multiple of num_heads, "
            f"got {qkv_features} and {num_heads}."
        )
    _check_dropout_rate(dropout_rate)
    head_dim = qkv_features // num_heads
    problem = _problem.make_problem(
        rank,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale=scale,
        head_dim=head_dim,
        precision=precision,
        deterministic_grads=deterministic_grads,
    )
    return Geometry(num_heads, num_kv_heads, head_dim, out_features, problem)


def check_inputs(inputs: jax.Array, rank: int, in_features: int | None = None) -> None:
    """``inputs`` is ``[*batch, *grid, in_features]``.

    Raises:
        ValueError: too few axes, no features, or another number of features.
    """
    if inputs.ndim < rank + 1:
        raise ValueError(
            f"inputs must have shape [*batch, *grid, features] with {rank} grid axes, "
            f"so at least {rank + 1} axes, got shape {inputs.shape}."
        )
    if inputs.shape[-1] == 0:
        raise ValueError(
            f"inputs must not be empty on the feature axis, got shape {inputs.shape}."
        )
    if in_features is not None and inputs.shape[-1] != in_features:
        raise ValueError(
            f"inputs must have in_features = {in_features} features on the last axis, "
            f"got shape {inputs.shape}."
        )


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rel_pos_bias: jax.Array | None,
    frame: Frame | None,
    problem: _problem.Problem,
    *,
    precision: Any,
    implementation: Implementation | None,
) -> jax.Array:
    """Neighborhood attention with the layer's window.

    ``precision`` is the layer's own argument and not the resolved one of ``problem``,
    so that None follows ``jax_default_matmul_precision`` at the time of the call, as
    the projections around it do.
    """
    return _ops.neighborhood_attention(
        query,
        key,
        value,
        problem.kernel_size,
        stride=problem.stride,
        dilation=problem.dilation,
        is_causal=problem.is_causal,
        scale=problem.scale,
        rel_pos_bias=rel_pos_bias,
        frame=frame,
        precision=precision,
        deterministic_grads=problem.deterministic_grads,
        implementation=implementation,
    )
