"""Size and work of a model, counted as the published tables count them."""

from __future__ import annotations

import math

from jax_na.models import _configs
from jax_na.models._configs import Config

_LAYER_NORM = 5  # operations per element

# Tokens that a downsampler reads for one of its own, and the multiple of its input's
# features that it normalises.
_DOWNSAMPLER = {"overlapping": (9, 2), "patch": (4, 4)}


def flops(
    config: Config | str, height: int = 224, width: int = 224, num_classes: int = 1000
) -> int:
    """Work of a classifier for one image, as the published tables count it.

    That is: a multiplication and its addition are one operation, attention has its two
    products and the addition of the bias, layer norm five operations per element, and
    everything else is free.

    Args:
        config: the architecture, or the name of a published one.
        height: of the image in pixels.
        width: of the image in pixels.
        num_classes: number of logits.
    """
    config = _configs.resolve(config)
    total, (height, width) = _tokenizer(config, height, width)
    for stage, dilations in enumerate(config.dilations):
        features = config.features(stage)
        for dilation in dilations:
            window = config.kernel_size * dilation
            padded = max(height, window) * max(width, window)
            total += _block(config, stage, height * width, padded)
        if stage + 1 < len(config.dilations):
            height, width = -(-height // 2), -(-width // 2)
            taps, norm_width = _DOWNSAMPLER[config.tokenizer]
            work = 2 * taps * features**2 + norm_width * features * _LAYER_NORM
            total += height * width * work
    pooling = height * width * features
    return total + pooling * (_LAYER_NORM + 1) + features * num_classes


def parameter_count(config: Config | str, num_classes: int = 1000) -> int:
    """Number of trainable numbers of a classifier.

    Args:
        config: the architecture, or the name of a published one.
        num_classes: number of logits.
    """
    config = _configs.resolve(config)
    features, channels = config.embed_dim, config.num_channels
    if config.tokenizer == "overlapping":
        half = features // 2
        total = _linear(9 * channels, half) + _linear(9 * half, features)
    else:
        total = _linear(config.patch_size**2 * channels, features)
    total += 2 * features
    table = (2 * config.kernel_size - 1) ** 2
    for stage, depth in enumerate(config.depths):
        features = config.features(stage)
        hidden = int(features * config.mlp_ratio)
        scales = 0 if config.layer_scale is None else 2 * features
        attention = 4 * _linear(features, features) + config.num_heads[stage] * table
        mlp = _linear(features, hidden) + _linear(hidden, features)
        total += depth * (attention + mlp + 2 * 2 * features + scales)
        if stage + 1 < len(config.depths):
            taps, norm_width = _DOWNSAMPLER[config.tokenizer]
            total += 2 * taps * features**2 + 2 * norm_width * features
    return total + 2 * features + _linear(features, num_classes)


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _tokenizer(config: Config, height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Work of the tokenizer, and the size of its map."""
    features, channels = config.embed_dim, config.num_channels
    if config.tokenizer == "overlapping":
        half = -(-height // 2), -(-width // 2)
        size = -(-half[0] // 2), -(-half[1] // 2)
        work = math.prod(half) * 9 * channels * (features // 2)
        work += math.prod(size) * 9 * (features // 2) * features
    else:
        size = -(-height // config.patch_size), -(-width // config.patch_size)
        work = math.prod(size) * config.patch_size**2 * channels * features
    return work + math.prod(size) * features * _LAYER_NORM, size


def _block(config: Config, stage: int, tokens: int, padded_tokens: int) -> int:
    features, keys = config.features(stage), config.kernel_size**2
    attention = 4 * features**2 + 2 * features * keys + config.num_heads[stage] * keys
    mlp = 2 * features * int(features * config.mlp_ratio)
    return padded_tokens * attention + tokens * (mlp + 2 * features * _LAYER_NORM)
