"""The oracle itself: against sums written out one by one, and against differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from problems import CHOSEN, FrameSpec, ProblemSpec, make_arrays, specs
from tolerance import assert_close

from jax_na import _reference

SPECS = {spec.name: spec for spec in CHOSEN}

SMALL = (
    ProblemSpec(
        "everything",
        (3, 4),
        (2, 3),
        stride=(2, 1),
        is_causal=(False, True),
        batch=(2,),
        heads=4,
        key_heads=2,
        head_dim=3,
        value_dim=2,
        bias=True,
        additional=2,
    ),
    ProblemSpec(
        "framed",
        (4,),
        (3,),
        dilation=2,
        batch=(2,),
        heads=2,
        key_heads=1,
        head_dim=2,
        bias=True,
        additional=1,
        key_grid=(7,),
        frame=FrameSpec(((9,), (3,)), ((3,), (-1,)), ((-1,), (0,))),
    ),
    ProblemSpec("3-D", (2, 3, 2), (2, 3, 1), batch=(), heads=1, head_dim=2, bias=True),
    ProblemSpec("empty rows", (4,), (2,), frame=FrameSpec(2), bias=True, head_dim=2),
)
NAMES = [spec.name for spec in SMALL]


def _one_by_one(spec: ProblemSpec, inputs: dict[str, np.ndarray]) -> Any:
    """out and lse by Python loops over samples, queries, heads and visible keys."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    bias = inputs.get("rel_pos_bias")
    rank = len(spec.grid)
    per_axis = [
        (v,) * rank if isinstance(v, int) else v
        for v in (spec.stride, spec.dilation, spec.is_causal)
    ]
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    group = query.shape[-2] // key.shape[-2]
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    lse = np.full(query.shape[:-1], -np.inf)
    frame = spec.frame or FrameSpec(spec.grid)
    length, query_origin, key_origin = (
        np.broadcast_to(field, (*spec.batch, rank))
        for field in (frame.length, frame.query_origin, frame.key_origin)
    )
    for sample in np.ndindex(*spec.batch):
        for position in np.ndindex(*spec.grid):
            index = np.add(position, query_origin[sample]).tolist()
            if any(not 0 <= i < n for i, n in zip(index, length[sample])):
                continue
            axes = [
                _reference.visible_keys(i, int(n), k, s, d, c)
                for i, n, k, s, d, c in zip(
                    index, length[sample], spec.kernel_size, *per_axis, strict=True
                )
            ]
            for head in range(query.shape[-2]):
                q = query[sample][position][head]
                scores, values = [], []
                for other in itertools.product(*axes):
                    local = tuple(np.subtract(other, key_origin[sample]).tolist())
                    if any(
                        not 0 <= x < n for x, n in zip(local, key.shape[-rank - 2 : -2])
                    ):
                        continue
                    score = scale * q @ key[sample][local][head // group]
                    if bias is not None:
                        row = tuple(
                            j // d - i // d + k - 1
                            for i, j, d, k in zip(
                                index, other, per_axis[1], spec.kernel_size
                            )
                        )
                        score += bias[head][row]
                    scores.append(score)
                    values.append(value[sample][local][head // group])
                for m in range(spec.additional):
                    extra = inputs["additional_keys"][sample][m][head // group]
                    scores.append(scale * q @ extra)
                    values.append(inputs["additional_values"][sample][m][head // group])
                if scores:
                    total = sum(math.exp(score) for score in scores)
                    terms = [math.exp(s) * v for s, v in zip(scores, values)]
                    out[sample][position][head] = sum(terms) / total
                    lse[sample][position][head] = math.log(total)
    return out, lse


@pytest.mark.parametrize("spec", SMALL, ids=NAMES)
def test_forward_one_by_one(spec: ProblemSpec) -> None:
    arrays = make_arrays(spec, "float64", poison=False)
    out, lse = _one_by_one(spec, arrays.inputs)
    results = arrays.oracle()
    np.testing.assert_allclose(results["out"].value, out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(results["lse"].value, lse, rtol=1e-13, atol=1e-13)


@given(specs())
@settings(max_examples=25, deadline=None)
def test_random_forward_one_by_one(spec: ProblemSpec) -> None:
    spec = dataclasses.replace(
        spec,
        grid=tuple(min(n, 9) for n in spec.grid),
        head_dim=2,
        value_dim=1,
        amplitude=1.0,
        frame=spec.frame or FrameSpec(tuple(min(n, 9) for n in spec.grid)),
    )
    arrays = make_arrays(spec, "float64", poison=False)
    out, lse = _one_by_one(spec, arrays.inputs)
    results = arrays.oracle()
    np.testing.assert_allclose(results["out"].value, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(results["lse"].value, lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", SMALL, ids=NAMES)
def test_gradients_against_differences(spec: ProblemSpec) -> None:
    """Every element of every gradient against a central difference."""
    arrays = make_arrays(spec, "float64", poison=False)
    results = arrays.oracle()
    dlse = np.zeros(()) if arrays.dlse is None else arrays.dlse

    def loss(inputs: dict[str, np.ndarray]) -> float:
        out, lse = _reference.attention(
            **inputs, **spec.static_arguments(), frame=spec.frame
        )
        terms = np.where(np.isfinite(lse), lse, 0.0) * dlse
        return float((out * arrays.dout).sum() + terms.sum())

    step = 1e-5
    for name, array in arrays.inputs.items():
        numeric = np.zeros_like(array)
        for index in np.ndindex(*array.shape):
            values = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                values.append(loss(arrays.inputs | {name: moved}))
            numeric[index] = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(
            results[name].value, numeric, rtol=1e-6, atol=1e-8, err_msg=name
        )


@pytest.mark.parametrize("spec", CHOSEN, ids=list(SPECS))
def test_magnitudes_bound_results(spec: ProblemSpec) -> None:
    arrays = make_arrays(spec, "float32")
    shapes = spec.shapes()
    results = arrays.oracle()
    assert set(results) == set(shapes)
    for name, (value, magnitude) in results.items():
        assert value.shape == magnitude.shape == shapes[name]
        finite = np.isfinite(value)
        assert name == "lse" or finite.all(), name
        assert (np.abs(value) <= magnitude * (1 + 1e-12) + 1e-300)[finite].all(), name


def test_bias_with_batch_axes() -> None:
    """A bias per sample, and one of size 1, whose gradient sums over the batch."""
    spec = ProblemSpec("bias", (5,), (3,), batch=(2, 3), bias=True)
    arrays = make_arrays(spec, "float64")
    table = arrays.inputs["rel_pos_bias"]
    base = arrays.oracle()["rel_pos_bias"].value
    for shape in ((1, 1), (1, 3), (2, 1), (2, 3)):
        bias = np.broadcast_to(table, (*shape, *table.shape))
        expanded = dataclasses.replace(
            arrays, inputs=arrays.inputs | {"rel_pos_bias": bias}
        )
        gradient = expanded.oracle()["rel_pos_bias"].value
        assert gradient.shape == bias.shape
        np.testing.assert_allclose(gradient.sum(axis=(0, 1)), base, rtol=1e-12)


@pytest.mark.parametrize("name", ["video", "a length per sample", "long, dilation"])
def test_chosen_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen rows, and small chunks, give what the whole problem gives."""
    spec = SPECS[name]
    arrays = make_arrays(spec, "float32")
    whole = arrays.oracle()
    monkeypatch.setattr(_reference, "_CHUNK", 16)
    for result, again in zip(whole.values(), arrays.oracle().values(), strict=True):
        for before, after in zip(result, again):
            np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-13)
    generator = np.random.default_rng(0)
    chosen = np.stack([generator.integers(0, size, 40) for size in spec.grid], axis=1)
    chosen = np.unique(chosen, axis=0)
    arguments = {
        **arrays.inputs,
        **spec.static_arguments(),
        "frame": spec.frame,
        "dout": arrays.dout,
        "dlse": arrays.dlse,
    }
    rows = _reference.query_rows(**arguments, queries=chosen)
    rows |= _reference.key_rows(**arguments, keys=chosen)
    index = (*(slice(None) for _ in spec.batch), *chosen.T)
    assert set(rows) == {"out", "lse", "query", "key", "value"}
    for name, (value, magnitude) in rows.items():
        for row, full in (
            (value, whole[name].value),
            (magnitude, whole[name].magnitude),
        ):
            np.testing.assert_allclose(row, full[index], rtol=1e-10, atol=1e-13)


def test_full_window_is_dense_attention() -> None:
    spec = SPECS["global"]
    arrays = make_arrays(spec, "float64")
    query, key, value = (
        arrays.inputs[name].reshape(2, 30, -1, 8) for name in ("query", "key", "value")
    )
    score = np.einsum("bqhd,bkd->bhqk", query, key[:, :, 0]) * 8**-0.5
    weight = np.exp(score)
    out = np.einsum(
        "bhqk,bkd->bqhd", weight / weight.sum(-1, keepdims=True), value[:, :, 0]
    )
    np.testing.assert_allclose(
        arrays.oracle()["out"].value.reshape(out.shape), out, rtol=1e-12
    )


@pytest.mark.parametrize("spec", SMALL, ids=NAMES)
def test_unfused_gives_attention(spec: ProblemSpec) -> None:
    """softmax(qk) av is attention, without additional keys."""
    spec = dataclasses.replace(spec, additional=0)
    arrays = make_arrays(spec, "float64", poison=False)
    window = {n: v for n, v in spec.static_arguments().items() if n != "scale"}
    inputs = dict(arrays.inputs)
    value = inputs.pop("value")
    scores = _reference.qk(**inputs, **window, frame=spec.frame)["scores"].value
    sees = np.isfinite(scores).any(axis=-1, keepdims=True)
    weights = np.exp(scores)
    weights = weights / np.where(sees, weights.sum(axis=-1, keepdims=True), 1.0)
    out = _reference.av(weights, value, **window, frame=spec.frame)["out"].value
    np.testing.assert_allclose(
        out, arrays.oracle()["out"].value, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("spec", SMALL, ids=NAMES)
def test_unfused_gradients_against_differences(spec: ProblemSpec) -> None:
    spec = dataclasses.replace(spec, additional=0)
    inputs = make_arrays(spec, "float64", poison=False).inputs
    window = {n: v for n, v in spec.static_arguments().items() if n != "scale"}
    window["frame"] = spec.frame
    generator = np.random.default_rng(1)
    slots = (*inputs["query"].shape[:-1], math.prod(spec.kernel_size))
    weights, dscores = generator.standard_normal((2, *slots))
    out_shape = spec.shapes()["out"]
    dout = generator.standard_normal(out_shape)
    value = inputs.pop("value")

    def qk_loss(arrays: dict[str, np.ndarray]) -> float:
        scores = _reference.qk(**arrays, **window)["scores"].value
        return float((np.where(np.isfinite(scores), scores, 0.0) * dscores).sum())

    def av_loss(arrays: dict[str, np.ndarray]) -> float:
        return float((_reference.av(**arrays, **window)["out"].value * dout).sum())

    cases = (
        (qk_loss, inputs, _reference.qk(**inputs, **window, dscores=dscores)),
        (
            av_loss,
            {"weights": weights, "value": value},
            _reference.av(weights, value, **window, dout=dout),
        ),
    )
    for loss, arrays, results in cases:
        for name, array in arrays.items():
            direction = generator.standard_normal(array.shape)
            ahead = loss(arrays | {name: array + 1e-4 * direction})
            behind = loss(arrays | {name: array - 1e-4 * direction})
            slope = (results[name].value * direction).sum()
            np.testing.assert_allclose(
                (ahead - behind) / 2e-4, slope, rtol=1e-7, atol=1e-8
            )


# ---- The tolerance itself ------------------------------------------------------------


def test_tolerance_accepts_rounding_and_rejects_errors() -> None:
    generator = np.random.default_rng(0)
    expected = 1e-3 * generator.standard_normal(1000)
    size = np.abs(expected)
    rounded = expected.astype(np.float32)
    assert_close(rounded, expected, size, "float32", "x")
    for wrong in (
        np.zeros(1000),
        rounded * (1 + 1e-4),
        np.where(np.arange(1000) == 7, 1.2e-3 * np.abs(expected).max(), rounded),
        np.where(np.arange(1000) == 7, np.nan, rounded),
        np.where(np.arange(1000) == 7, -np.inf, rounded),
        rounded[:-1],
    ):
        with pytest.raises(AssertionError, match="^x "):
            assert_close(wrong, expected, size, "float32", "x")


def test_tolerance_of_infinite_and_zero_results() -> None:
    expected = np.array([-np.inf, 1.0])
    assert_close(expected, expected, np.abs(expected), "float32", "lse")
    for wrong in ([0.0, 1.0], [np.nan, 1.0], [np.inf, 1.0], [-1e30, 1.0]):
        with pytest.raises(AssertionError, match="^lse "):
            assert_close(np.array(wrong), expected, np.abs(expected), "float32", "lse")
    # An exactly zero gradient: rounding of terms that cancel passes, a term does not.
    zero, terms = np.zeros(10), np.ones(10)
    assert_close(np.full(10, 5e-8), zero, terms, "float32", "gradient")
    with pytest.raises(AssertionError, match="^gradient "):
        assert_close(np.full(10, 1e-6), zero, terms, "float32", "gradient")
    with pytest.raises(AssertionError, match="^gradient "):
        assert_close(np.full(10, 1e-30), zero, zero, "float32", "gradient")
