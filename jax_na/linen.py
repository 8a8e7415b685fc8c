"""Neighborhood attention layers for Flax Linen.

Example::

    from jax_na.linen import NeighborhoodAttention2D

    layer = NeighborhoodAttention2D(num_heads=4, kernel_size=7)
    variables = layer.init(jax.random.key(0), images)
    outputs = layer.apply(variables, images)  # [*batch, height, width, features]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

try:
    import flax.linen as nn
    from flax.typing import Dtype, Initializer, PrecisionLike
except ImportError as error:
    raise ImportError(
        f"jax_na.linen needs Flax, run: pip install flax ({error})"
    ) from error

from jax_na import _layers
from jax_na._frame import Frame
from jax_na._support import Implementation

__all__ = [
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
]

_keyword = functools.partial(dataclasses.field, kw_only=True)


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood self-attention over a grid of tokens.

    ``flax.linen.MultiHeadDotProductAttention`` whose queries see the keys of their
    window only: fields, parameters and initialisers are the same, so that its weights
    load here, and with a window as large as the grid the output is the same too. The
    parameters are ``query``, ``key``, ``value`` (kernels ``[features, heads,
    head_dim]``), ``out`` (kernel ``[heads, head_dim, out_features]``), with
    ``normalize_qk`` also ``query_ln`` and ``key_ln``, and with ``rel_pos_bias`` also
    ``rel_pos_bias``. :class:`jax_na.nnx.NeighborhoodAttention` has the same tree.

    Shard the parameters with initializers from ``flax.linen.with_partitioning`` or
    ``with_logical_partitioning``, as in any Linen layer.

    Unlike Flax's layer there is no dropout of attention weights, which fused kernels
    never materialise: ``dropout_rate`` acts on the layer's output.

    Attributes:
        num_heads: number of query heads N.
        dtype: dtype of the computation. Default: inferred from inputs and parameters.
        param_dtype: dtype of the parameters.
        qkv_features: features of all query heads together, a multiple of ``num_heads``.
            Default: those of the inputs.
        out_features: number of output features. Default: those of the inputs.
        num_kv_heads: number of key and value heads K, a divisor of ``num_heads``; query
            head h reads head ``h // (N // K)``. Default ``num_heads``.
        dropout_rate: dropout probability of the output.
        deterministic: whether dropout is off. With a dropout rate above zero it must be
            given either here or in the call.
        precision: numerical precision of the projections and of the attention, see
            ``jax.lax.Precision``.
        kernel_init: initializer of the kernels of query, key, value and out.
        out_kernel_init: initializer of out's kernel. Default ``kernel_init``.
        bias_init: initializer of the biases of query, key, value and out.
        out_bias_init: initializer of out's bias. Default ``bias_init``.
        use_bias: whether query, key, value and out have biases.
        normalize_qk: whether queries and keys are layer-normalised per head (Dehghani
            et al., arXiv 2302.05442).
        kernel_size: window length per axis, one entry per grid axis; a single int is
            accepted where the class fixes the rank. Required, keyword only like all
            fields that follow.
        stride: queries per group that share a window; one int or one per axis.
        dilation: distance between neighboring keys; one int or one per axis.
        is_causal: whether keys after the query are hidden; one bool or one per axis.
        scale: factor of the scores. Default ``head_dim ** -0.5``.
        rel_pos_bias: whether to learn a relative positional bias
            ``[num_heads, *(2 * kernel_size - 1)]``, added to the scaled scores (Hassani
            et al., "Neighborhood Attention Transformer", arXiv 2204.07143, equation 2).
        rel_pos_bias_init: its initializer. Default: normal with standard deviation
            0.02, truncated at two standard deviations.
        implementation: None (the best that supports the call), or a name, see
            :func:`jax_na.neighborhood_attention`.
        deterministic_grads: whether gradients must be bitwise reproducible, see there.
    """

    num_heads: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: PrecisionLike = None
    kernel_init: Initializer = _layers.KERNEL_INIT
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = _layers.BIAS_INIT
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    normalize_qk: bool = False
    kernel_size: int | Sequence[int] = _keyword()
    stride: int | Sequence[int] = _keyword(default=1)
    dilation: int | Sequence[int] = _keyword(default=1)
    is_causal: bool | Sequence[bool] = _keyword(default=False)
    scale: float | None = _keyword(default=None)
    rel_pos_bias: bool = _keyword(default=False)
    rel_pos_bias_init: Initializer = _keyword(default=_layers.REL_POS_BIAS_INIT)
    implementation: Implementation | None = _keyword(default=None)
    deterministic_grads: bool | None = _keyword(default=None)

    rank: ClassVar[int | None] = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        frame: Frame | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: ``[*batch, *grid, features]`` with any number of batch axes.
            frame: placement of ``inputs`` in a larger or padded grid, see
                :class:`jax_na.Frame`. A token outside ``frame.length`` attends to
                nothing: its output is out's bias.
            deterministic: whether dropout is off, where the field leaves it open.
            dropout_rng: key for dropout. Default: one from the ``dropout`` stream.

        Returns:
            ``[*batch, *grid, out_features]``.

        Raises:
            TypeError, ValueError: a field or ``inputs`` is wrong, or the grid smaller
                than the window; the message names the argument, its value and the rule.
        """
        rank = _layers.resolve_rank(self.rank, self.kernel_size)
        _layers.check_inputs(inputs, rank)
        geometry = _layers.make_geometry(
            rank,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            in_features=inputs.shape[-1],
            qkv_features=self.qkv_features,
            out_features=self.out_features,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            precision=self.precision,
            deterministic_grads=self.deterministic_grads,
            dropout_rate=self.dropout_rate,
        )

        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        project = functools.partial(
            dense, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        heads = (geometry.num_heads, geometry.head_dim)
        kv_heads = (geometry.num_kv_heads, geometry.head_dim)
        query = project(heads, name="query")(inputs)
        key = project(kv_heads, name="key")(inputs)
        value = project(kv_heads, name="value")(inputs)
        if self.normalize_qk:
            norm = functools.partial(
                nn.LayerNorm,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
            query = norm(name="query_ln")(query)
            key = norm(name="key_ln")(key)
        rel_pos_bias = None
        if self.rel_pos_bias:
            rel_pos_bias = self.param(
                "rel_pos_bias",
                self.rel_pos_bias_init,
                (geometry.num_heads, *geometry.problem.bias_shape),
                self.param_dtype,
            )
        attended = _layers.attend(
            query,
            key,
            value,
            rel_pos_bias,
            frame,
            geometry.problem,
            precision=self.precision,
            implementation=self.implementation,
        )
        outputs = dense(
            geometry.out_features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(attended)
        if self.dropout_rate == 0.0:  # deterministic may then be missing
            return outputs
        dropout = nn.Dropout(self.dropout_rate, deterministic=self.deterministic)
        return dropout(outputs, deterministic=deterministic, rng=dropout_rng)


class NeighborhoodAttention1D(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` over sequences ``[*batch, length, features]``."""

    rank: ClassVar[int | None] = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` over ``[*batch, height, width, features]``."""

    rank: ClassVar[int | None] = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` over ``[*batch, depth, height, width, C]``."""

    rank: ClassVar[int | None] = 3
