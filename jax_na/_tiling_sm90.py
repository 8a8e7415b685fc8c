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
from typing import Any

import numpy as np

from jax_na import _tiling, _window
from jax_na._tiling import Axis, Interval

#: Rows of a warpgroup.
ROWS = 64

#: Tokens that a box of one copy may span on an axis, and its largest dilation.
MOST_SPANNED, LARGEST_DILATION = 256, 8

#: To which head dimensions are filled up.
PADDED_DIMS = (32, 64, 96, 128, 192, 256)

#: Coordinates of a box of columns whose masks are a product, over all axes.
MASK_ENTRIES = 32

#: Entries of the tables of bias that a CTA holds, one table for every head of columns that
#: a head of rows has.
LARGEST_BIAS = 512

# Of the device that plans are for, and what each of them holds of the portable kernels.
_MULTIPROCESSORS = 132
_PORTABLE_CTAS = 4


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        columns: of a score tile.
        groups: warpgroups of a pipeline, which visit the same boxes.
        pipelines: of a CTA, each with tiles of its own.
        cycles: of a multiprocessor, for a warpgroup's visit to a box without mask. A visit
            takes ``groups * pipelines`` times as long, as that many are under way.
        together: whether every warpgroup visits what any of a pipeline sees, instead of
            skipping what it does not see itself.
        product_cycles: of a visit whose mask is a product, of which the kernel has a form
            of its own; None where it has not.
        most_seen: columns of an axis that the rows of a tile may see then, up to the end
            of the last box.
    """

    columns: int
    groups: int
    pipelines: int
    cycles: int
    together: bool = False
    product_cycles: int | None = None
    most_seen: int = 32


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cycles of a multiprocessor beside those of visits, as in :class:`Kernel`.

    Attributes:
        mask: more for a visit with a mask, per column.
        tile: of a warpgroup's tile, whatever it visits: prologue and epilogue.
        skip: of a box that was brought and that a warpgroup does not see.
    """

    mask: float
    tile: float
    skip: float


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """A launch and the kernels that were compiled for it.

    Attributes:
        name: in the attributes of custom calls.
        rows_are_keys: and columns queries, instead of the other way round.
        costs: fitted to times on an H200.
        kernels: by padded head dimension, as in ``cuda/sm90/variants.h``. Their cycles are
            fitted too, but for those of 192 and 256, which are interpolated.
        portable_cycles: of a multiprocessor of an H100, for a unit of
            :class:`jax_na._tiling.CostModel` in the portable kernels.
    """

    name: str
    rows_are_keys: bool
    costs: Costs
    kernels: dict[int, tuple[Kernel, ...]]
    portable_cycles: dict[int, int]

    @property
    def interval(self) -> Interval:
        """Of columns that a row sees."""
        return _window.query_interval if self.rows_are_keys else _window.key_interval

    def padded(self, channels: int) -> int:
        """The head dimension of the kernels for heads of so many channels."""
        return min(dim for dim in PADDED_DIMS if channels <= dim)

    def takes(self, channels: int) -> bool:
        """Whether there are kernels for heads of so many channels."""
        return channels <= PADDED_DIMS[-1] and self.padded(channels) in self.kernels

    def cycles(
        self,
        kernel: Kernel,
        tiles: Any,
        loads: Any,
        visits: Any,
        masked_visits: Any,
        masks_by_product: Any,
    ) -> Any:
        """Of all multiprocessors together, from counts or arrays of counts."""
        selecting = visits * kernel.cycles + masked_visits * (
            self.costs.mask * kernel.columns
        )
        multiplying = visits * (kernel.product_cycles or 0)
        return (
            np.where(masks_by_product, multiplying, selecting)
            + tiles * (kernel.groups * self.costs.tile)
            + (loads * kernel.groups - visits) * self.costs.skip
        )

    def cycles_of(self, tiling: Tiling, copies: int | None) -> float:
        """Until the last CTA is done, per head and sample; of all multiprocessors."""
        kernel, tiles = tiling.kernel, tiling.tiles
        counts = (tiles, tiling.loads, tiling.visits, tiling.masked_visits)
        cycles = float(self.cycles(kernel, *counts, tiling.masks_by_product))
        return cycles * imbalance(tiles, kernel.pipelines, copies)

    def portable_cycles_of(
        self, tiling: _tiling.Tiling, cost: float, channels: int, copies: int | None
    ) -> float:
        """The same of the portable kernel, with its cost by its own planner."""
        cycles = cost * self.portable_cycles[self.padded(channels)]
        return cycles * imbalance(tiling.tiles, _PORTABLE_CTAS, copies)


FORWARD = Pass(
    "forward",
    False,
    Costs(mask=2.8, tile=1510, skip=1020),
    {
        32: (
            Kernel(64, 1, 4, 490, product_cycles=400),
            Kernel(112, 1, 3, 660, product_cycles=650),
        ),
        64: (
            Kernel(64, 1, 3, 550, product_cycles=580),
            Kernel(80, 1, 3, 640, product_cycles=660),
            Kernel(96, 1, 3, 740, product_cycles=780),
            Kernel(112, 1, 3, 860, product_cycles=880),
        ),
        96: (
            Kernel(80, 2, 1, 1100, product_cycles=1030, most_seen=64),
            Kernel(128, 2, 1, 1560, product_cycles=1430, most_seen=64),
        ),
        128: (
            Kernel(80, 2, 1, 1080, product_cycles=1040, most_seen=64),
            Kernel(128, 2, 1, 1570, product_cycles=1650, most_seen=64),
        ),
        192: (Kernel(64, 2, 1, 1510),),
        256: (Kernel(48, 2, 1, 2480),),
    },
    {32: 650, 64: 800, 96: 1150, 128: 1500, 192: 2200, 256: 3000},
)

DQUERY = Pass(
    "dquery",
    False,
    Costs(mask=3.8, tile=1730, skip=880),
    {
        32: (
            Kernel(64, 1, 3, 460, product_cycles=470),
            Kernel(80, 1, 3, 520, product_cycles=530),
        ),
        64: (
            Kernel(80, 1, 2, 860, product_cycles=950),
            Kernel(96, 1, 2, 940, product_cycles=1100),
        ),
        96: (Kernel(64, 2, 1, 1090, product_cycles=960, most_seen=64),),
        128: (Kernel(64, 2, 1, 1080, product_cycles=1100, most_seen=64),),
    },
    {32: 815, 64: 980, 96: 1440, 128: 1920},
)

DKEY_DVALUE = Pass(
    "dkey_dvalue",
    True,
    Costs(mask=3.6, tile=1950, skip=230),
    {
        32: (Kernel(64, 1, 3, 660, product_cycles=590),),
        64: (
            Kernel(48, 1, 3, 770, product_cycles=750),
            Kernel(80, 1, 2, 1250, product_cycles=1270),
        ),
        96: (Kernel(64, 2, 1, 1750, product_cycles=1550, most_seen=64),),
        128: (Kernel(64, 2, 1, 1710, product_cycles=1670, most_seen=64),),
    },
    {32: 1080, 64: 1420, 96: 1850, 128: 2460},
)

#: Makes what DQUERY and DKEY_DVALUE make, where sums in any order are allowed.
GRADIENTS = Pass(
    "gradients",
    True,
    Costs(mask=4.5, tile=2320, skip=0),
    {
        32: (Kernel(64, 1, 3, 970, product_cycles=860),),
        64: (
            Kernel(64, 1, 2, 1600, product_cycles=1480),
            Kernel(64, 2, 1, 1480, product_cycles=1360, together=True),
        ),
        128: (
            Kernel(64, 2, 1, 2450, product_cycles=2330, together=True, most_seen=64),
        ),
    },
    {
        dim: DQUERY.portable_cycles[dim] + cycles
        for dim, cycles in DKEY_DVALUE.portable_cycles.items()
    },
)

#: Of all multiprocessors together, to clear and to round one of GRADIENTS' sums in memory,
#: and to make delta of a channel of a query. DQUERY makes it by the way where heads have
#: more channels than so many.
SUM_CYCLES, DELTA_CYCLES, DELTA_CHANNELS = 0.58, 0.23, 64


def sums(queries: Any, channels: int) -> Any:
    """How many sums of queries' gradients there are in memory, per head and sample."""
    return queries * GRADIENTS.padded(channels)


def cycles_beside_gradients(queries: Any, channels: int) -> Any:
    """Of what GRADIENTS needs and DQUERY does not, per head and sample."""
    delta = DELTA_CYCLES if channels > DELTA_CHANNELS else 0
    return sums(queries, channels) * (SUM_CYCLES + delta)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Boxes of one kernel launch and the work they make, per head of rows and sample.

    Attributes:
        kernel: which one.
        row_box: extents of a warpgroup's box of rows, in class steps, one per axis.
        column_box: extents of a box of columns, likewise.
        tiles: tiles of a pipeline.
        loads: boxes that they bring to shared memory.
        visits: boxes that all warpgroups visit.
        masked_visits: how many of them need a mask.
        masks_by_product: whether all visits have a mask, and those are products.
    """

    kernel: Kernel
    row_box: tuple[int, ...]
    column_box: tuple[int, ...]
    tiles: int
    loads: int
    visits: int
    masked_visits: int
    masks_by_product: bool = False

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
    if kernel.together:
        visits = loads * kernel.groups
    free[:, column_boxes.prod(axis=1) < kernel.columns] = 0  # the rest is masked
    return np.stack([tiles, loads, visits, visits - free])


def _can_mask_by_product(
    axes: tuple[Axis, ...],
    kernel: Kernel,
    row_boxes: np.ndarray,
    column_boxes: np.ndarray,
) -> np.ndarray:
    """bool ``[R, C]``: whether the masks of pairs of boxes can be products.

    As ``can_mask_by_product`` in ``cuda/sm90/mask_product.cuh``; problems with frames have
    none either way, and those with a bias only where it fits (``cuda/sm90/bias.cuh``).
    """
    if kernel.product_cycles is None:
        return np.zeros((len(row_boxes), len(column_boxes)), bool)
    missing = column_boxes.prod(axis=1) < kernel.columns
    few = column_boxes.sum(axis=1) + missing <= MASK_ENTRIES
    more = np.array([axis.kernel_size + axis.stride - 2 for axis in axes])
    rows = row_boxes * np.array([kernel.groups] + [1] * (len(axes) - 1))
    seen = (rows + more)[:, None]
    visited = -(-seen // column_boxes) * column_boxes
    return few & (visited <= kernel.most_seen).all(axis=2)


def count(
    axes: tuple[Axis, ...],
    interval: Interval,
    kernel: Kernel,
    row_box: tuple[int, ...],
    column_box: tuple[int, ...],
    masks_by_product: bool = True,
) -> Tiling:
    """The work of one pair of boxes, exactly; masks are products only where they can."""
    boxes = np.array([row_box]), np.array([column_box])
    counts = _counts(axes, interval, kernel, *boxes)
    can = _can_mask_by_product(axes, kernel, *boxes)
    product = masks_by_product and bool(can[0, 0])
    return _tiling_of(kernel, row_box, column_box, counts[:, 0, 0], product)


def _tiling_of(
    kernel: Kernel,
    row_box: tuple[int, ...],
    column_box: tuple[int, ...],
    counts: np.ndarray,
    masks_by_product: bool,
) -> Tiling:
    tiles, loads, visits, masked_visits = map(int, counts)
    return Tiling(
        kernel,
        row_box,
        column_box,
        tiles,
        loads,
        visits,
        masked_visits,
        masks_by_product,
    )


@functools.lru_cache(maxsize=256)
def _boxes(
    limit: int, longest: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> np.ndarray:
    """Those of :func:`jax_na._tiling.divisions`, longer last axes first."""
    boxes = _tiling.divisions(limit, longest, strides or (1,) * len(longest))
    return np.array(sorted(boxes, key=lambda box: box[::-1], reverse=True))


@functools.lru_cache(maxsize=256)
def _even_boxes(limit: int, longest: tuple[int, ...]) -> np.ndarray:
    """The same, of boxes whose last extents are even, as that of ``longest`` is."""
    pairs = _boxes(limit // 2, (*longest[:-1], longest[-1] // 2))
    return pairs * ([1] * (len(longest) - 1) + [2])


def fills_device(tiling: Tiling, copies: int | None) -> bool:
    """Whether there is a tile for every pipeline of all multiprocessors."""
    at_once = _MULTIPROCESSORS * tiling.kernel.pipelines
    return copies is None or tiling.tiles * copies >= at_once


def imbalance(tiles: Any, at_once: int, copies: int | None) -> Any:
    """What the busiest multiprocessor has to do over the average.

    Args:
        tiles: per head and sample.
        at_once: tiles that a multiprocessor works on at the same time.
        copies: heads of all samples, None where they are not known, and many.
    """
    if not copies:
        return 1.0
    rounds = tiles * copies / (_MULTIPROCESSORS * at_once)
    return np.ceil(rounds) / rounds


def best_tilings(
    which: Pass,
    kernel: Kernel,
    axes: tuple[Axis, ...],
    copies: int | None,
    members: int = 1,
    has_bias: bool = False,
    most: int = 1,
) -> list[tuple[float, Tiling]]:
    """The ``most`` cheapest boxes of a kernel, and their cycles; see :func:`plan`."""
    spanned = [(MOST_SPANNED - 1) // axis.dilation + 1 for axis in axes]
    row_limits, column_limits = (
        tuple(map(min, spanned, longest))
        for longest in zip(*(axis.longest_box for axis in axes))
    )
    row_boxes = _boxes(ROWS, row_limits, tuple(axis.stride for axis in axes))
    if has_bias:  # which scores begin with in pairs of columns
        *others, last = column_limits
        pairs = min(last + 1, spanned[-1]) // 2
        column_boxes = _even_boxes(kernel.columns, (*others, 2 * pairs))
    else:
        column_boxes = _boxes(kernel.columns, column_limits)
    counts = _counts(axes, which.interval, kernel, row_boxes, column_boxes)
    counts[1:] *= members
    tiles, loads, visits, masked_visits = counts
    selecting, multiplying = (
        which.cycles(kernel, tiles, loads, visits, masked_visits, by_product)
        for by_product in (False, True)
    )
    # Scores may begin with a bias only where masks are products, and it is dear elsewhere.
    products = _can_mask_by_product(axes, kernel, row_boxes, column_boxes) & (
        has_bias | (multiplying <= selecting)
    )
    cycles = np.where(products, multiplying, selecting)
    cycles = cycles * imbalance(tiles, kernel.pipelines, copies)
    # Of equals those with the longest last axis of column boxes come first.
    order = np.argsort(cycles.T, axis=None, kind="stable")[:most]
    return [
        (
            float(cycles[row, column]),
            _tiling_of(
                kernel,
                tuple(map(int, row_boxes[row])),
                tuple(map(int, column_boxes[column])),
                counts[:, row, column],
                bool(products[row, column]),
            ),
        )
        for column, row in zip(*np.unravel_index(order, cycles.T.shape), strict=True)
    ]


@functools.lru_cache(maxsize=1024)
def plan(
    which: Pass,
    channels: int,
    axes: tuple[Axis, ...],
    copies: int | None,
    members: int = 1,
    has_bias: bool = False,
) -> Tiling:
    """The cheapest boxes of a pass.

    Args:
        which: the pass.
        channels: of a head, at most what kernels are there for.
        axes: the grid.
        copies: heads of rows of all samples, None where they are not known.
        members: heads of columns for every head of rows.
        has_bias: whether there is a relative positional bias.
    """
    best = (
        best_tilings(which, kernel, axes, copies, members, has_bias)[0]
        for kernel in which.kernels[which.padded(channels)]
    )
    return min(best, key=lambda found: found[0])[1]
