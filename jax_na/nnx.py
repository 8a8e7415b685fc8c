"""Neighborhood attention layers for Flax NNX.

Example::

    from flax import nnx
    from jax_na.nnx import NeighborhoodAttention2D

    layer = NeighborhoodAttention2D(4, 64, kernel_size=7, rngs=nnx.Rngs(0))
    outputs = layer(images)  # [*batch, height, width, 64] -> the same shape
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

try:
    from flax import nnx
    from flax.nnx.nn import dtypes
    from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn
except ImportError as error:
    raise ImportError(
        f"jax_na.nnx needs Flax, run: pip install flax ({error})"
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

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class NeighborhoodAttention(nnx.Module):
    """Multi-head neighborhood self-attention over a grid of tokens.

    ``flax.nnx.MultiHeadAttention`` whose queries see the keys of their window only:
    constructor arguments, parameters and initialisers are the same, so that its weights
    load here, and with a window as large as the grid the output is the same too. The
    parameters are ``query``, ``key``, ``value`` (kernels ``[in_features, heads,
    head_dim]``), ``out`` (kernel ``[heads, head_dim, out_features]``), with
    ``normalize_qk`` also ``query_ln`` and ``key_ln``, and with ``rel_pos_bias`` also
    ``rel_pos_bias``. :class:`jax_na.linen.NeighborhoodAttention` has the same tree.

    Unlike Flax's layer there is no dropout of attention weights, which fused kernels
    never materialise: ``dropout_rate`` acts on the layer's output.

    Args:
        num_heads: number of query heads N.
        in_features: number of input features.
        qkv_features: features of all query heads together, a multiple of ``num_heads``.
            Default ``in_features``.
        out_features: number of output features. Default ``in_features``.
        num_kv_heads: number of key and value heads K, a divisor of ``num_heads``; query
            head h reads head ``h // (N // K)``. Default ``num_heads``.
        kernel_size: window length per axis, one entry per grid axis; a single int is
            accepted where the class fixes the rank.
        stride: queries per group that share a window; one int or one per axis.
        dilation: distance between neighboring keys; one int or one per axis.
        is_causal: whether keys after the query are hidden; one bool or one per axis.
        scale: factor of the scores. Default ``head_dim ** -0.5``.
        rel_pos_bias: whether to learn a relative positional bias
            ``[num_heads, *(2 * kernel_size - 1)]``, added to the scaled scores (Hassani
            et al., "Neighborhood Attention Transformer", arXiv 2204.07143, equation 2).
        rel_pos_bias_init: its initializer. Default: normal with standard deviation
            0.02, truncated at two standard deviations.
        dtype: dtype of the computation. Default: inferred from inputs and parameters.
        param_dtype: dtype of the parameters.
        dropout_rate: dropout probability of the output.
        deterministic: whether dropout is off. With a dropout rate above zero it must be
            given here, through ``train()`` or ``eval()``, or in the call.
        precision: numerical precision of the projections and of the attention, see
            ``jax.lax.Precision``.
        kernel_init: initializer of the kernels of query, key, value and out.
        out_kernel_init: initializer of out's kernel. Default ``kernel_init``.
        bias_init: initializer of the biases of query, key, value and out.
        out_bias_init: initializer of out's bias. Default ``bias_init``.
        use_bias: whether query, key, value and out have biases.
        normalize_qk: whether queries and keys are layer-normalised per head (Dehghani
            et al., arXiv 2302.05442).
        qkv_promote_dtype: dtype promotion of query, key and value.
        out_promote_dtype: dtype promotion of out.
        ln_promote_dtype: dtype promotion of query_ln and key_ln.
        implementation: None (the best that supports the call), or a name, see
            :func:`jax_na.neighborhood_attention`.
        deterministic_grads: whether gradients must be bitwise reproducible, see there.
        rngs: keys for the parameters and, stream ``dropout``, for dropout.
        keep_rngs: whether to keep a fork of the dropout stream for calls without
            ``rngs``.
        kernel_metadata: metadata of the kernels, such as their sharding.
        out_kernel_metadata: metadata of out's kernel. Default ``kernel_metadata``.
        bias_metadata: metadata of the biases.
        out_bias_metadata: metadata of out's bias. Default ``bias_metadata``.
        query_ln_scale_metadata: metadata of query_ln's scale.
        key_ln_scale_metadata: metadata of key_ln's scale.
        rel_pos_bias_metadata: metadata of the relative positional bias.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and
            the rule.
    """

    rank: ClassVar[int | None] = None

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        scale: float | None = None,
        rel_pos_bias: bool = False,
        rel_pos_bias_init: Initializer = _layers.REL_POS_BIAS_INIT,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _layers.KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _layers.BIAS_INIT,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        implementation: Implementation | None = None,
        deterministic_grads: bool | None = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        out_kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        out_bias_metadata: Mapping[str, Any] = _NO_METADATA,
        query_ln_scale_metadata: Mapping[str, Any] = _NO_METADATA,
        key_ln_scale_metadata: Mapping[str, Any] = _NO_METADATA,
        rel_pos_bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        geometry = _layers.make_geometry(
            _layers.resolve_rank(self.rank, kernel_size),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            in_features=in_features,
            qkv_features=qkv_features,
            out_features=out_features,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            scale=scale,
            precision=precision,
            deterministic_grads=deterministic_grads,
            dropout_rate=dropout_rate,
        )
        self.num_heads = geometry.num_heads
        self.num_kv_heads = geometry.num_kv_heads
        self.head_dim = geometry.head_dim
        self.in_features = in_features
        self.out_features = geometry.out_features
        self.problem = geometry.problem
        self.precision = precision
        self.implementation = implementation

        # The keys are drawn in the order of nnx.MultiHeadAttention, so that one seed
        # gives both layers the same parameters; what that layer lacks comes last.
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        project = functools.partial(
            linear,
            in_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.query = project((self.num_heads, self.head_dim))
        self.key = project((self.num_kv_heads, self.head_dim))
        self.value = project((self.num_kv_heads, self.head_dim))

        self.query_ln: nnx.LayerNorm | None = nnx.data(None)
        self.key_ln: nnx.LayerNorm | None = nnx.data(None)
        if normalize_qk:
            norm = functools.partial(
                nnx.LayerNorm,
                self.head_dim,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                promote_dtype=ln_promote_dtype,
                rngs=rngs,
            )
            self.query_ln = norm(scale_metadata=query_ln_scale_metadata)
            self.key_ln = norm(scale_metadata=key_ln_scale_metadata)

        self.out = linear(
            (self.num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )

        self.rel_pos_bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if rel_pos_bias:
            shape = (self.num_heads, *self.problem.bias_shape)
            self.rel_pos_bias = nnx.Param(
                rel_pos_bias_init(rngs.params(), shape, param_dtype),
                **rel_pos_bias_metadata,
            )

        self.dropout = nnx.Dropout(
            dropout_rate,
            deterministic=deterministic,
            rngs=rngs if keep_rngs and dropout_rate > 0 else None,
        )

    def __call__(
        self,
        inputs: jax.Array,
        *,
        frame: Frame | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: ``[*batch, *grid, in_features]`` with any number of batch axes.
            frame: placement of ``inputs`` in a larger or padded grid, see
                :class:`jax_na.Frame`. A token outside ``frame.length`` attends to
                nothing: its output is out's bias.
            deterministic: whether dropout is off; precedes the constructor's.
            rngs: keys for dropout; precede the constructor's.
            out_sharding: sharding of the output, passed to out (explicit-sharding
                meshes).
            qkv_sharding: sharding of queries, keys and values, passed to their
                projections.

        Returns:
            ``[*batch, *grid, out_features]``.

        Raises:
            ValueError: ``inputs`` has a wrong shape, its grid is smaller than the
                window, or dropout is on and ``deterministic`` or ``rngs`` is missing.
        """
        _layers.check_inputs(inputs, self.problem.rank, self.in_features)
        query = self.query(inputs, out_sharding=qkv_sharding)
        key = self.key(inputs, out_sharding=qkv_sharding)
        value = self.value(inputs, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query = self.query_ln(query)
            key = self.key_ln(key)
        attended = _layers.attend(
            query,
            key,
            value,
            None if self.rel_pos_bias is None else self.rel_pos_bias[...],
            frame,
            self.problem,
            precision=self.precision,
            implementation=self.implementation,
        )
        outputs = self.out(attended, out_sharding=out_sharding)
        if self.dropout.rate == 0.0:  # deterministic may then be missing
            return outputs
        return self.dropout(outputs, deterministic=deterministic, rngs=rngs)


class NeighborhoodAttention1D(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` over sequences ``[*batch, length, features]``."""

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` over ``[*batch, height, width, features]``."""

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` over ``[*batch, depth, height, width, C]``."""

    rank = 3
