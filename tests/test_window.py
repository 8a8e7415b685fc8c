"""The window, in Python and in C++: worked cases, and properties by brute force."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_na
from jax_na import _cpu, _reference, _window

DATA = pathlib.Path(__file__).parent / "data"


def _load(name: str) -> list[dict[str, Any]]:
    return json.loads((DATA / name).read_text())


def _framed(case: dict[str, Any]) -> dict[str, Any]:
    """A case without a frame has arrays that are the whole grid."""
    whole = {"query_origin": 0, "key_origin": 0}
    whole |= {"query_length": case["length"], "key_length": case["length"]}
    return whole | case


CASES = [*_load("window_vectors.json"), *map(_framed, _load("frame_vectors.json"))]
CASES = [_framed(case) for case in CASES]
IDS = [case["name"] for case in CASES]


def _window_of(case: dict[str, Any]) -> dict[str, Any]:
    return {n: case[n] for n in ("kernel_size", "stride", "dilation", "is_causal")}


def _global(case: dict[str, Any], side: str) -> np.ndarray:
    return np.arange(case[f"{side}_length"]) + case[f"{side}_origin"]


def _attended_in_python(case: dict[str, Any]) -> list[list[int]]:
    """Local keys of every local query, from the interval."""
    result = []
    for query in _global(case, "query").tolist():
        keys = []
        if 0 <= query < case["length"]:
            residue, lo, hi = _window.key_interval(
                query, case["length"], **_window_of(case)
            )
            keys = [residue + case["dilation"] * j for j in range(lo, hi)]
        local = [key - case["key_origin"] for key in keys]
        result.append([key for key in local if 0 <= key < case["key_length"]])
    return result


def _attended_by_in_python(case: dict[str, Any]) -> list[list[int]]:
    """Local queries of every local key, from the interval."""
    result = []
    for key in _global(case, "key").tolist():
        queries = []
        if 0 <= key < case["length"]:
            residue, q0, q1 = _window.query_interval(
                key, case["length"], **_window_of(case)
            )
            queries = [residue + case["dilation"] * p for p in range(q0, q1)]
        local = [query - case["query_origin"] for query in queries]
        result.append([query for query in local if 0 <= query < case["query_length"]])
    return result


def _native_ranges(case: dict[str, Any], side: str) -> list[tuple[int, int, int]]:
    """(first, count, bias_row) of every local query's keys or key's queries."""
    function = {"query": _cpu.keys_of_query, "key": _cpu.queries_of_key}[side]
    arguments = [
        case[name]
        for name in (
            "kernel_size",
            "stride",
            "dilation",
            "is_causal",
            "length",
            "query_origin",
            "query_length",
            "key_origin",
            "key_length",
        )
    ]
    return [tuple(function(*arguments, i)) for i in range(case[f"{side}_length"])]


def _indices(case: dict[str, Any], ranges: list[tuple[int, int, int]]) -> list[Any]:
    d = case["dilation"]
    return [[first + d * t for t in range(count)] for first, count, _ in ranges]


def _brute_force(case: dict[str, Any]) -> np.ndarray:
    """Visibility bool ``[queries, keys]`` from the oracle's own statement."""
    mask = np.zeros((case["query_length"], case["key_length"]), bool)
    for row, query in enumerate(_global(case, "query").tolist()):
        for key in _reference.visible_keys(query, case["length"], **_window_of(case)):
            if 0 <= key - case["key_origin"] < case["key_length"]:
                mask[row, key - case["key_origin"]] = True
    return mask


def _rows(mask: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in mask]


# ---- Worked cases --------------------------------------------------------------------


def test_worked_cases_are_all_there() -> None:
    assert len(_load("window_vectors.json")) == 21
    assert len(_load("frame_vectors.json")) == 19


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_worked_case_in_python(case: dict[str, Any]) -> None:
    assert _attended_in_python(case) == case["attended"]
    assert _attended_by_in_python(case) == case["attended_by"]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_worked_case_in_oracle(case: dict[str, Any]) -> None:
    assert _rows(_brute_force(case)) == case["attended"]
    assert _rows(_brute_force(case).T) == case["attended_by"]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_worked_case_in_cpp(case: dict[str, Any]) -> None:
    assert _indices(case, _native_ranges(case, "query")) == case["attended"]
    assert _indices(case, _native_ranges(case, "key")) == case["attended_by"]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_worked_case_visibility(case: dict[str, Any]) -> None:
    queries, keys = _global(case, "query")[:, None], _global(case, "key")
    mask = _window.axis_visibility(queries, keys, case["length"], **_window_of(case))
    assert _rows(mask) == case["attended"]

    traced = jax.jit(
        lambda queries, keys, length: _window.axis_visibility(
            queries, keys, length, **_window_of(case)
        )
    )(jnp.asarray(queries), jnp.asarray(keys), jnp.int32(case["length"]))
    np.testing.assert_array_equal(traced, mask)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_worked_case_traced_intervals(case: dict[str, Any]) -> None:
    inside = np.arange(case["length"])
    for function in (_window.key_interval, _window.query_interval):
        expected = function(inside, case["length"], **_window_of(case))
        traced = jax.jit(
            lambda index, length, f=function: f(index, length, **_window_of(case))
        )(jnp.asarray(inside), jnp.int32(case["length"]))
        for value, reference in zip(traced, expected, strict=True):
            np.testing.assert_array_equal(value, reference)


# ---- Properties ----------------------------------------------------------------------


@st.composite
def _random_cases(draw: Any, framed: bool) -> dict[str, Any]:
    kernel_size = draw(st.integers(1, 12))
    case = {
        "kernel_size": kernel_size,
        "stride": draw(st.integers(1, kernel_size)),
        "dilation": draw(st.integers(1, 5)),
        "is_causal": draw(st.booleans()),
    }
    if not framed:
        shortest = kernel_size * case["dilation"]
        return _framed(case | {"length": shortest + draw(st.integers(0, 40))})
    return case | {
        "length": draw(st.integers(0, 60)),
        "query_origin": draw(st.integers(-9, 60)),
        "query_length": draw(st.integers(1, 30)),
        "key_origin": draw(st.integers(-9, 60)),
        "key_length": draw(st.integers(1, 30)),
    }


any_case = st.one_of(_random_cases(framed=False), _random_cases(framed=True))


@given(any_case)
@settings(max_examples=300, deadline=None)
def test_intervals_are_exact_inverses(case: dict[str, Any]) -> None:
    mask = _brute_force(case)
    assert _attended_in_python(case) == _rows(mask)
    assert _attended_by_in_python(case) == _rows(mask.T)
    visible = _window.axis_visibility(
        _global(case, "query")[:, None],
        _global(case, "key"),
        case["length"],
        **_window_of(case),
    )
    np.testing.assert_array_equal(visible, mask)


@given(any_case)
@settings(max_examples=300, deadline=None)
def test_cpp_intervals_are_exact_inverses(case: dict[str, Any]) -> None:
    mask = _brute_force(case)
    assert _indices(case, _native_ranges(case, "query")) == _rows(mask)
    assert _indices(case, _native_ranges(case, "key")) == _rows(mask.T)


@given(any_case)
@settings(max_examples=200, deadline=None)
def test_bias_rows(case: dict[str, Any]) -> None:
    queries, keys = _global(case, "query")[:, None], _global(case, "key")
    k, d = case["kernel_size"], case["dilation"]
    rows = _window.bias_row(queries, keys, k, d)
    mask = _brute_force(case)
    assert ((rows >= 0) & (rows <= 2 * k - 2))[mask].all()
    # A query's own row is the middle one, and a step of one key is a step of one row.
    assert (rows == k - 1)[queries == keys].all()
    assert (rows - k + 1 == (keys - queries) / d)[mask].all()
    for query, (first, count, row) in enumerate(_native_ranges(case, "query")):
        expected = [rows[query, first + d * t] for t in range(count)]
        assert [row + t for t in range(count)] == expected
    for key, (first, count, row) in enumerate(_native_ranges(case, "key")):
        expected = [rows[first + d * t, key] for t in range(count)]
        assert [row - t for t in range(count)] == expected


@given(_random_cases(framed=False))
@settings(max_examples=200, deadline=None)
def test_whole_grid(case: dict[str, Any]) -> None:
    """What the definition promises where the arrays are the whole grid."""
    mask = _brute_force(case)
    assert mask.diagonal().all(), "every query sees itself"
    if case["is_causal"]:
        assert not np.triu(mask, 1).any()
    else:
        assert (mask.sum(axis=1) == case["kernel_size"]).all()
    if case["stride"] == 1 and not case["is_causal"] and case["kernel_size"] % 2:
        _assert_nearest(mask, case["dilation"])


def _assert_nearest(mask: np.ndarray, dilation: int) -> None:
    """No key of the class that is hidden is nearer than one that is seen."""
    index = np.arange(len(mask))
    distance = np.abs(index[:, None] - index)
    same_class = (index[:, None] - index) % dilation == 0
    farthest = np.where(mask, distance, 0).max(axis=1, initial=0)
    nearest = np.where(~mask & same_class, distance, len(mask)).min(axis=1)
    assert (nearest >= farthest).all()


def test_inverse_of_every_small_window() -> None:
    """All windows of small grids, whole or with classes shorter than the window."""
    for length, k, d, causal in itertools.product(
        range(1, 15), range(1, 8), range(1, 4), (False, True)
    ):
        for s in range(1, k + 1):
            window = {"kernel_size": k, "stride": s, "dilation": d, "is_causal": causal}
            case = _framed(window | {"length": length})
            mask = _brute_force(case)
            index = np.arange(length)
            residue, lo, hi = _window.key_interval(index, length, **window)
            position, same = index // d, index % d == residue[:, None]
            forward = same & (position >= lo[:, None]) & (position < hi[:, None])
            np.testing.assert_array_equal(forward, mask, err_msg=str(case))
            residue, q0, q1 = _window.query_interval(index, length, **window)
            same = index[:, None] % d == residue
            inverse = same & (position[:, None] >= q0) & (position[:, None] < q1)
            np.testing.assert_array_equal(inverse, mask, err_msg=str(case))


# ---- The public mask -----------------------------------------------------------------


def _expected_mask(
    query_grid: Any,
    key_grid: Any,
    length: Any,
    query_origin: Any,
    key_origin: Any,
    window: dict[str, Any],
) -> np.ndarray:
    """bool ``[*query_grid, *key_grid]`` of one sample."""
    rank = len(query_grid)
    mask = np.ones((*query_grid, *key_grid), bool)
    for axis in range(rank):
        case = {n: v[axis] for n, v in window.items()} | {
            "length": length[axis],
            "query_origin": query_origin[axis],
            "query_length": query_grid[axis],
            "key_origin": key_origin[axis],
            "key_length": key_grid[axis],
        }
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = query_grid[axis], key_grid[axis]
        mask &= _brute_force(case).reshape(shape)
    return mask


WINDOW_2D = {
    "kernel_size": (3, 4),
    "stride": (2, 1),
    "dilation": (1, 2),
    "is_causal": (True, False),
}


def test_window_mask() -> None:
    grid = (5, 9)
    expected = _expected_mask(grid, grid, grid, (0, 0), (0, 0), WINDOW_2D)
    mask = jax_na.window_mask(grid, **WINDOW_2D)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)
