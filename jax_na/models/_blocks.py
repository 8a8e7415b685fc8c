"""Transformer blocks with neighborhood attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_na.nnx import NeighborhoodAttention2D

_TOKEN_AXES = (-2, -1)
_EPSILON = 1e-5

# The published truncation, at +-2, is a hundred standard deviations away.
_LINEAR_INIT = jax.nn.initializers.normal(0.02)
_CONV_INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Constructors of the layers of a model, with what they share filled in.

    Attributes:
        dtype: dtype of the computation. None: inferred from inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: of convolutions, projections and attention.
        implementation: of attention.
        rngs: keys of the parameters and, stream ``dropout``, of stochastic depth.
        keep_rngs: whether stochastic depth keeps a fork of the dropout stream.
    """

    dtype: Any
    param_dtype: Any
    precision: Any
    implementation: Any
    rngs: nnx.Rngs
    keep_rngs: bool

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "rngs": self.rngs,
        }

    def norm(self, features: int) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            features, epsilon=_EPSILON, use_fast_variance=False, **self._shared
        )

    def linear(
        self, in_features: int, out_features: int, *, use_bias: bool = True
    ) -> nnx.Linear:
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=_LINEAR_INIT,
            precision=self.precision,
            **self._shared,
        )

    def conv(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: int,
        strides: int,
        padding: int = 0,
        use_bias: bool = True,
    ) -> nnx.Conv:
        return nnx.Conv(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            strides,
            padding=padding,
            use_bias=use_bias,
            kernel_init=_CONV_INIT,
            precision=self.precision,
            **self._shared,
        )

    def attention(
        self, num_heads: int, features: int, *, kernel_size: int, dilation: int
    ) -> NeighborhoodAttention2D:
        return NeighborhoodAttention2D(
            num_heads,
            features,
            kernel_size=kernel_size,
            dilation=dilation,
            rel_pos_bias=True,
            kernel_init=_LINEAR_INIT,
            precision=self.precision,
            implementation=self.implementation,
            **self._shared,
        )

    def scale(
        self, initial: float | None, features: int
    ) -> nnx.Param[jax.Array] | None:
        if initial is None:
            return None
        return nnx.Param(jnp.full(features, initial, self.param_dtype))

    def stochastic_depth(self, rate: float) -> nnx.Dropout:
        """Drops its input for whole samples."""
        return nnx.Dropout(
            rate,
            broadcast_dims=_TOKEN_AXES,
            rngs=self.rngs if self.keep_rngs and rate > 0 else None,
        )


class Block(nnx.Module):
    """Attention and MLP, each normalised before and added to its input.

    Args:
        features: of the tokens.
        num_heads: attention heads.
        kernel_size: window length, both axes.
        dilation: of the window, both axes.
        mlp_ratio: hidden over outer features of the MLP.
        layer_scale: initial value of the branches' scales; None for no scales.
        drop_path_rate: probability with which a sample skips a branch in training.
        layers: constructors of the layers.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        *,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path_rate: float,
        layers: Layers,
    ):
        hidden = int(features * mlp_ratio)
        self.window = kernel_size * dilation
        self.attention_norm = layers.norm(features)
        self.attention = layers.attention(
            num_heads, features, kernel_size=kernel_size, dilation=dilation
        )
        self.attention_scale = nnx.data(layers.scale(layer_scale, features))
        self.mlp_norm = layers.norm(features)
        self.expand = layers.linear(features, hidden)
        self.contract = layers.linear(hidden, features)
        self.mlp_scale = nnx.data(layers.scale(layer_scale, features))
        self.stochastic_depth = layers.stochastic_depth(drop_path_rate)

    def __call__(
        self, tokens: jax.Array, *, deterministic: bool | None, rngs: Any
    ) -> jax.Array:
        """``[*batch, height, width, features]`` to the same shape."""
        drop = functools.partial(
            self.stochastic_depth, deterministic=deterministic, rngs=rngs
        )
        shape = tokens.shape
        *batch, height, width, features = shape
        # XLA weighs tilings of every axis of every fusion for GPUs: one axis of tokens
        # saves a sixth or more of the time that it compiles.
        tokens = tokens.reshape(*batch, height * width, features)
        branch = self._attend(self.attention_norm(tokens).reshape(shape))
        branch = branch.reshape(tokens.shape)
        tokens = tokens + drop(_scaled(branch, self.attention_scale))
        branch = self.expand(self.mlp_norm(tokens))
        branch = self.contract(jax.nn.gelu(branch, approximate=False))
        return (tokens + drop(_scaled(branch, self.mlp_scale))).reshape(shape)

    def _attend(self, tokens: jax.Array) -> jax.Array:
        """Attention over a map that is filled up with zeros to the window's extent.

        As in the published models, the zeros go in before the projections: their keys
        and values are the projections' biases, and are attended to like any others.
        """
        height, width = tokens.shape[-3:-1]
        missing = [max(0, self.window - size) for size in (height, width)]
        if not any(missing):
            return self.attention(tokens)
        none = [(0, 0)] * (tokens.ndim - 3)
        padded = jnp.pad(tokens, [*none, *((0, count) for count in missing), (0, 0)])
        return self.attention(padded)[..., :height, :width, :]


def _scaled(branch: jax.Array, scale: nnx.Param[jax.Array] | None) -> jax.Array:
    return branch if scale is None else branch * scale[...].astype(branch.dtype)
