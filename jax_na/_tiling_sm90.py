"""Planner of the kernels for Hopper: which boxes they work on, and which kernel does.

A warpgroup owns a box of at most 64 row tokens. Those of a CTA either are pipelines of
their own or own boxes next to each other on the first axis and visit the same boxes of
column tokens, which start where the union of all their intervals starts; what one of them
does not see, it skips. Otherwise as in :mod:`jax_na._tiling`: counts factorise over the
axes, so that every pair of boxes is judged exactly.

``cuda/sm90/tile.cuh`` is the other side: it walks what is counted here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from jax_na import _tiling, _window
from jax_na._tiling import Axis, Interval

#: Rows of a warpgroup.
ROWS = 64

#: Tokens that a box of one copy may span on an axis, and its largest dilation.
MOST_SPANNED, LARGEST_DILATION = 256, 8


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        columns: of a score tile.
        groups: warpgroups of a CTA that visit the same boxes; 1 stands for three
            warpgroups that each are a pipeline of their own.
        cycles: of a multiprocessor, for a warpgroup's visit to a box without mask: a third
            or a half of the time that it takes, as others run at the same time.
    """

    columns: int
    groups: int
    cycles: int

    @property
    def pipelines(self) -> int:
        """Tiles that a CTA works on at the same time."""
        return 3 if self.groups == 1 else 1


#: Kernels of the forward pass by padded head dimension, as in ``cuda/sm90/variants.h``.
#: Their cycles are fitted to times on an H200; those of 96, 192 and 256 are interpolated.
FORWARD: dict[int, tuple[Kernel, ...]] = {
    32: (
        Kernel(64, 1, 470),
        Kernel(96, 1, 540),
        Kernel(112, 1, 670),
        Kernel(128, 1, 810),
    ),
    64: (
        Kernel(64, 1, 600),
        Kernel(80, 1, 710),
        Kernel(96, 1, 840),
        Kernel(112, 1, 920),
        Kernel(128, 1, 1220),
        Kernel(128, 2, 1180),
    ),
    96: (Kernel(80, 2, 880), Kernel(128, 2, 1360)),
    128: (
        Kernel(64, 3, 810),
        Kernel(80, 2, 1050),
        Kernel(128, 2, 1540),
        Kernel(144, 2, 1870),
        Kernel(176, 2, 2600),
    ),
    192: (Kernel(80, 2, 1450),),
    256: (Kernel(48, 2, 1150),),
}

#: What a unit of :class:`jax_na._tiling.CostModel` takes the portable kernels, in cycles of
#: a multiprocessor, by padded head dimension. As above.
PORTABLE_CYCLES = {32: 650, 64: 800, 96: 1150, 128: 1500, 192: 2200, 256: 3000}


def padded(channels: int) -> int:
    """The head dimension of the kernel that runs so many channels."""
    return next(dim for dim in FORWARD if channels <= dim)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Boxes of one kernel launch and the work they make, per head and sample.

    Attributes:
        kernel: which one.
        row_box: extents of a warpgroup's box of rows, in class steps, one per axis.
        column_box: extents of a box of columns, likewise.
        tiles: tiles of a pipeline.
        loads: boxes that they bring to shared memory.
        visits: boxes that all warpgroups visit.
        masked_visits: how many of them need a mask.
    """

    kernel: Kernel
    row_box: tuple[int, ...]
    column_box: tuple[int, ...]
    tiles: int
    loads: int
    visits: int
    masked_visits: int

    @property
    def visited_pairs(self) -> int:
        """Pairs of a row and a column that are computed."""
        return self.visits * ROWS * self.kernel.columns

    def __str__(self) -> str:
        rows, columns = map(_tiling.format_box, (self.row_box, self.column_box))
        kernel = f"{ROWS}x{self.kernel.columns}"
        shared = (
            f", {self.kernel.groups} side by side" if self.kernel.groups > 1 else ""
        )
        return f"{rows} rows by {columns} columns, in tiles of {kernel}{shared}"


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Cycles of a launch. Fitted to times on an H200.

    Attributes:
        mask: extra cycles of a masked visit, per column.
        tile: of a warpgroup's tile, whatever it visits: prologue and epilogue.
        skip: of a box that was brought and that a warpgroup does not see.
        multiprocessors: of the device.
    """

    mask: float = 2.6
    tile: float = 1460
    skip: float = 650
    multiprocessors: int = 132

    def work(
        self, kernel: Kernel, tiles: Any, loads: Any, visits: Any, masked_visits: Any
    ) -> Any:
        """Cycles of all multiprocessors together, from counts or arrays of counts."""
        return (
            visits * kernel.cycles
            + masked_visits * (self.mask * kernel.columns)
            + tiles * (kernel.groups * self.tile)
            + (loads * kernel.groups - visits) * self.skip
        )

    def cycles(self, tiling: Tiling) -> float:
        """:meth:`work` of a tiling, per head and sample."""
        counts = (tiling.tiles, tiling.loads, tiling.visits, tiling.masked_visits)
        return self.work(tiling.kernel, *counts)

    def imbalance(self, kernel: Kernel, tiles: Any) -> Any:
        """Tiles of the CTA that takes most over the average CTA's."""
        rounds = tiles / (self.multiprocessors * kernel.pipelines)
        return np.ceil(rounds) / rounds


# ---- One axis ------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _row_boxes(
    axis: Axis, interval: Interval, extent: int
) -> tuple[tuple[np.ndarray, int], ...]:
    """``[4, boxes]`` of every class, and how many such classes there are.

    Of a box of ``extent`` rows: the union ``[first, last)`` of its intervals, and what all
    of its rows see, ``[lead, end)``.
    """
    classes = []
    for tokens, count in _tiling.classes(axis):
        _, lo, hi = interval(
            np.arange(tokens), tokens, axis.kernel_size, axis.stride, 1, axis.is_causal
        )
        starts = np.arange(0, tokens, extent)
        first, last = np.minimum.reduceat(lo, starts), np.maximum.reduceat(hi, starts)
        lead, end = np.maximum.reduceat(lo, starts), np.minimum.reduceat(hi, starts)
        classes.append((np.stack([first, last, lead, end]), count))
    return tuple(classes)


@functools.lru_cache(maxsize=8192)
def _axis_counts(
    axis: Axis, interval: Interval, extent: int, groups: int, most: int
) -> np.ndarray:
    """Counts of an axis with ``groups`` boxes of ``extent`` rows per tile.

    Returns:
        int64 ``[4, most]``: tiles, loads, visits and those of the visits that need no
        mask, for boxes of 1, ..., ``most`` columns.
    """
    columns = np.arange(1, most + 1)
    total = np.zeros((4, most), np.int64)
    for ends, count in _row_boxes(axis, interval, extent):
        first, last, _, _ = ends
        tiles = np.arange(0, len(first), groups)
        origin = np.minimum.reduceat(first, tiles)
        span = np.maximum.reduceat(last, tiles) - origin
        (span,), repeats = _distinct(span[None])
        loads = repeats @ -(-span // columns)

        ends = ends - np.repeat(origin, groups)[: len(first)]
        (first, last, lead, end), repeats = _distinct(ends)
        visits = repeats @ (-(-last // columns) - first // columns)
        free = repeats @ np.maximum(end // columns - -(-lead // columns), 0)
        total[0] += count * len(tiles)
        total[1:] += count * np.stack([loads, visits, free])
    return total


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct columns of ``[n, m]`` as ``[n, distinct, 1]``, and the counts of each."""
    distinct, counts = np.unique(rows, axis=1, return_counts=True)
    return distinct[:, :, None], counts


# ---- All axes ------------------------------------------------------------------------


def _counts(
    axes: tuple[Axis, ...],
    interval: Interval,
    kernel: Kernel,
    row_boxes: np.ndarray,
    column_boxes: np.ndarray,
) -> np.ndarray:
    """The work of every pair of boxes ``[R, rank]`` and ``[C, rank]``.

    Returns:
        int64 ``[4, R, C]``: tiles, loads, visits, masked visits.
    """
    total = np.ones((4, len(row_boxes), len(column_boxes)), np.int64)
    for index, axis in enumerate(axes):
        extents, which = np.unique(row_boxes[:, index], return_inverse=True)
        most = int(column_boxes[:, index].max())
        groups = kernel.groups if index == 0 else 1
        table = np.stack(
            [_axis_counts(axis, interval, int(e), groups, most) for e in extents],
            axis=1,
        )
        total *= table[:, which][:, :, column_boxes[:, index] - 1]
    tiles, loads, visits, free = total
    free[:, column_boxes.prod(axis=1) < kernel.columns] = 0  # the rest is masked
    return np.stack([tiles, loads, visits, visits - free])


def count(
    axes: tuple[Axis, ...],
    interval: Interval,
    kernel: Kernel,
    row_box: tuple[int, ...],
    column_box: tuple[int, ...],
) -> Tiling:
    """The work of one pair of boxes, exactly."""
    boxes = np.array([row_box]), np.array([column_box])
    counts = _counts(axes, interval, kernel, *boxes)
    return Tiling(kernel, row_box, column_box, *map(int, counts[:, 0, 0]))


@functools.lru_cache(maxsize=256)
def _boxes(limit: int, longest: tuple[int, ...]) -> np.ndarray:
    return np.array(_tiling.divisions(limit, longest))


@functools.lru_cache(maxsize=1024)
def _search(
    axes: tuple[Axis, ...],
    interval: Interval,
    kernels: tuple[Kernel, ...],
    copies: int | None,
    model: CostModel,
) -> Tiling:
    longest = tuple(
        min(-(-axis.length // axis.dilation), (MOST_SPANNED - 1) // axis.dilation + 1)
        for axis in axes
    )
    row_boxes = _boxes(ROWS, longest)
    best, least = None, math.inf
    for kernel in kernels:
        column_boxes = _boxes(kernel.columns, longest)
        counts = _counts(axes, interval, kernel, row_boxes, column_boxes)
        costs = model.work(kernel, *counts)
        if copies is not None:
            costs = costs * model.imbalance(kernel, copies * counts[0])
        row, column = np.unravel_index(np.argmin(costs), costs.shape)
        if costs[row, column] < least:
            least = costs[row, column]
            best = Tiling(
                kernel,
                tuple(map(int, row_boxes[row])),
                tuple(map(int, column_boxes[column])),
                *map(int, counts[:, row, column]),
            )
    assert best is not None
    return best


def plan_rows_are_queries(
    axes: tuple[Axis, ...],
    kernels: tuple[Kernel, ...],
    copies: int | None,
    model: CostModel = CostModel(),
) -> Tiling:
    """The cheapest boxes of the forward pass and of the query's gradient.

    ``copies`` are the heads of all samples, None where they are not known.
    """
    return _search(axes, _window.key_interval, kernels, copies, model)
