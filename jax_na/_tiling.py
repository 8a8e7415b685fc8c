"""Planner of the fused CUDA kernels: which boxes of queries and keys they work on.

A kernel owns a tile of *row* tokens and visits boxes of *column* tokens, queries and keys
in the forward pass and for the query's gradient, keys and queries for those of key and
value. Tiles and boxes hold tokens of one residue class per axis, boxes start where the
union of a tile's intervals starts, and extents need not be powers of two. What a plan
visits factorises over the axes, so that every pair of box shapes can be judged exactly:
the number of boxes is a product of sums over single axes.

Pure Python and NumPy; nothing here needs a GPU. ``cuda/fused/geometry.cuh`` is the other
side: it walks what is counted here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from jax_na import _window

#: Rows and columns of a score tile.
Shape: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Variant:
    """Score tiles that are compiled for one length of channel rows.

    ``cuda/fused/variants.h`` holds the same table.

    Attributes:
        forward: of the forward pass, whose rows are queries.
        dquery: of the query's gradient, likewise.
        dbias: of the bias's gradient, whose rows are queries.
        dkey: of the gradients of key and value, whose rows are keys.
        wide: :attr:`CostModel.wide` of these kernels, as measured.
    """

    forward: tuple[Shape, ...]
    dquery: tuple[Shape, ...]
    dbias: tuple[Shape, ...]
    dkey: tuple[Shape, ...]
    wide: float = 1.0


def padded_channels(channels: int) -> int:
    """Channels of a head as the kernels pad them in shared memory."""
    return next(dim for dim in (32, 64, 96, 128, 192, 256) if channels <= dim)


def variant_of(channels: int, element_bytes: int) -> Variant:
    """The variant for so many channels of a head, of so many bytes each."""
    padded = padded_channels(channels)
    row_bytes = padded * element_bytes
    rows = 64 if row_bytes <= 512 else 32
    # No more, so that kernels fit in the 99 KiB of shared memory that every GPU has.
    columns = 64 if row_bytes <= 384 else 32 if row_bytes <= 768 else 16
    forward, gradient = (rows, rows), (rows, columns)
    dbias = (64, 64) if row_bytes <= 256 else (32, 32 if row_bytes <= 512 else 16)
    if element_bytes != 2 or padded > 128:
        return Variant((forward,), (gradient,), (dbias,), (gradient,))
    forwards = (forward, (128, 64))
    if padded <= 64:
        return Variant(forwards, (gradient,), (dbias,), (gradient,))
    dkey = (64, 32) if padded == 128 else gradient
    return Variant(forwards, (gradient, (128, 32)), (dbias,), (dkey,), wide=0.8)


#: ``key_interval`` or ``query_interval`` of :mod:`jax_na._window`.
Interval: TypeAlias = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis as the planner sees it, without a frame.

    Attributes:
        length: of the grid.
        kernel_size, stride, dilation, is_causal: of the window.
        rows, columns: lengths of the arrays where they are pieces of the grid.
    """

    length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    rows: int | None = None
    columns: int | None = None

    @property
    def longest_box(self) -> tuple[int, int]:
        """Extents, in class steps, that no box of rows or of columns need exceed."""
        rows = self.length if self.rows is None else self.rows
        columns = self.length if self.columns is None else self.columns
        return -(-rows // self.dilation), -(-columns // self.dilation)


def format_box(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Boxes of one kernel launch and the work they make.

    Attributes:
        row_tile: extents of a tile of rows, in class steps, one per axis.
        column_box: extents of a box of columns, likewise.
        rows: rows of a score tile, at least ``prod(row_tile)``.
        columns: columns of one, at least ``prod(column_box)``.
        tiles: number of row tiles per head and sample.
        boxes: number of boxes that all tiles visit, per head and sample.
        masked_boxes: how many of them need a mask.
    """

    row_tile: tuple[int, ...]
    column_box: tuple[int, ...]
    rows: int
    columns: int
    tiles: int
    boxes: int
    masked_boxes: int

    @property
    def visited_pairs(self) -> int:
        """Pairs of a row and a column that are computed, per head and sample."""
        return self.boxes * self.rows * self.columns

    def __str__(self) -> str:
        rows, columns = map(format_box, (self.row_tile, self.column_box))
        return (
            f"{rows} rows by {columns} columns, in tiles of {self.rows}x{self.columns}"
        )


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Relative times; the unit is one score tile of 64 rows and columns without mask.

    Attributes:
        mask: extra time of a masked box, per unit.
        box: time of a box that does not depend on its size: staging, barriers.
        tile: time of a tile that does not depend on its boxes: prologue and epilogue,
            per 64 rows.
        wide: time of a unit in a tile of 128 rows, whose warps read less shared memory
            for a product.
    """

    mask: float = 0.2
    box: float = 0.1
    tile: float = 1.5
    wide: float = 1.0

    def cost(self, tiling: Tiling) -> float:
        blocks = tiling.rows * tiling.columns / 64**2
        if tiling.rows == 128:
            blocks *= self.wide
        return (
            tiling.boxes * (blocks + self.box)
            + tiling.masked_boxes * self.mask * blocks
            + tiling.tiles * self.tile * tiling.rows / 64
        )


# ---- One axis ------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def classes(axis: Axis) -> tuple[tuple[int, int], ...]:
    """``(tokens, how many classes have so many)`` of the residue classes."""
    residues = np.arange(min(axis.dilation, axis.length))
    tokens = -((residues - axis.length) // axis.dilation)
    return tuple(
        (int(n), int(count)) for n, count in zip(*np.unique(tokens, return_counts=True))
    )


@functools.lru_cache(maxsize=4096)
def _unions(
    axis: Axis, interval: Interval, extent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles of ``extent`` rows: the union of their intervals, and what all rows see.

    Returns:
        ``(span, lead, common)`` per tile: the length of the union, and the half-open
        interval ``[lead, lead + common)`` counted from its start that every row sees.
    """
    parts = []
    for tokens, count in classes(axis):
        _, lo, hi = interval(
            np.arange(tokens), tokens, axis.kernel_size, axis.stride, 1, axis.is_causal
        )
        starts = np.arange(0, tokens, extent)
        first, last = np.minimum.reduceat(lo, starts), np.maximum.reduceat(hi, starts)
        lead, end = np.maximum.reduceat(lo, starts), np.minimum.reduceat(hi, starts)
        part = np.stack([last - first, lead - first, np.maximum(end - lead, 0)])
        parts.append(np.tile(part, count))
    span, lead, common = np.concatenate(parts, axis=1)
    return span, lead, common


@functools.lru_cache(maxsize=65536)
def _axis_counts(
    axis: Axis, interval: Interval, extent: int, box: int
) -> tuple[int, int, int]:
    """Sums over the tiles of an axis: tiles, boxes, boxes that need no mask."""
    span, lead, common = _unions(axis, interval, extent)
    boxes = -(-span // box)
    # Boxes [i * box, (i + 1) * box) inside [lead, lead + common). A box that the end of
    # the union cuts off is masked.
    first = -(-lead // box)
    free = np.maximum((lead + common) // box - first, 0)
    return len(span), int(boxes.sum()), int(free.sum())


def divisions(
    limit: int, lengths: Iterable[int], strides: Iterable[int]
) -> tuple[tuple[int, ...], ...]:
    """Boxes of at most ``limit`` tokens that none can be enlarged on any one axis.

    After these come boxes that can, but only by a part of what shares a window: their
    extents there are multiples of the stride.
    """
    lengths, strides = tuple(lengths), tuple(strides)
    maximal, aligned = [], []
    for inner in itertools.product(*(range(1, min(limit, n) + 1) for n in lengths[1:])):
        rest = min(limit // math.prod(inner), lengths[0])
        for first in sorted({rest, rest - rest % strides[0]} - {0}, reverse=True):
            box = (first, *inner)
            size = math.prod(box)
            ends = [
                extent == length or size // extent * (extent + 1) > limit
                for extent, length in zip(box, lengths)
            ]
            if all(ends):
                maximal.append(box)
            elif all(
                end or (stride > 1 and extent % stride == 0)
                for end, extent, stride in zip(ends, box, strides)
            ):
                aligned.append(box)
    return (*maximal, *aligned)


# ---- All axes ------------------------------------------------------------------------


def count(
    axes: tuple[Axis, ...],
    interval: Interval,
    row_tile: tuple[int, ...],
    column_box: tuple[int, ...],
    rows: int,
    columns: int,
) -> Tiling:
    """The work of one pair of boxes, exactly."""
    tiles = boxes = free = 1
    for axis, extent, box in zip(axes, row_tile, column_box, strict=True):
        axis_tiles, axis_boxes, axis_free = _axis_counts(axis, interval, extent, box)
        tiles, boxes, free = tiles * axis_tiles, boxes * axis_boxes, free * axis_free
    if math.prod(column_box) < columns:
        free = 0  # the surplus columns are masked
    return Tiling(row_tile, column_box, rows, columns, tiles, boxes, boxes - free)


def _search(
    axes: tuple[Axis, ...],
    interval: Interval,
    shapes: tuple[Shape, ...],
    model: CostModel,
) -> Tiling:
    row_limits, column_limits = zip(*(axis.longest_box for axis in axes), strict=True)
    strides, none = [axis.stride for axis in axes], [1] * len(axes)
    candidates = (
        count(axes, interval, row_tile, column_box, rows, columns)
        for rows, columns in shapes
        for row_tile in divisions(rows, row_limits, strides)
        for column_box in divisions(columns, column_limits, none)
    )
    # The order of the candidates settles ties: fewer rows, longer last axes.
    return min(candidates, key=model.cost)


@functools.lru_cache(maxsize=1024)
def plan_rows_are_queries(
    axes: tuple[Axis, ...],
    shapes: tuple[Shape, ...],
    model: CostModel = CostModel(),
) -> Tiling:
    """The cheapest boxes of the forward pass and of the gradients of query and bias."""
    return _search(axes, _window.key_interval, shapes, model)


@functools.lru_cache(maxsize=1024)
def plan_rows_are_keys(
    axes: tuple[Axis, ...],
    shapes: tuple[Shape, ...],
    model: CostModel = CostModel(),
) -> Tiling:
    """The cheapest boxes of the gradients of key and value."""
    return _search(axes, _window.query_interval, shapes, model)
