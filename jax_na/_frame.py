"""Frames: where local arrays lie in a larger or padded grid."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frame:
    """Placement of the local queries and keys in a larger or padded grid.

    Every window is evaluated on global indices of a grid of ``length`` tokens per axis,
    of which the arrays at hand hold a piece: a shard with a halo, one sample of a padded
    batch, a chunk of queries against a key/value cache. The fields are data, not static
    parameters: they may be traced, and no value of theirs causes a recompilation.

    A query outside ``[0, length)`` on any axis gives ``out = 0``, ``lse = -inf`` and
    zero gradients. A key outside is never visible. A key that a window names but that
    the local arrays lack is not visible either: bringing it is the caller's duty.

    Attributes:
        length: the global grid's length per axis; int32, broadcastable to
            ``[*batch, rank]``.
        query_origin: global index of the first local query; int32, may be negative,
            broadcastable to ``[*batch, rank]``. Default 0.
        key_origin: global index of the first local key, likewise. Default 0.
    """

    length: ArrayLike
    query_origin: ArrayLike = 0
    key_origin: ArrayLike = 0

    def _pack(self, batch_shape: tuple[int, ...], rank: int) -> jax.Array:
        """int32 ``[*batch', 3, rank]`` with each batch axis of size 1 or full.

        Raises:
            TypeError: a field is not of an integer type.
            ValueError: a field does not broadcast to ``[*batch, rank]``.
        """
        fields = []
        for name in ("length", "query_origin", "key_origin"):
            field = getattr(self, name)
            if not isinstance(field, jax.Array):
                try:
                    field = np.asarray(field)
                except ValueError as error:
                    raise TypeError(
                        f"frame.{name} must be an array of integers, got "
                        f"{getattr(self, name)!r}: {error}"
                    ) from None
            if not jnp.issubdtype(field.dtype, jnp.integer):
                raise TypeError(
                    f"frame.{name} must have an integer dtype, got {field.dtype}."
                )
            target = (*batch_shape, rank)
            shape = (1,) * (len(target) - field.ndim) + field.shape
            if len(shape) != len(target) or any(
                size not in (1, full) for size, full in zip(shape, target)
            ):
                raise ValueError(
                    f"frame.{name} must broadcast to [*batch, rank] = {target}, got "
                    f"shape {field.shape}."
                )
            field = jnp.asarray(field, jnp.int32).reshape(shape)
            fields.append(jnp.broadcast_to(field, (*shape[:-1], rank)))
        batch = jnp.broadcast_shapes(*(field.shape[:-1] for field in fields))
        return jnp.stack(
            [jnp.broadcast_to(field, (*batch, rank)) for field in fields], axis=-2
        )
