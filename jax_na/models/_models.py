"""The models: classifiers and feature pyramids over one trunk."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx

from jax_na import _support
from jax_na.models import _configs
from jax_na.models._blocks import Block, Layers
from jax_na.models._configs import Config
from jax_na.models._resampling import (
    OverlappingDownsampler,
    OverlappingTokenizer,
    PatchMerging,
    PatchTokenizer,
)

Rngs = nnx.Rngs | nnx.RngStream | jax.Array


class Numerics(TypedDict, total=False):
    """The keyword arguments that all models share.

    Attributes:
        dtype: dtype of the computation, such as ``jnp.bfloat16``. Default: inferred
            from images and parameters.
        param_dtype: dtype of the parameters, default float32.
        precision: numerical precision of convolutions, projections and attention, see
            ``jax.lax.Precision``.
        implementation: of attention, see :func:`jax_na.neighborhood_attention`.
    """

    dtype: Any
    param_dtype: Any
    precision: Any
    implementation: _support.Implementation | None


def _layers(rngs: nnx.Rngs, keep_rngs: bool, numerics: Numerics) -> Layers:
    implementation = numerics.get("implementation")
    _support.check_implementation(implementation)
    return Layers(
        dtype=numerics.get("dtype"),
        param_dtype=numerics.get("param_dtype", jnp.float32),
        precision=numerics.get("precision"),
        implementation=implementation,
        rngs=rngs,
        keep_rngs=keep_rngs,
    )


# ---- Trunk ---------------------------------------------------------------------------


class Stage(nnx.Module):
    """Blocks at one resolution; the first ones after a downsampler, if any."""

    def __init__(self, config: Config, index: int, layers: Layers):
        features = config.features(index)
        self.blocks = nnx.List(
            [
                Block(
                    features,
                    config.num_heads[index],
                    config.kernel_size,
                    dilation,
                    mlp_ratio=config.mlp_ratio,
                    layer_scale=config.layer_scale,
                    drop_path_rate=rate,
                    layers=layers,
                )
                for dilation, rate in zip(
                    config.dilations[index],
                    config.drop_path_rates[index],
                    strict=True,
                )
            ]
        )
        self.downsampler: OverlappingDownsampler | PatchMerging | None = nnx.data(None)
        if index + 1 < len(config.depths):
            self.downsampler = (
                OverlappingDownsampler(features, layers)
                if config.tokenizer == "overlapping"
                else PatchMerging(features, layers)
            )


class Features(NamedTuple):
    """What a trunk makes of images.

    Attributes:
        stem: ``[*batch, height, width, embed_dim]``, the tokens before the first stage.
        stages: the map of each stage before it is halved.
        hidden_states: ``stem`` and the map of each stage after it is halved, as
            ``transformers`` reports them; the last stage's is not.
    """

    stem: jax.Array
    stages: tuple[jax.Array, ...]
    hidden_states: tuple[jax.Array, ...]


class Trunk(nnx.Module):
    """Tokenizer and stages, what classifiers and backbones have in common."""

    def __init__(self, config: Config, layers: Layers):
        self.num_channels = config.num_channels
        self.tokenizer: OverlappingTokenizer | PatchTokenizer
        if config.tokenizer == "overlapping":
            self.tokenizer = OverlappingTokenizer(
                config.num_channels, config.embed_dim, layers
            )
        else:
            self.tokenizer = PatchTokenizer(
                config.num_channels, config.embed_dim, config.patch_size, layers
            )
        self.stages = nnx.List(
            [Stage(config, index, layers) for index in range(len(config.depths))]
        )

    def __call__(
        self, images: jax.Array, *, deterministic: bool | None, rngs: Rngs | None
    ) -> Features:
        _check_images(images, self.num_channels)
        if isinstance(rngs, jax.Array):  # a key: one stream, so that no two masks agree
            rngs = nnx.Rngs(dropout=rngs)
        stem = tokens = self.tokenizer(images)
        maps, hidden_states = [], [stem]
        for stage in self.stages:
            for block in stage.blocks:
                tokens = block(tokens, deterministic=deterministic, rngs=rngs)
            maps.append(tokens)
            if stage.downsampler is not None:
                tokens = stage.downsampler(tokens)
            hidden_states.append(tokens)
        return Features(stem, tuple(maps), tuple(hidden_states))


def _check_images(images: jax.Array, num_channels: int) -> None:
    shape = jnp.shape(images)
    if len(shape) < 3:
        raise ValueError(
            "images must have shape [*batch, height, width, channels], so at least 3 "
            f"axes, got shape {shape}."
        )
    if shape[-1] != num_channels:
        raise ValueError(
            f"images must have {num_channels} channels on the last axis "
            f"([*batch, height, width, channels]), got shape {shape}."
        )
    if 0 in shape[-3:-1]:
        raise ValueError(f"images must not be empty, got shape {shape}.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            "images must be floating-point (scaled and normalised as the weights "
            f"expect), got dtype {images.dtype}."
        )


# ---- Models --------------------------------------------------------------------------


class Classifier(nnx.Module):
    """An image classifier, or with ``num_classes=None`` the features under its head.

    A new model is in training mode, as ``flax.nnx.Dropout`` is: stochastic depth acts
    until ``model.eval()``.

    Args:
        config: the architecture, or the name of a published one
            (:data:`jax_na.models.CONFIGS`).
        num_classes: number of logits. None: no head, the output is the mean of the last
            map after its layer norm.
        rngs: keys of the parameters and, stream ``dropout``, of stochastic depth.
        keep_rngs: whether to keep forks of the dropout stream for calls without
            ``rngs``.
        **numerics: see :class:`jax_na.models.Numerics`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it and the rule.
    """

    def __init__(
        self,
        config: Config | str,
        num_classes: int | None = 1000,
        *,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        **numerics: Unpack[Numerics],
    ):
        self.config = config = _configs.resolve(config)
        self.num_classes = _class_count(num_classes)
        layers = _layers(rngs, keep_rngs, numerics)
        self.trunk = Trunk(config, layers)
        features = config.features(len(config.depths) - 1)
        self.norm = layers.norm(features)
        self.head: nnx.Linear | None = nnx.data(None)
        if num_classes is not None:
            self.head = layers.linear(features, num_classes)

    @overload
    def __call__(
        self,
        images: jax.Array,
        *,
        return_hidden_states: Literal[False] = False,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        images: jax.Array,
        *,
        return_hidden_states: Literal[True],
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]: ...

    def __call__(
        self,
        images: jax.Array,
        *,
        return_hidden_states: bool = False,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
    ) -> Any:
        """Applies the model.

        Args:
            images: ``[*batch, height, width, channels]``, floating point, of any height
                and width.
            return_hidden_states: whether to return the maps between the stages too.
            deterministic: whether stochastic depth is off; precedes the model's mode.
            rngs: keys for stochastic depth; precede the constructor's.

        Returns:
            Logits ``[*batch, num_classes]``, or without a head features ``[*batch,
            features]``. With ``return_hidden_states`` a pair: that, and the maps
            ``[*batch, height, width, features]`` after the tokenizer and after each
            stage and its downsampler.

        Raises:
            TypeError, ValueError: ``images`` has a wrong shape or dtype.
        """
        features = self.trunk(images, deterministic=deterministic, rngs=rngs)
        outputs = self.norm(features.hidden_states[-1]).mean(axis=(-3, -2))
        if self.head is not None:
            outputs = self.head(outputs)
        return (outputs, features.hidden_states) if return_hidden_states else outputs


class Backbone(nnx.Module):
    """A feature pyramid for detection and segmentation.

    Args:
        config: the architecture, or the name of a published one.
        out_features: names of the maps to return, of ``config.stage_names``: ``stem``,
            ``stage1``, ... Default: all stages.
        rngs: see :class:`Classifier`.
        keep_rngs: see there.
        **numerics: see there.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it and the rule.
    """

    def __init__(
        self,
        config: Config | str,
        out_features: Sequence[str] | None = None,
        *,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        **numerics: Unpack[Numerics],
    ):
        self.config = config = _configs.resolve(config)
        names = config.stage_names
        chosen = names[1:] if out_features is None else tuple(out_features)
        unknown = sorted(set(chosen) - set(names))
        if isinstance(out_features, str) or unknown or not chosen:
            raise ValueError(
                f"out_features must be a sequence of some of {names}, got "
                f"{out_features!r}."
            )
        self.out_features = tuple(name for name in names if name in chosen)
        layers = _layers(rngs, keep_rngs, numerics)
        self.trunk = Trunk(config, layers)
        self.norms = nnx.Dict(
            {
                name: layers.norm(config.features(max(0, names.index(name) - 1)))
                for name in self.out_features
            }
        )

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
    ) -> dict[str, jax.Array]:
        """Applies the model; see :meth:`Classifier.__call__`.

        Returns:
            The maps ``[*batch, height, width, features]`` by name, each before its
            downsampler and layer-normalised.
        """
        features = self.trunk(images, deterministic=deterministic, rngs=rngs)
        maps = dict(
            zip(self.config.stage_names, (features.stem, *features.stages), strict=True)
        )
        return {name: self.norms[name](maps[name]) for name in self.out_features}


def _class_count(num_classes: Any) -> int | None:
    if num_classes is None:
        return None
    try:
        count = operator.index(num_classes)
    except TypeError:
        raise TypeError(
            f"num_classes must be a positive integer or None, got {num_classes!r}."
        ) from None
    if count < 1:
        raise ValueError(
            f"num_classes must be a positive integer or None, got {num_classes!r}."
        )
    return count
