"""The planner of the kernels for Hopper: what it counts, what it chooses, its table."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import force_tier

from jax_na import _ops, _plan, _reference, _tiling_sm90, _window
from jax_na._tiling import Axis
from jax_na._tiling_sm90 import (
    DKEY_DVALUE,
    DQUERY,
    FORWARD,
    GRADIENTS,
    ROWS,
    Kernel,
    Pass,
    Tiling,
)

ROOT = Path(__file__).parents[1]
SOURCES, BENCHMARKS = ROOT / "cuda" / "sm90", ROOT / "benchmarks"


# ---- Counts --------------------------------------------------------------------------


def _axis_tiles(
    axis: Axis,
    rows_are_keys: bool,
    extent: int,
    box: int,
    groups: int,
    together: bool,
) -> Iterator[tuple[int, list[list[np.ndarray]]]]:
    """For every tile of an axis: how many boxes it brings, and the boxes of its groups.

    A box is bool ``[rows, columns]``, what the rows of the group see of it; empty if the
    group does not visit it. With ``together`` every group visits all of them.
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
                if together:
                    visited = [0, len(boxes) - 1]
                parts.append(boxes[visited[0] : visited[-1] + 1])
            if together:  # a warpgroup without rows takes part
                empty = [np.zeros((1, b.shape[1]), bool) for b in parts[0]]
                parts += [empty] * (groups - len(parts))
            yield len(starts), parts


def _brute_force(
    axes: tuple[Axis, ...],
    rows_are_keys: bool,
    kernel: Kernel,
    row_box: tuple[int, ...],
    column_box: tuple[int, ...],
) -> tuple[int, int, int, int]:
    per_axis = [
        list(
            _axis_tiles(
                axis, rows_are_keys, extent, box, groups, kernel.together and groups > 1
            )
        )
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
    groups, together = draw(st.integers(1, 3)), draw(st.booleans())
    kernel = Kernel(columns, groups, 1, 100, together=together)
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


@pytest.mark.parametrize(
    ("kernel_size", "stride", "column_box", "expected"),
    [
        (13, 1, (4, 20), True),
        (13, 1, (3, 26), True),  # and an entry for the columns that are missing
        (13, 1, (2, 31), False),  # too many coordinates
        (13, 8, (4, 20), False),  # 27 columns, or two boxes
        (25, 1, (10, 8), False),  # 32 columns, or four boxes
        (25, 1, (16, 4), True),
        (26, 1, (16, 4), False),
    ],
)
def test_masks_by_product(
    kernel_size: int, stride: int, column_box: tuple[int, ...], expected: bool
) -> None:
    axes = (Axis(64, kernel_size, stride, 1, False),) * 2
    kernel = Kernel(80, 1, 3, 700)
    for product_cycles in (None, 600):
        kernel = dataclasses.replace(kernel, product_cycles=product_cycles)
        tiling = _tiling_sm90.count(axes, FORWARD.interval, kernel, (8, 8), column_box)
        assert tiling.masks_by_product == (expected and product_cycles is not None)
        visit = kernel.product_cycles if tiling.masks_by_product else kernel.cycles
        assert FORWARD.cycles_of(tiling, None) >= tiling.visits * visit
    wide = dataclasses.replace(kernel, most_seen=64)
    tiling = _tiling_sm90.count(axes, FORWARD.interval, wide, (8, 8), column_box)
    assert tiling.masks_by_product == (sum(column_box) <= 32)
    selecting = _tiling_sm90.count(
        axes, FORWARD.interval, kernel, (8, 8), column_box, masks_by_product=False
    )
    assert not selecting.masks_by_product


@pytest.mark.parametrize(
    ("product_cycles", "has_bias", "wherever_possible"),
    [(600, False, True), (1500, False, False), (1500, True, True)],
)
def test_masks_are_products_where_that_is_cheaper_or_for_a_bias(
    product_cycles: int, has_bias: bool, wherever_possible: bool
) -> None:
    kernel = Kernel(80, 1, 3, 700, product_cycles=product_cycles)
    axes = (Axis(64, 13, 1, 1, False),) * 2
    best = _tiling_sm90.best_tilings(FORWARD, kernel, axes, 128, 1, has_bias, most=300)
    possible = 0
    for _, tiling in best:
        boxes = (tiling.row_box, tiling.column_box)
        can = _tiling_sm90.count(axes, FORWARD.interval, kernel, *boxes)
        possible += can.masks_by_product
        expected = wherever_possible and can.masks_by_product
        assert tiling.masks_by_product == expected
    assert possible


PASSES = ("hopper_forward", "hopper_backward", "hopper_gradients")

# ---- Choice --------------------------------------------------------------------------


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
    kernels = (Kernel(16, 1, 3, 600), Kernel(24, 2, 1, 700))
    which = dataclasses.replace(FORWARD, kernels={64: kernels})

    def boxes(limit: int) -> Iterator[tuple[int, ...]]:
        for box in itertools.product(range(1, limit + 1), repeat=len(axes)):
            if math.prod(box) <= limit:
                yield box

    def cost(tiling: Tiling) -> float:
        return which.cycles_of(tiling, copies)

    least = min(
        cost(_tiling_sm90.count(axes, which.interval, kernel, *pair))
        for kernel in kernels
        for pair in itertools.product(boxes(ROWS), boxes(kernel.columns))
    )
    # A smaller box can be cheaper only by needing no mask where a larger one does.
    assert least <= cost(_tiling_sm90.plan(which, 64, axes, copies)) <= least * 1.1


def test_heads_of_columns_count() -> None:
    axes = (Axis(300, 31, 1, 1, False),)
    one, four = (_tiling_sm90.plan(DKEY_DVALUE, 64, axes, None, n) for n in (1, 4))
    for count in ("loads", "visits", "masked_visits"):
        assert getattr(four, count) == 4 * getattr(one, count)
    assert four.tiles == one.tiles


def _plan_of(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    channels: int = 64,
    dtype: str = "bfloat16",
    batch: tuple[Any, ...] = (2,),
    group: int = 1,
    has_bias: bool = False,
    **window: Any,
) -> _plan.Plan:
    query = jax.ShapeDtypeStruct((*batch, *grid, 2 * group, channels), dtype)
    key = jax.ShapeDtypeStruct((*batch, *grid, 2, channels), dtype)
    bias = jnp.zeros((2 * group, *(2 * k - 1 for k in kernel_size)))
    problem: Any = None

    def canonical(query: Any, key: Any) -> Any:
        nonlocal problem
        problem, operands = _ops.canonical_call(
            len(grid),
            query,
            key,
            key,
            kernel_size,
            rel_pos_bias=bias if has_bias else None,
            **window,
        )
        return operands

    operands = jax.eval_shape(canonical, query, key)
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
        "group": draw(st.sampled_from([1, 3])),
        "has_bias": draw(st.booleans()),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": tuple(draw(st.booleans()) for _ in grid),
    }


@given(_calls())
@settings(max_examples=60, deadline=None)
def test_plans_fit_the_kernels(call: dict[str, Any]) -> None:
    """What ``cuda/sm90/streams.cu`` refuses is not planned."""
    plan = _plan_of(**call)
    passes = {w.name: w for w in (FORWARD, DQUERY, DKEY_DVALUE, GRADIENTS)}
    planned: dict[str, Tiling] = {}
    for name in PASSES:
        tilings = getattr(plan, name)
        planned |= {} if isinstance(tilings, str) else tilings
    for name, tiling in planned.items():
        which = passes[name]
        tables = call["group"] if which.rows_are_keys else 1
        assert math.prod(tiling.row_box) <= ROWS
        assert math.prod(tiling.column_box) <= tiling.kernel.columns
        assert tiling.kernel in which.kernels[which.padded(call["channels"])]
        for box in (tiling.row_box, tiling.column_box):
            for extent, dilation in zip(box, call["dilation"], strict=True):
                assert (extent - 1) * dilation + 1 <= 256
        bias = tables * math.prod(2 * k - 1 for k in call["kernel_size"])
        if call["has_bias"]:
            assert bias <= _tiling_sm90.LARGEST_BIAS
            assert tiling.column_box[-1] % 2 == 0


def test_plans_of_symbolic_batches() -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    plans = [_plan_of((64, 64), (13, 13), batch=(n,)) for n in (batch, 1000)]
    for name in PASSES:
        assert getattr(plans[0], name) == getattr(plans[1], name)


@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        ({"dtype": "float32"}, "float32", "float32"),
        ({"dilation": 9}, "dilations up to 8, got 9", "got 9"),
        ({"channels": 136}, None, "up to 128, got 136"),
        ({"kernel_size": (385,), "has_bias": True}, "512 entries, got 769", "got 769"),
        ({"kernel_size": (99,), "has_bias": True, "group": 4}, None, "got 788"),
        # A box of one axis and dilation 8 holds 32 tokens, half of what it might.
        ({"dilation": 8}, "times as long", "times as long"),
        ({}, None, None),
    ],
)
def test_calls_without_a_plan(
    call: dict[str, Any], forward: str | None, backward: str | None
) -> None:
    plan = _plan_of(
        **(
            {"grid": (1000,), "kernel_size": (65,), "batch": (99,), "channels": 128}
            | call
        )
    )
    for name, reason in zip(PASSES, (forward, backward, backward), strict=True):
        found = getattr(plan, name)
        if name == "hopper_gradients" and reason is None:
            continue  # either may be faster
        assert isinstance(found, str) == (reason is not None)
        assert reason is None or reason in found


def test_tiers_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    def portable(**window: Any) -> list[bool]:
        plan = _plan_of((1000,), (65,), **window)
        return [isinstance(getattr(plan, name), str) for name in PASSES]

    force_tier(monkeypatch, "portable")
    assert portable() == [True, True, True]
    monkeypatch.undo()
    force_tier(monkeypatch, "hopper")
    assert portable(dilation=8) == [False, False, True]
    assert portable(dilation=9) == [True, True, True]
    monkeypatch.undo()
    force_tier(monkeypatch, "at_once")
    assert portable(dilation=8) == [False, False, False]
    # Its sums have no kernel for heads that are filled up to 96 channels.
    assert portable(channels=80) == [False, False, True]


def test_when_gradients_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    force_tier(monkeypatch, "at_once")
    plan = _plan_of((64, 64), (7, 7))
    every = ("query", "key", "value")
    for wrt, deterministic, at_once in (
        (every, False, True),
        (("query", "value"), False, True),
        (every, True, False),
        (("query",), False, False),
        (("key", "value"), False, False),
    ):
        found = plan.hopper_gradients_of(wrt, deterministic)
        assert ("gradients" in found) == at_once


def test_small_calls_make_gradients_apart() -> None:
    """Where launches take longer than what they do."""
    small, large = (
        _plan_of((56, 56), (7, 7), channels=32, batch=(n,)) for n in (1, 300)
    )
    assert "fewer launches" in small.hopper_gradients
    assert "gradients" in large.hopper_gradients


def test_delta_by_the_way_counts_in_favour_of_gradients_apart() -> None:
    queries, cycles = 1000, _tiling_sm90.cycles_beside_gradients
    assert cycles(queries, 64) == 64 * queries * _tiling_sm90.SUM_CYCLES
    assert cycles(queries, 128) > 2 * cycles(queries, 64)


def test_masks_by_product_of_several_groups() -> None:
    """The boxes of a tile span what all its warpgroups see."""
    axes = (Axis(64, 13, 1, 1, False),) * 2
    for groups, expected in ((1, True), (2, False)):
        kernel = Kernel(64, groups, 1, 100, product_cycles=90)
        tiling = _tiling_sm90.count(axes, FORWARD.interval, kernel, (12, 4), (8, 8))
        assert tiling.masks_by_product == expected


def test_choice_among_measured_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``benchmarks/plans.py`` measured: the estimates order plans well enough."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    plans = importlib.import_module("plans")
    problems = plans.cases.load(BENCHMARKS / "plan_cases.json")
    measurements = plans.load(BENCHMARKS / "plans_h200.jsonl", problems)
    losses = list(plans.losses(measurements).values())
    assert len(losses) >= 27
    assert np.mean(np.array(losses) <= 0.05) >= 0.9
    assert max(losses) <= 0.15


# ---- The other side ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "name"),
    [
        (FORWARD, "Forward"),
        (DQUERY, "DQuery"),
        (DKEY_DVALUE, "DKey"),
        (GRADIENTS, "Gradients"),
    ],
)
def test_tables_are_those_of_the_kernels(which: Pass, name: str) -> None:
    header = (SOURCES / "variants.h").read_text()
    lists = (
        rf"struct {name}<(\d+)> {{\s*static constexpr Variant kList\[\] = {{(.*?)}};"
    )
    found = {
        int(dim): [
            tuple(map(int, numbers.split(", ")))
            for numbers in re.findall(r"{([\d, ]+)}", variants)
        ]
        for dim, variants in re.findall(lists, header, re.DOTALL)
    }
    assert found == {
        dim: [(k.columns, k.groups, k.pipelines) for k in kernels]
        for dim, kernels in which.kernels.items()
    }


def test_limits_are_those_of_the_kernels() -> None:
    for file, constant in (
        ("tensor_map.cc", f"kMostElements = {_tiling_sm90.MOST_SPANNED};"),
        ("tensor_map.cc", f"kLargestStride = {_tiling_sm90.LARGEST_DILATION};"),
        ("wgmma.cuh", f"kGroupRows = {ROWS};"),
        ("variants.h", f"kLargestBias = {_tiling_sm90.LARGEST_BIAS};"),
        ("mask_product.cuh", f"kMaskEntries = {_tiling_sm90.MASK_ENTRIES};"),
        ("mask_product.cuh", "kMostSeen = kDim <= 64 ? 32 : 64;"),
    ):
        assert constant in (SOURCES / file).read_text()
    for which in (FORWARD, DQUERY, DKEY_DVALUE, GRADIENTS):
        for dim, kernels in which.kernels.items():
            most_seen = {k.most_seen for k in kernels if k.product_cycles is not None}
            assert most_seen <= {32 if dim <= 64 else 64}
