"""The planner of the kernels for Hopper: what it counts, what it chooses, its table."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import force_tier

from jax_na import _ops, _plan, _reference, _tiling_sm90, _window
from jax_na._tiling import Axis
from jax_na._tiling_sm90 import ROWS, CostModel, Kernel, Tiling

SOURCES = Path(__file__).parents[1] / "cuda" / "sm90"


# ---- Counts --------------------------------------------------------------------------


def _axis_tiles(
    axis: Axis, rows_are_keys: bool, extent: int, box: int, groups: int
) -> Iterator[tuple[int, list[list[np.ndarray]]]]:
    """For every tile of an axis: how many boxes it brings, and the boxes of its groups.

    A box is bool ``[rows, columns]``, what the rows of the group see of it; empty if the
    group does not visit it.
    """
    mask = np.zeros((axis.length, axis.length), bool)
    window = (axis.kernel_size, axis.stride, axis.dilation, axis.is_causal)
    for query in range(axis.length):
        mask[query, list(_reference.visible_keys(query, axis.length, *window))] = True
    mask = mask.T if rows_are_keys else mask
    for residue in range(min(axis.dilation, axis.length)):
        tokens = np.arange(residue, axis.length, axis.dilation)
        of_class = mask[np.ix_(tokens, tokens)]
        for start in range(0, len(tokens), extent * groups):
            rows = of_class[start : start + extent * groups]
            seen = np.flatnonzero(rows.any(axis=0))
            starts = range(seen[0], seen[-1] + 1, box)
            end = seen[-1] + 1
            parts = []
            for first in range(0, len(rows), extent):
                own = rows[first : first + extent]
                boxes = [own[:, at : min(at + box, end)] for at in starts]
                visited = [i for i, b in enumerate(boxes) if b.any()]
                parts.append(boxes[visited[0] : visited[-1] + 1])
            yield len(starts), parts


def _brute_force(
    axes: tuple[Axis, ...],
    rows_are_keys: bool,
    kernel: Kernel,
    row_box: tuple[int, ...],
    column_box: tuple[int, ...],
) -> tuple[int, int, int, int]:
    per_axis = [
        list(_axis_tiles(axis, rows_are_keys, extent, box, groups))
        for axis, extent, box, groups in zip(
            axes, row_box, column_box, (kernel.groups, 1, 1)
        )
    ]
    tiles = loads = visits = masked = 0
    for tile in itertools.product(*per_axis):
        tiles += 1
        loads += math.prod(count for count, _ in tile)
        for boxes in itertools.product(*(parts for _, parts in tile)):
            for parts in itertools.product(*boxes):
                visits += 1
                full = all(part.all() for part in parts)
                size = math.prod(part.shape[1] for part in parts)
                masked += not (full and size == kernel.columns)
    return tiles, loads, visits, masked


@st.composite
def _problems(draw: Any) -> Any:
    rank = draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        kernel_size = draw(st.integers(1, 7))
        dilation = draw(st.integers(1, 3))
        length = kernel_size * dilation + draw(
            st.integers(0, {1: 40, 2: 12, 3: 4}[rank])
        )
        stride = draw(st.integers(1, kernel_size))
        axes.append(Axis(length, kernel_size, stride, dilation, draw(st.booleans())))
    boxes = st.tuples(*(st.integers(1, 6) for _ in axes))
    row_box, column_box = draw(boxes), draw(boxes)
    columns = math.prod(column_box) + draw(st.sampled_from([0, 0, 1]))
    kernel = Kernel(columns, draw(st.integers(1, 3)), 100)
    return tuple(axes), draw(st.booleans()), kernel, row_box, column_box


@given(_problems())
@settings(max_examples=150, deadline=None)
def test_counts_are_exact(problem: Any) -> None:
    axes, rows_are_keys, kernel, row_box, column_box = problem
    interval = _window.query_interval if rows_are_keys else _window.key_interval
    tiling = _tiling_sm90.count(axes, interval, kernel, row_box, column_box)
    counts = (tiling.tiles, tiling.loads, tiling.visits, tiling.masked_visits)
    expected = _brute_force(axes, rows_are_keys, kernel, row_box, column_box)
    assert counts == expected
    assert tiling.visited_pairs == tiling.visits * 64 * kernel.columns


# ---- Choice --------------------------------------------------------------------------


def _cost(tiling: Tiling, copies: int | None) -> float:
    model = CostModel()
    cost = model.cycles(tiling)
    if copies is not None:
        cost *= model.imbalance(tiling.kernel, tiling.tiles * copies)
    return cost


@pytest.mark.parametrize("copies", [None, 1000])
@pytest.mark.parametrize(
    "axes",
    [
        (Axis(40, 9, 1, 1, False), Axis(30, 5, 3, 1, True)),
        (Axis(50, 7, 1, 2, False), Axis(64, 21, 1, 1, False)),
        (Axis(300, 60, 4, 1, True),),
    ],
)
def test_choice_is_the_cheapest(axes: tuple[Axis, ...], copies: int | None) -> None:
    """Of all kernels and boxes, those that could be enlarged included."""
    kernels = (Kernel(16, 1, 600), Kernel(24, 2, 700))
    chosen = _tiling_sm90.plan_rows_are_queries(axes, kernels, copies)

    def boxes(limit: int) -> Iterator[tuple[int, ...]]:
        for box in itertools.product(range(1, limit + 1), repeat=len(axes)):
            if math.prod(box) <= limit:
                yield box

    least = min(
        _cost(_tiling_sm90.count(axes, _window.key_interval, *candidate), copies)
        for kernel in kernels
        for candidate in itertools.product([kernel], boxes(ROWS), boxes(kernel.columns))
    )
    # A smaller box can be cheaper only by needing no mask where a larger one does.
    assert least <= _cost(chosen, copies) <= least * 1.1


def _plan_of(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    channels: int = 64,
    dtype: str = "bfloat16",
    batch: tuple[Any, ...] = (2,),
    **window: Any,
) -> _plan.Plan:
    operand = jax.ShapeDtypeStruct((*batch, *grid, 4, channels), dtype)
    problem: Any = None

    def canonical(operand: Any) -> Any:
        nonlocal problem
        problem, operands = _ops.canonical_call(
            len(grid), operand, operand, operand, kernel_size, **window
        )
        return operands

    operands = jax.eval_shape(canonical, operand)
    plan = _plan.make_plan("fused", "cuda", problem, operands)
    assert plan is not None
    return plan


@st.composite
def _calls(draw: Any) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    grid, kernel_size, stride, dilation = [], [], [], []
    for _ in range(rank):
        dilation.append(draw(st.integers(1, 8)))
        kernel_size.append(draw(st.integers(1, 40 // rank)))
        stride.append(draw(st.integers(1, kernel_size[-1])))
        grid.append(kernel_size[-1] * dilation[-1] + draw(st.integers(0, 300 // rank)))
    return {
        "grid": tuple(grid),
        "kernel_size": tuple(kernel_size),
        "channels": 8 * draw(st.integers(1, 32)),
        "dtype": draw(st.sampled_from(["float16", "bfloat16"])),
        "batch": draw(st.sampled_from([(), (1,), (3, 70)])),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": tuple(draw(st.booleans()) for _ in grid),
    }


@given(_calls())
@settings(max_examples=60, deadline=None)
def test_plans_fit_the_kernels(call: dict[str, Any]) -> None:
    """What ``cuda/sm90/forward.cu`` refuses is not planned."""
    hopper = _plan_of(**call).hopper
    if isinstance(hopper, str):
        assert "times as long" in hopper
        return
    tiling = hopper.forward
    assert math.prod(tiling.row_box) <= ROWS
    assert math.prod(tiling.column_box) <= tiling.kernel.columns
    assert tiling.kernel in _tiling_sm90.FORWARD[_tiling_sm90.padded(call["channels"])]
    for box in (tiling.row_box, tiling.column_box):
        for extent, dilation in zip(box, call["dilation"], strict=True):
            assert (extent - 1) * dilation + 1 <= 256


def test_plans_of_symbolic_batches() -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    many = _plan_of((64, 64), (13, 13), batch=(1000,))
    assert _plan_of((64, 64), (13, 13), batch=(batch,)).hopper == many.hopper


def test_calls_without_a_plan() -> None:
    def refusal(**call: Any) -> str:
        hopper = _plan_of((600,), (9,), **call).hopper
        assert isinstance(hopper, str)
        return hopper

    assert "float32" in refusal(dtype="float32")
    assert "dilations up to 8, got 9" in refusal(dilation=9)
    # A box of one axis and dilation 8 holds 32 tokens, half of what it might.
    assert "times as long" in refusal(dilation=8)


def test_tiers_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    force_tier(monkeypatch, "portable")
    assert isinstance(_plan_of((64,), (9,)).hopper, str)
    monkeypatch.undo()
    force_tier(monkeypatch, "hopper")
    assert isinstance(_plan_of((600,), (9,), dilation=8).hopper, _plan.HopperPlan)
    assert isinstance(_plan_of((600,), (9,), dilation=9).hopper, str)


# ---- The other side ------------------------------------------------------------------


def test_table_is_that_of_the_kernels() -> None:
    header = (SOURCES / "variants.h").read_text()
    found = {
        int(dim): [
            tuple(map(int, pair)) for pair in re.findall(r"{(\d+), (\d+)}", variants)
        ]
        for dim, variants in re.findall(
            r"struct Forward<(\d+)> {\s*static constexpr Variant kVariants\[\] = {(.*?)};",
            header,
            re.DOTALL,
        )
    }
    table = {
        dim: [(kernel.columns, kernel.groups) for kernel in kernels]
        for dim, kernels in _tiling_sm90.FORWARD.items()
    }
    assert found == table


def test_limits_are_those_of_the_kernels() -> None:
    source = (SOURCES / "tensor_map.cc").read_text()
    assert f"kMostElements = {_tiling_sm90.MOST_SPANNED};" in source
    assert f"kLargestStride = {_tiling_sm90.LARGEST_DILATION};" in source
    assert f"kGroupRows = {ROWS};" in (SOURCES / "wgmma.cuh").read_text()
