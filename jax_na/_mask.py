"""The boolean visibility mask, for inspection and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_na import _problem, _window
from jax_na._frame import Frame


def window_mask(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    frame: Frame | None = None,
    key_grid: Sequence[int] | None = None,
) -> jax.Array:
    """Which query sees which key: the mask that makes dense attention this attention.

    Args:
        grid: lengths of the query grid's axes.
        kernel_size: window length; an integer here and below stands for every axis. This
            and the next three are those of :func:`jax_na.neighborhood_attention`.
        stride: neighboring queries that share one window.
        dilation: distance between neighboring keys of a window.
        is_causal: whether a query sees no key after itself.
        frame: placement of both grids in a larger or padded one, see
            :class:`jax_na.Frame`; may be traced.
        key_grid: lengths of the key grid's axes, where a frame lets them differ. Default
            ``grid``.

    Returns:
        bool ``[*batch, *grid, *key_grid]``, ``*batch`` being the batch axes of the
        frame's fields, none without a frame. Its size is the square of the grid's.

    Raises:
        TypeError, ValueError: the message names the argument, its value and the rule.
    """
    query_lengths = _problem.grid_lengths("grid", grid)
    rank = len(query_lengths)
    key_lengths = query_lengths
    if key_grid is not None:
        key_lengths = _problem.grid_lengths("key_grid", key_grid)
        if frame is None and key_lengths != query_lengths:
            raise ValueError(
                f"key_grid must equal grid = {query_lengths} where there is no frame, "
                f"got {key_lengths}."
            )
        if len(key_lengths) != rank:
            raise ValueError(
                f"key_grid must have as many axes as grid = {query_lengths}, got "
                f"{key_lengths}."
            )
    problem = _problem.make_problem(rank, kernel_size, stride, dilation, is_causal)
    placement: Any
    if frame is None:
        _problem.check_window_fits(problem, query_lengths)
        placement = np.stack([query_lengths, (0,) * rank, (0,) * rank])
    else:
        placement = _problem.canonical_frame(frame, _batch_shape(frame), rank)

    batch = placement.shape[:-2]
    mask: Any = True
    for axis in range(rank):
        length, query_origin, key_origin = jnp.moveaxis(placement[..., axis], -1, 0)
        visible = _window.axis_visibility(
            query_origin[..., None, None] + np.arange(query_lengths[axis])[:, None],
            key_origin[..., None, None] + np.arange(key_lengths[axis]),
            length[..., None, None],
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.dilation[axis],
            problem.is_causal[axis],
        )
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = query_lengths[axis], key_lengths[axis]
        mask = mask & visible.reshape(*batch, *shape)
    return mask


def _batch_shape(frame: Any) -> tuple[int, ...]:
    """The batch axes that a frame's fields have among them."""
    if not isinstance(frame, Frame):
        return ()
    fields = (frame.length, frame.query_origin, frame.key_origin)
    return jnp.broadcast_shapes(*(np.shape(field)[:-1] for field in fields))
