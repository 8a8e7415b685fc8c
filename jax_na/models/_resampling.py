"""From pixels to tokens, and from one stage's map to half its size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_na.models._blocks import Layers


class OverlappingTokenizer(nnx.Module):
    """Two convolutions that each halve the image, then layer norm."""

    def __init__(self, num_channels: int, features: int, layers: Layers):
        self.first = _halving(layers, num_channels, features // 2)
        self.second = _halving(layers, features // 2, features)
        self.norm = layers.norm(features)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.norm(self.second(self.first(images)))


class OverlappingDownsampler(nnx.Module):
    """A convolution that halves the map and doubles the features, then layer norm."""

    def __init__(self, features: int, layers: Layers):
        self.reduction = _halving(layers, features, 2 * features, use_bias=False)
        self.norm = layers.norm(2 * features)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.norm(self.reduction(tokens))


class PatchTokenizer(nnx.Module):
    """A linear map of patches that lie side by side, then layer norm."""

    def __init__(
        self, num_channels: int, features: int, patch_size: int, layers: Layers
    ):
        self.patch_size = patch_size
        self.projection = layers.conv(
            num_channels,
            features,
            kernel_size=patch_size,
            strides=patch_size,
        )
        self.norm = layers.norm(features)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.norm(self.projection(_padded_to_multiple(images, self.patch_size)))


class PatchMerging(nnx.Module):
    """Layer norm of two by two tokens side by side, then a linear map of the four."""

    def __init__(self, features: int, layers: Layers):
        self.norm = layers.norm(4 * features)
        self.reduction = layers.linear(4 * features, 2 * features, use_bias=False)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        tokens = _padded_to_multiple(tokens, 2)
        # The published order of the four: the row varies fastest.
        corners = [tokens[..., y::2, x::2, :] for x in (0, 1) for y in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


def _halving(
    layers: Layers, in_features: int, out_features: int, use_bias: bool = True
) -> nnx.Conv:
    # Padded alike on both sides, as in the published models; "SAME" would pad maps of
    # even size on one side only.
    return layers.conv(
        in_features,
        out_features,
        kernel_size=3,
        strides=2,
        padding=1,
        use_bias=use_bias,
    )


def _padded_to_multiple(grid: jax.Array, multiple: int) -> jax.Array:
    """``[*batch, height, width, features]`` with zeros at the bottom and right."""
    missing = [(0, -size % multiple) for size in grid.shape[-3:-1]]
    if not any(count for _, count in missing):
        return grid
    return jnp.pad(grid, [*[(0, 0)] * (grid.ndim - 3), *missing, (0, 0)])
