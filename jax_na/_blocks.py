"""Tiles of tokens, and the blocks of tokens at the other end of their windows.

The portable implementation computes results tile by tile: a tile holds neighboring
tokens of one residue class per axis (:mod:`jax_na._window`), and its *block* every token
of the other array that some token of the tile may meet in a window. Queries own tiles
where results belong to queries, and meet keys; for the gradients of key and value, keys
own tiles and meet the queries that see them. So every result is a gather, and none a
scatter.

Everything factorises over the axes. The tiles of one axis, class by class, are its
*cells*; :class:`AxisTables` tells by cell which tokens meet there. The cells of the grid
are all combinations, in row-major order, and a scan visits a few of them per step, which
bounds memory.

In the shapes below ``B`` stands for the batch axes, and ``B'`` for as many that are each
full or of size 1; ``K`` is key heads, ``G`` query heads per key head, ``C`` cells of an
axis, ``c`` cells of one step, ``T`` tokens of a tile and ``S`` of a block, ``t`` and
``s`` those of one axis. Batch sizes may be symbolic, so nothing computes with them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_na import _window
from jax_na._problem import Problem

# Scores that one step of the scan holds at once, unless a single cell has more.
_SCORES_PER_STEP = 2**20

# What reading a token of a block costs, in scores: without it tiles would be so small
# that they hardly share their blocks.
_READING_COST = 16


class Window(NamedTuple):
    """Parameters of one axis, as the functions of :mod:`jax_na._window` take them."""

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool


def _windows(problem: Problem) -> list[Window]:
    axes = zip(problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    return [Window(*axis) for axis in axes]


# ---- How a grid is cut ---------------------------------------------------------------


class AxisTiling(NamedTuple):
    """How one axis is cut; static.

    Attributes:
        length: tokens of the axis.
        dilation: number of residue classes.
        tile: tokens of a tile.
        span: tokens of a block.
    """

    length: int
    dilation: int
    tile: int
    span: int

    @property
    def tiles(self) -> int:
        """Tiles of one class; the last one and short classes are padded."""
        return -(-self.length // (self.dilation * self.tile))

    @property
    def cells(self) -> int:
        return self.dilation * self.tiles

    def tokens(self) -> np.ndarray:
        """Index of every cell's tokens ``[C, t]``; beyond the length where padded."""
        residue = np.arange(self.dilation)[:, None, None]
        tile = np.arange(self.tiles)[:, None]
        place = self.tile * tile + np.arange(self.tile)
        return (residue + self.dilation * place).reshape(self.cells, self.tile)


class Tiling(NamedTuple):
    """How a grid is cut, and how many cells one step of the scan visits; static."""

    axes: tuple[AxisTiling, ...]
    step: int

    @property
    def cells(self) -> int:
        return math.prod(axis.cells for axis in self.axes)

    @property
    def steps(self) -> int:
        return -(-self.cells // self.step)

    def visits(self) -> tuple[np.ndarray, np.ndarray]:
        """Each step's cells by axis ``[steps, rank, c]``, and which are no padding."""
        padded = np.arange(self.steps * self.step).reshape(self.steps, self.step)
        by_axis = np.unravel_index(
            np.minimum(padded, self.cells - 1), [axis.cells for axis in self.axes]
        )
        return np.stack(by_axis, axis=1).astype(np.int32), padded < self.cells


def _step(cells: int, scores_per_cell: int) -> int:
    """Cells of a step, evenly spread over the steps."""
    most = max(1, _SCORES_PER_STEP // max(1, scores_per_cell))
    return -(-cells // -(-cells // most))


def _span(
    length: int,
    other_length: int,
    tile: int,
    window: Window,
    by_key: bool,
    framed: bool,
) -> int:
    """Tokens of one class that the windows of any tile cover."""
    kernel_size, stride, dilation, is_causal = window
    if not framed:
        tokens = AxisTiling(length, dilation, tile, span=0).tokens()
        interval = _window.query_interval if by_key else _window.key_interval
        _, first, stop = interval(tokens, length, *window)
        exists = tokens < length
        first = np.where(exists, first, length).min(axis=-1)
        span = int((np.where(exists, stop, 0).max(axis=-1) - first).max())
    # Where the tile lies in the grid is known at run time only: the worst case.
    elif is_causal:
        span = tile + kernel_size - 1
    elif by_key:
        span = tile + 2 * kernel_size - 2
    else:
        span = kernel_size + stride * -(-(tile - 1) // stride)
    return min(span, -(-other_length // dilation))


def _axis_tilings(
    length: int, other_length: int, window: Window, by_key: bool, framed: bool
) -> list[AxisTiling]:
    """The tile sizes worth a thought."""
    longest = -(-length // window.dilation)
    powers = [2**i for i in range(longest.bit_length())]
    sizes = {longest, *powers, *(3 * size for size in powers if 3 * size < longest)}
    return [
        AxisTiling(
            length,
            window.dilation,
            tile,
            _span(length, other_length, tile, window, by_key, framed),
        )
        for tile in sorted(sizes)
    ]


@functools.lru_cache(maxsize=1024)
def _make_tiling(
    grid: tuple[int, ...],
    other_grid: tuple[int, ...],
    problem: Problem,
    group: int,
    copies: int,
    by_key: bool,
    framed: bool,
) -> Tiling:
    """The cheapest tiles.

    Args:
        grid: lengths of the grid whose tokens own the tiles.
        other_grid: lengths of the grid that they meet.
        group: query heads per key head.
        copies: samples times key heads.
        by_key: whether keys own the tiles.
        framed: whether a frame places the arrays.
    """

    def scores(axes: tuple[AxisTiling, ...]) -> int:
        return group * math.prod(axis.tile * axis.span for axis in axes)

    def cost(axes: tuple[AxisTiling, ...]) -> int:
        tile = math.prod(axis.tile for axis in axes)
        block = math.prod(axis.span for axis in axes)
        queries, keys = (block, tile) if by_key else (tile, block)
        cells = math.prod(axis.cells for axis in axes)
        return cells * (scores(axes) + _READING_COST * (group * queries + keys))

    options = [
        _axis_tilings(length, other_length, window, by_key, framed)
        for length, other_length, window in zip(grid, other_grid, _windows(problem))
    ]
    axes = min(itertools.product(*options), key=cost)
    return Tiling(
        axes, _step(math.prod(axis.cells for axis in axes), copies * scores(axes))
    )


def _single_queries(
    grid: tuple[int, ...], problem: Problem, group: int, copies: int
) -> Tiling:
    """Tiles of one query, whose block is its window, slot by slot."""
    axes = tuple(
        AxisTiling(length, 1, 1, kernel_size)
        for length, kernel_size in zip(grid, problem.kernel_size)
    )
    # A score needs a token of its own here.
    weight = group + _READING_COST
    slots = math.prod(problem.kernel_size)
    return Tiling(axes, _step(math.prod(grid), copies * weight * slots))


# ---- Who meets whom ------------------------------------------------------------------


class AxisTables(NamedTuple):
    """Who meets whom on one axis, by cell. NumPy, or traced where there is a frame.

    A query sees a key iff ``lo <= position < hi``.

    Attributes:
        tile: ``[1, C, t]``: local index of the tile's tokens.
        block: ``[B', C, s]``: local index of the block's tokens.
        lo, hi: ``[B', C, queries]``: the queries' intervals; ``hi = 0`` where there is
            no query.
        position: ``[B', C, keys]``: the keys' class positions, -1 where there is no key.
        corner: ``[B', C]``: the bias's row of the first query and the first key; each
            further query is one row less, each further key one more.
    """

    tile: Any
    block: Any
    lo: Any
    hi: Any
    position: Any
    corner: Any


class _Placement(NamedTuple):
    """One axis of a frame, ``[B', 1, 1]`` each."""

    length: Any
    query_origin: Any
    key_origin: Any

    def spread(self, table: np.ndarray) -> np.ndarray:
        """A table ``[C, t]`` in int32 and with batch axes of size 1."""
        return table.astype(np.int32).reshape(
            (1,) * (self.length.ndim - 2) + table.shape
        )

    @property
    def namespace(self) -> Any:
        """NumPy for static placements, so that tables stay static, else jax.numpy."""
        return np if isinstance(self.length, np.ndarray) else jnp


def _placements(
    frame: jax.Array | None, grid: Sequence[int], batch_rank: int
) -> list[_Placement]:
    """By axis; ``frame`` is int32 ``[B', 3, rank]``, or None for the grid itself."""
    if frame is None:
        zero = np.zeros((1,) * (batch_rank + 2), np.int32)
        return [_Placement(zero + length, zero, zero) for length in grid]
    fields = jnp.moveaxis(frame[..., None, None], (-3, -4), (0, 1))
    return [_Placement(*axis) for axis in fields]


def _axis_tables(
    tiling: AxisTiling,
    other_length: int,
    window: Window,
    placement: _Placement,
    by_key: bool,
) -> AxisTables:
    """Tables for the tiles of queries, or, if ``by_key``, of keys."""
    xp, dilation, length = placement.namespace, window.dilation, placement.length
    own_origin, other_origin = placement.query_origin, placement.key_origin
    interval = _window.key_interval
    if by_key:
        own_origin, other_origin = other_origin, own_origin
        interval = _window.query_interval

    tile = placement.spread(tiling.tokens())
    own = tile + own_origin
    own_exists = (tile < tiling.length) & (own >= 0) & (own < length)
    residue, first, _ = interval(own, length, *window)
    nowhere = np.int32(np.iinfo(np.int32).max // 2)
    first = xp.where(own_exists, first, nowhere).min(axis=-1, keepdims=True)

    # The block: consecutive tokens of the same class, moved into the local array.
    shift = residue[..., :1] - other_origin
    most = -(-other_length // dilation)
    start = xp.clip(first + shift // dilation, 0, most - tiling.span)
    places = np.arange(tiling.span, dtype=np.int32)
    block = shift % dilation + dilation * (start + places)
    other = block + other_origin
    other_exists = (block < other_length) & (other >= 0) & (other < length)

    query, query_exists, key, key_exists = own, own_exists, other, other_exists
    if by_key:
        query, query_exists, key, key_exists = other, other_exists, own, own_exists
    _, lo, hi = _window.key_interval(query, length, *window)
    return AxisTables(
        tile=np.minimum(tile, tiling.length - 1),
        block=xp.minimum(block, other_length - 1),
        lo=lo,
        hi=xp.where(query_exists, hi, 0),
        position=xp.where(key_exists, key // dilation, -1),
        corner=_window.bias_row(
            query[..., 0], key[..., 0], window.kernel_size, dilation
        ),
    )


def _slot_tables(
    length: int, key_length: int, window: Window, placement: _Placement
) -> AxisTables:
    """Tables for tiles of one query, whose block holds key ``lo + j`` at place j."""
    xp, dilation = placement.namespace, window.dilation
    tile = placement.spread(np.arange(length)[:, None])
    query = tile + placement.query_origin
    exists = (query >= 0) & (query < placement.length)
    residue, lo, hi = _window.key_interval(query, placement.length, *window)
    position = lo + np.arange(window.kernel_size, dtype=np.int32)
    key = residue + dilation * position
    block = key - placement.key_origin
    held = exists & (position < hi) & (block >= 0) & (block < key_length)
    return AxisTables(
        tile=tile,
        block=xp.clip(block, 0, key_length - 1),
        lo=lo,
        hi=xp.where(exists, hi, 0),
        position=xp.where(held, position, -1),
        corner=_window.bias_row(
            query[..., 0], key[..., 0], window.kernel_size, dilation
        ),
    )


class Meeting(NamedTuple):
    """What happens in the cells of one step.

    Attributes:
        tile: ``[1, c, T]``: the tiles' tokens in the flattened local grid.
        block: ``[B', c, S]``: the blocks' tokens, likewise.
        queries: ``[B', 1, c, 1, queries, 1]``: which queries are tokens of the grid.
        keys: ``[B', 1, c, 1, keys, 1]``: which keys are.
        visible: ``[B', 1, c, 1, queries, keys]``: who sees whom.
        corners: by axis ``[B', c]``, as in :class:`AxisTables`.
    """

    tile: jax.Array
    block: jax.Array
    queries: jax.Array
    keys: jax.Array
    visible: jax.Array
    corners: tuple[jax.Array, ...]


def outer(combine: Any, parts: Sequence[Any], sides: int) -> Any:
    """From ``[*lead, *sides]`` of each axis to the flattened sides of all axes.

    With two sides, queries ``q`` and keys ``k``, two axes go from ``[*lead, q0, k0]``
    and ``[*lead, q1, k1]`` to ``[*lead, q0 * q1, k0 * k1]``.
    """
    rank = len(parts)
    expanded = []
    for axis, part in enumerate(parts):
        lead = part.ndim - sides
        sizes = [1] * (sides * rank)
        sizes[axis::rank] = part.shape[lead:]
        expanded.append(part.reshape(*part.shape[:lead], *sizes))
    result = functools.reduce(combine, expanded)
    lead = result.ndim - sides * rank
    flat = [
        math.prod(part.shape[side - sides] for part in parts) for side in range(sides)
    ]
    return result.reshape(*result.shape[:lead], *flat)


# ---- Moving data ---------------------------------------------------------------------


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens ``[B', c, S]`` of ``[B', tokens, K, G, channels]``.

    Returns:
        ``[B', K, c, G, S, channels]``; a batch axis is of size 1 where both have that.
    """

    def one_sample(array: jax.Array, index: jax.Array) -> jax.Array:
        tokens = array.at[index].get(mode="promise_in_bounds")
        return tokens.transpose(2, 0, 3, 1, 4)

    return _over_batch(one_sample, index.ndim - 2, array, index)


def _over_batch(
    function: Callable[[Any, Any], Any], batch_rank: int, first: Any, second: Any
) -> Any:
    """Maps over leading batch axes, of which one of size 1 serves every sample."""
    if not batch_rank:
        return function(first, second)
    inner = functools.partial(_over_batch, function, batch_rank - 1)
    axes = tuple(None if array.shape[0] == 1 else 0 for array in (first, second))
    first, second = (
        array[0] if axis is None else array
        for array, axis in zip((first, second), axes)
    )
    if axes == (None, None):
        return inner(first, second)[None]
    return jax.vmap(inner, in_axes=axes)(first, second)


def _untiled(array: jax.Array, tiling: Tiling) -> jax.Array:
    """``[steps, B, K, c, G, T, channels]`` to ``[B, *grid, K, G, channels]``."""
    axes, rank, batch_rank = tiling.axes, len(tiling.axes), array.ndim - 6
    batch, key_heads = array.shape[1 : 1 + batch_rank], array.shape[1 + batch_rank]
    group, tile, channels = array.shape[-3:]
    padded = tiling.steps * tiling.step
    array = jnp.moveaxis(array, 0, batch_rank + 1)
    array = array.reshape(*batch, key_heads, padded, group, tile, channels)
    array = jax.lax.slice_in_dim(array, 0, tiling.cells, axis=batch_rank + 1)

    # From [B, K, *(residues, tiles), G, *t, channels]
    # to [B, *(tiles, t, residues), K, G, channels], which is the grid, padded.
    cells = itertools.chain(*((axis.dilation, axis.tiles) for axis in axes))
    places = (axis.tile for axis in axes)
    array = array.reshape(*batch, key_heads, *cells, group, *places, channels)
    first_cell, group_axis = batch_rank + 1, batch_rank + 1 + 2 * rank
    order = [*range(batch_rank)]
    for number in range(rank):
        residues = first_cell + 2 * number
        order += [residues + 1, group_axis + 1 + number, residues]
    order += [batch_rank, group_axis, group_axis + 1 + rank]
    grid = (axis.cells * axis.tile for axis in axes)
    array = array.transpose(order).reshape(*batch, *grid, key_heads, group, channels)
    for number, axis in enumerate(axes):
        array = jax.lax.slice_in_dim(array, 0, axis.length, axis=batch_rank + number)
    return array


# ---- Sweeps --------------------------------------------------------------------------


class Sweep:
    """One pass over all tiles of an array, and the blocks that they meet.

    Attributes:
        problem: of the call.
        by_key: whether tiles of keys meet queries, instead of the other way round.
        key_heads: of the call.
        tiling: of the grid whose tokens own the tiles.
        extents: queries and keys of one cell, by axis.
    """

    def __init__(
        self,
        problem: Problem,
        query: jax.Array,
        key: jax.Array,
        frame: jax.Array | None,
        *,
        by_key: bool = False,
        by_slot: bool = False,
    ):
        """From the shapes of a call.

        Args:
            query: ``[B, *grid, N, channels]``.
            key: ``[B, *grid, K, channels]``.
            frame: int32 ``[B', 3, rank]`` or None.
            by_key: see above.
            by_slot: each query is a tile, and place j of its block its j-th key.
        """
        rank = problem.rank
        batch_rank = query.ndim - rank - 2
        own, other = (
            array.shape[batch_rank : batch_rank + rank] for array in (query, key)
        )
        if by_key:
            own, other = other, own
        self.problem, self.by_key, self.key_heads = problem, by_key, key.shape[-2]
        group = query.shape[-2] // self.key_heads
        samples = math.prod(n for n in key.shape[:batch_rank] if isinstance(n, int))
        copies = samples * self.key_heads
        if by_slot:
            self.tiling = _single_queries(own, problem, group, copies)
        else:
            self.tiling = _make_tiling(
                own, other, problem, group, copies, by_key, frame is not None
            )
        axes = self.tiling.axes
        self.extents = [
            (axis.span, axis.tile) if by_key else (axis.tile, axis.span)
            for axis in axes
        ]
        self._own_grid, self._other_grid = own, other
        # Without a frame, what a block holds in vain is at least a token of the grid.
        self._clears = by_slot or frame is not None
        self._tables = [
            _slot_tables(axis.length, length, window, placement)
            if by_slot
            else _axis_tables(axis, length, window, placement, by_key)
            for axis, length, window, placement in zip(
                axes, other, _windows(problem), _placements(frame, own, batch_rank)
            )
        ]

    def tile(self, array: jax.Array, meeting: Meeting) -> jax.Array:
        """``[B, *grid, heads, channels]`` to ``[B, K, c, G, T, channels]``."""
        exists = meeting.keys if self.by_key else meeting.queries
        return self._take(array, meeting.tile, exists)

    def block(self, array: jax.Array, meeting: Meeting) -> jax.Array:
        """``[B, *other grid, heads, channels]`` to ``[B, K, c, G, S, channels]``."""
        exists = meeting.queries if self.by_key else meeting.keys
        return self._take(array, meeting.block, exists)

    def _take(self, array: jax.Array, index: jax.Array, exists: jax.Array) -> jax.Array:
        batch_rank = array.ndim - len(self._own_grid) - 2
        tokens = math.prod(array.shape[batch_rank:-2])
        heads = (self.key_heads, array.shape[-2] // self.key_heads)
        shape = (*array.shape[:batch_rank], tokens, *heads, array.shape[-1])
        taken = take(array.reshape(shape), index)
        return jnp.where(exists, taken, 0) if self._clears else taken

    def untiled(self, results: jax.Array) -> jax.Array:
        """``[steps, B, K, c, G, T, channels]`` to ``[B, *grid, heads, channels]``."""
        array = _untiled(results, self.tiling)
        heads = array.shape[-3] * array.shape[-2]
        return array.reshape(*array.shape[:-3], heads, array.shape[-1])

    def _meet(self, cells: jax.Array, real: jax.Array) -> Meeting:
        """What happens in cells ``[rank, c]``; ``real [c]`` is False for padding."""
        here = [
            AxisTables(
                *(
                    jnp.take(table, cell, axis=axis.corner.ndim - 1, mode="clip")
                    for table in axis
                )
            )
            for axis, cell in zip(self._tables, cells)
        ]
        own, other = (
            [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
            for grid in (self._own_grid, self._other_grid)
        )
        queries = outer(jnp.logical_and, [axis.hi > 0 for axis in here], sides=1)
        keys = outer(jnp.logical_and, [axis.position >= 0 for axis in here], sides=1)
        visible = outer(
            jnp.logical_and,
            [
                (axis.lo[..., :, None] <= axis.position[..., None, :])
                & (axis.position[..., None, :] < axis.hi[..., :, None])
                for axis in here
            ],
            sides=2,
        )
        real = real[:, None]
        return Meeting(
            tile=outer(jnp.add, [a.tile * n for a, n in zip(here, own)], sides=1),
            block=outer(jnp.add, [a.block * n for a, n in zip(here, other)], sides=1),
            queries=(queries & real)[..., None, :, None, :, None],
            keys=(keys & real)[..., None, :, None, :, None],
            visible=(visible & real[..., None])[..., None, :, None, :, :],
            corners=tuple(axis.corner for axis in here),
        )

    def run(
        self, step: Callable[[Any, Meeting], tuple[Any, Any]], totals: Any = None
    ) -> tuple[Any, Any]:
        """Runs ``step(totals, meeting) -> (totals, results)`` over all cells.

        Returns:
            The final ``totals``, and the results stacked ``[steps, ...]``.
        """

        def visit(totals: Any, cells: Any) -> tuple[Any, Any]:
            return step(totals, self._meet(*cells))

        visits = self.tiling.visits()
        if self.tiling.steps > 1:
            # Reverse mode repeats a step instead of storing its scores.
            visit = jax.checkpoint(visit, prevent_cse=False)
            return jax.lax.scan(visit, totals, visits)
        totals, results = visit(totals, tuple(array[0] for array in visits))
        return totals, jax.tree.map(lambda array: array[None], results)
