"""The planner: what it counts, by brute force, and what it chooses."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_na
from jax_na import _ops, _plan, _reference, _tiling, _unfused_lowering, _window


def _visible(axis: _tiling.Axis) -> np.ndarray:
    """bool ``[queries, keys]`` of the oracle."""
    mask = np.zeros((axis.length, axis.length), bool)
    window = (axis.kernel_size, axis.stride, axis.dilation, axis.is_causal)
    for query in range(axis.length):
        mask[query, list(_reference.visible_keys(query, axis.length, *window))] = True
    return mask


def _axis_boxes(
    mask: np.ndarray, dilation: int, extent: int, box: int
) -> Iterator[list[np.ndarray]]:
    """For every tile of an axis, its boxes: bool ``[rows, columns]`` each, in order."""
    length = len(mask)
    for residue in range(min(dilation, length)):
        tokens = np.arange(residue, length, dilation)
        for start in range(0, len(tokens), extent):
            rows = mask[tokens[start : start + extent]][:, tokens]
            seen = np.flatnonzero(rows.any(axis=0))
            first, last = seen[0], seen[-1] + 1
            yield [rows[:, at : min(at + box, last)] for at in range(first, last, box)]


def _brute_force(
    axes: tuple[_tiling.Axis, ...],
    rows_are_keys: bool,
    row_tile: tuple[int, ...],
    column_box: tuple[int, ...],
    columns: int,
) -> tuple[int, int, int]:
    """Tiles, boxes and boxes that need a mask."""
    per_axis = []
    for axis, extent, box in zip(axes, row_tile, column_box, strict=True):
        mask = _visible(axis)
        mask = mask.T if rows_are_keys else mask
        per_axis.append(list(_axis_boxes(mask, axis.dilation, extent, box)))
    tiles = boxes = masked = 0
    for tile in itertools.product(*per_axis):
        tiles += 1
        for parts in itertools.product(*tile):
            boxes += 1
            full = all(part.all() for part in parts)
            size = math.prod(part.shape[1] for part in parts)
            masked += not (full and size == columns)
    return tiles, boxes, masked


@st.composite
def _axes(draw: Any, rank: int, longest: int) -> tuple[_tiling.Axis, ...]:
    axes = []
    for _ in range(rank):
        kernel_size = draw(st.integers(1, 7))
        dilation = draw(st.integers(1, 3))
        length = kernel_size * dilation + draw(st.integers(0, longest))
        stride = draw(st.integers(1, kernel_size))
        causal = draw(st.booleans())
        axes.append(_tiling.Axis(length, kernel_size, stride, dilation, causal))
    return tuple(axes)


@st.composite
def _counted(draw: Any) -> Any:
    rank = draw(st.integers(1, 3))
    axes = draw(_axes(rank, {1: 30, 2: 9, 3: 3}[rank]))
    extents = st.tuples(*(st.integers(1, 8) for _ in axes))
    return axes, draw(st.booleans()), draw(extents), draw(extents)


@given(_counted())
@settings(max_examples=150, deadline=None)
def test_counts_are_exact(problem: Any) -> None:
    axes, rows_are_keys, row_tile, column_box = problem
    interval = _window.query_interval if rows_are_keys else _window.key_interval
    columns = math.prod(column_box)
    tiling = _tiling.count(
        axes, interval, row_tile, column_box, math.prod(row_tile), columns
    )
    expected = _brute_force(axes, rows_are_keys, row_tile, column_box, columns)
    assert (tiling.tiles, tiling.boxes, tiling.masked_boxes) == expected
    assert tiling.visited_pairs == tiling.boxes * math.prod(row_tile) * columns


@given(_axes(2, 12), st.booleans())
@settings(max_examples=20, deadline=None)
def test_choice_is_the_cheapest(axes: Any, rows_are_keys: bool) -> None:
    """No pair of boxes at all is cheaper, also none that could be enlarged."""
    rows, columns = 8, 6
    model = _tiling.CostModel()
    plan = (
        _tiling.plan_rows_are_keys if rows_are_keys else _tiling.plan_rows_are_queries
    )
    interval = _window.query_interval if rows_are_keys else _window.key_interval
    chosen = plan(axes, ((rows, columns),), model)

    def boxes(limit: int) -> list[tuple[int, ...]]:
        pairs = itertools.product(range(1, limit + 1), repeat=2)
        return [pair for pair in pairs if math.prod(pair) <= limit]

    least = min(
        model.cost(_tiling.count(axes, interval, row_tile, box, rows, columns))
        for row_tile in boxes(rows)
        for box in boxes(columns)
    )
    # A smaller box can be cheaper by needing no mask where a larger one does, or, where
    # windows hold one key, as all that so many rows see just fills a box.
    one_key = any(axis.kernel_size == 1 for axis in axes)
    assert model.cost(chosen) <= least * (1.35 if one_key else 1.25)


@pytest.mark.parametrize("rows_are_keys", [False, True])
@pytest.mark.parametrize("kernel_size", [(7, 7), (5, 11), (3, 5, 4)])
def test_blocks_are_tiles(kernel_size: tuple[int, ...], rows_are_keys: bool) -> None:
    """With strides as long as the window no tile straddles two blocks."""
    plan = (
        _tiling.plan_rows_are_keys if rows_are_keys else _tiling.plan_rows_are_queries
    )
    axes = tuple(_tiling.Axis(6 * k, k, k, 1, False) for k in kernel_size)
    tiling = plan(axes, ((64, 64),))
    assert tiling.row_tile == kernel_size
    assert tiling.boxes == tiling.tiles == 6 ** len(kernel_size)


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [8, 32, 40, 64, 96, 128, 136, 192, 256])
def test_plans_fit_the_kernels(channels: int, element: str) -> None:
    """The limits of ``cuda/fused/variants.h``."""
    padded = next(n for n in (32, 64, 96, 128, 192, 256) if channels <= n)
    size = 4 if element == "float32" else 2
    row_bytes = padded * size
    few = 64 if row_bytes <= 512 else 32
    columns = 64 if row_bytes <= 384 else 32 if row_bytes <= 768 else 16
    forward_rows = few * (2 if size == 2 and padded <= 128 else 1)
    dquery_rows = few * (2 if size == 2 and 64 < padded <= 128 else 1)
    limits = {
        "forward": {forward_rows: few, few: few},
        "dquery": {dquery_rows: 32, few: columns},
        "dbias": {64: 64} if row_bytes <= 256 else {32: 32 if row_bytes <= 512 else 16},
        "dkey": {few: 32 if (size, padded) == (2, 128) else columns},
    }
    for grid, kernel_size in (
        ((37,), (9,)),
        ((20, 31), (7, 5)),
        ((5, 9, 8), (3, 3, 5)),
    ):
        operand = jax.ShapeDtypeStruct((2, *grid, 4, channels), element)
        problem: Any = None

        def canonical(operand: Any, kernel_size: Any = kernel_size) -> Any:
            nonlocal problem
            problem, operands = _ops.canonical_call(
                len(kernel_size),
                operand,
                operand,
                operand,
                kernel_size,
                rel_pos_bias=jnp.zeros((4, *(2 * k - 1 for k in kernel_size))),
            )
            return operands

        operands = jax.eval_shape(canonical, operand)
        plan = _plan.make_plan("fused", "cuda", problem, operands)
        assert plan is not None
        for name, columns_of in limits.items():
            tiling = getattr(plan, name)
            assert math.prod(tiling.row_tile) <= tiling.rows
            assert math.prod(tiling.column_box) <= tiling.columns
            assert tiling.columns == columns_of[tiling.rows]


def test_known_plans() -> None:
    """The least work there is for boxes of 64, found by exhaustive search elsewhere."""
    axis = _tiling.Axis(128, 33, 1, 1, False)
    tiling = _tiling.plan_rows_are_queries((axis, axis), ((64, 64),))
    assert tiling.visited_pairs / (128 * 33) ** 2 == pytest.approx(1.47, abs=0.005)
    axes = tuple(
        _tiling.Axis(length, k, s, 1, False)
        for length, k, s in zip((30, 48, 80), (18, 24, 24), (16, 8, 8), strict=True)
    )
    tiling = _tiling.plan_rows_are_queries(axes, ((64, 64), (128, 64)))
    assert tiling.masked_boxes == 0
    assert tiling.visited_pairs == math.prod(a.length * a.kernel_size for a in axes)


@pytest.mark.usefixtures("every_kernel")
def test_pieces_of_a_grid() -> None:
    """A query beside a cache of keys: boxes of columns are those of a long grid."""
    query = jax.ShapeDtypeStruct((2, 1, 4, 64), "bfloat16")
    cache = jax.ShapeDtypeStruct((2, 4096, 4, 64), "bfloat16")
    frame = jax_na.Frame(jnp.array([5000]), query_origin=jnp.array([3000]))
    plan = jax_na.explain(
        query, cache, cache, (512,), is_causal=True, frame=frame, platform="cuda"
    ).plan
    assert plan is not None and not isinstance(plan.hopper_forward, str)
    assert plan.forward.row_tile == plan.dkey.column_box == (1,)
    assert plan.forward.column_box == plan.dkey.row_tile == (64,)
    tiling = plan.hopper_forward["forward"]
    assert tiling.row_box == (1,)
    assert tiling.column_box == (tiling.kernel.columns,)


def test_kernels_without_a_plan() -> None:
    assert _plan.make_plan("naive", "cuda", None, None) is None  # type: ignore[arg-type]
    assert _plan.make_plan("fused", "cpu", None, None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_scratch_memory(batch: tuple[int, ...]) -> None:
    """Of the backward pass: partial sums of an odd number of biases, then vectors.

    And a counter of tiles where kernels for Hopper make gradients on both sides.
    """
    query = jax.ShapeDtypeStruct((*batch, 30, 3, 64), "bfloat16")
    more = jax.ShapeDtypeStruct((*batch, 5, 3, 64), "bfloat16")
    problem: Any = None

    def canonical(query: Any, more: Any) -> Any:
        nonlocal problem
        problem, operands = _ops.canonical_call(
            1,
            query,
            query,
            query,
            (7,),
            rel_pos_bias=jnp.zeros((3, 13)),
            additional_keys=more,
            additional_values=more,
        )
        return operands

    operands = jax.eval_shape(canonical, query, more)
    plan = _plan.make_plan("fused", "cuda", problem, operands)
    assert plan is not None
    assert not isinstance(plan.hopper_backward, str)
    plan = dataclasses.replace(plan, bias_splits=5, additional_splits=7)
    every = ("query", "key", "value", "bias", "additional_key", "additional_value")
    bias, additional, counter = 5 * 13 + 3, 7 * 5 * 2 * 64, 4  # in vectors of four
    samples = math.prod(batch)
    for wrt, expected in (
        (every, bias + samples * (additional + counter)),
        (("bias",), bias),
        (("additional_key",), samples * additional // 2),
        (("query", "value"), samples * counter),
        (("query",), None),
        (("key", "value"), None),
    ):
        shape = _plan.workspace_shape(plan, problem, operands, wrt, True)
        found = None if shape is None else math.prod(shape) // 3
        assert found == expected


# ---- Unfused products ----------------------------------------------------------------


@given(
    st.integers(1, 3).flatmap(lambda rank: _axes(rank, 20)), st.sampled_from([56, 112])
)
@settings(max_examples=40, deadline=None)
def test_tiles_of_keys_fit_an_image(axes: Any, most_spanned: int) -> None:
    """Wherever a window lies, its slots from a tile's first key to the last are few."""
    tile = _unfused_lowering._row_tile(axes, 64, most_spanned)
    assert math.prod(tile) <= 64
    kernel_size = tuple(axis.kernel_size for axis in axes)
    most = 0
    for starts in itertools.product(
        *(range(1 - k, extent) for k, extent in zip(kernel_size, tile, strict=True))
    ):
        bounds = [
            (max(0, start) - start, min(extent, start + k) - 1 - start)
            for start, k, extent in zip(starts, kernel_size, tile, strict=True)
        ]
        first, last = (np.ravel_multi_index(at, kernel_size) for at in zip(*bounds))
        most = max(most, int(last - first) + 1)
    assert most == _unfused_lowering._spanned(axes, tile) <= most_spanned


@pytest.mark.parametrize(
    ("length", "kernel_size", "tile"),
    [(64, 13, (8, 8)), (128, 33, (8, 8)), (256, 3, (8, 8))],
)
def test_tiles_of_queries_are_compact(
    length: int, kernel_size: int, tile: tuple[int, ...]
) -> None:
    axes = (_tiling.Axis(length, kernel_size, 1, 1, False),) * 2
    assert _unfused_lowering._row_tile(axes, 64, None) == tile
