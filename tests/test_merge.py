"""Exact merging of partial attentions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attention
from derivatives import second_order
from problems import (
    Arrays,
    FrameSpec,
    ProblemSpec,
    implementations,
    make_arrays,
)
from tolerance import assert_close, assert_results_close, assert_trees_close

import jax_na

pytestmark = pytest.mark.usefixtures("quick_compile")

each_implementation = pytest.mark.parametrize("implementation", implementations())

WHOLE = ProblemSpec(
    "whole",
    (7, 8),
    (3, 5),
    dilation=(2, 1),
    stride=(1, 2),
    heads=4,
    key_heads=2,
    head_dim=16,
    bias=True,
    additional=3,
)
INPUTS = (
    "query",
    "key",
    "value",
    "rel_pos_bias",
    "additional_keys",
    "additional_values",
)


def _split(arrays: Arrays, implementation: str | None, pieces: int) -> Any:
    """The call in pieces: rows of keys by frames, and additional keys on their own.

    A piece's frame names the whole grid, so every window is as in the whole call and
    keys that a piece lacks are invisible to it.
    """
    spec = arrays.spec
    bounds = np.linspace(0, spec.grid[0], pieces + 1).astype(int)

    def attend(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        query, key, value, bias, additional_keys, additional_values = inputs
        parts = []
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            extra = {}
            if index == 1:
                extra = {
                    "additional_keys": additional_keys,
                    "additional_values": additional_values,
                }
            parts.append(
                jax_na.na2d(
                    query,
                    key[:, start:stop],
                    value[:, start:stop],
                    **spec.static_arguments(),
                    rel_pos_bias=bias,
                    frame=jax_na.Frame(spec.grid, 0, (int(start), 0)),
                    return_lse=True,
                    precision="highest",
                    implementation=implementation,
                    **extra,
                )
            )
        outputs, lses = zip(*parts, strict=True)
        return jax_na.merge_attentions(outputs, lses)

    return attend


@each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_keys_give_the_whole(implementation: str, dtype: str) -> None:
    """Forward, and every gradient through the merge, with a cotangent of its lse."""
    arrays = make_arrays(WHOLE, dtype)
    attend = _split(arrays, implementation, 3)

    @jax.jit
    def evaluate(inputs: Any, dout: Any, dlse: Any) -> dict[str, jax.Array]:
        (out, lse), vjp = jax.vjp(attend, *inputs)
        gradients = dict(zip(INPUTS, vjp((dout, dlse)), strict=True))
        return {"out": out, "lse": lse, **gradients}

    inputs = [arrays.inputs[name] for name in INPUTS]
    results = evaluate(inputs, arrays.dout, arrays.dlse)
    assert results["out"].dtype == jnp.dtype(dtype)
    assert results["lse"].dtype == jnp.float32
    assert_results_close(results, arrays.oracle(), dtype, implementation)


def test_second_order() -> None:
    spec = dataclasses.replace(WHOLE, grid=(4, 5), kernel_size=(2, 3), head_dim=2)
    arrays = make_arrays(spec, "float64")
    inputs = {name: arrays.inputs[name] for name in INPUTS}
    window = spec.static_arguments()
    assert window.pop("scale") is None

    def attend(implementation: str | None, inputs: dict[str, jax.Array]) -> Any:
        if implementation == "dense":
            return dense_attention(**inputs, **window)
        split = _split(arrays, implementation, 2)
        return split(*(inputs[name] for name in INPUTS))

    with jax.enable_x64(True):
        expected, *results = (
            second_order(functools.partial(attend, implementation), inputs)
            for implementation in ("dense", None, "xla")
        )
        for result in results:
            assert_trees_close(result, expected, 1e-10)


def _numbers(parts: int, dtype: Any = np.float32) -> tuple[list[Any], list[Any]]:
    generator = np.random.default_rng(3)
    outputs = [generator.standard_normal((5, 2, 4)).astype(dtype) for _ in range(parts)]
    lses = [generator.standard_normal((5, 2)).astype(np.float32) for _ in range(parts)]
    return outputs, lses


def _merged(outputs: list[Any], lses: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float64."""
    weights = [np.exp(np.asarray(lse, np.float64)) for lse in lses]
    total = np.sum(weights, axis=0)
    safe = np.where(total > 0, total, 1.0)
    out = sum(
        np.where(w > 0, w / safe, 0.0)[..., None] * np.asarray(o, np.float64)
        for w, o in zip(weights, outputs)
    )
    with np.errstate(divide="ignore"):
        return out, np.log(total)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_definition(parts: int) -> None:
    outputs, lses = _numbers(parts)
    out, lse = jax_na.merge_attentions(outputs, lses)
    expected_out, expected_lse = _merged(outputs, lses)
    assert_close(out, expected_out, np.abs(expected_out), "float32", "out")
    assert_close(lse, expected_lse, np.abs(expected_lse), "float32", "lse")


def test_stacked_arrays_are_sequences() -> None:
    outputs, lses = _numbers(3)
    expected = jax_na.merge_attentions(outputs, lses)
    stacked = jax_na.merge_attentions(jnp.stack(outputs), jnp.stack(lses))
    for array, other in zip(stacked, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_empty_parts_change_nothing() -> None:
    """A part with lse = -inf has weight zero, whatever its output holds."""
    outputs, lses = _numbers(2)
    expected = jax_na.merge_attentions(outputs, lses)
    nothing = np.full_like(lses[0], -np.inf)
    for filler in (0.0, 7.0):
        out, lse = jax_na.merge_attentions(
            [outputs[0], np.full_like(outputs[0], filler), outputs[1]],
            [lses[0], nothing, lses[1]],
        )
        np.testing.assert_allclose(out, expected[0], rtol=1e-6)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-6)


def test_large_lses_do_not_overflow() -> None:
    outputs, lses = _numbers(2)
    expected = jax_na.merge_attentions(outputs, lses)
    for shift in (300.0, -300.0):
        out, lse = jax_na.merge_attentions(outputs, [x + shift for x in lses])
        np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lse, expected[1] + shift, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_all_parts_empty(parts: int) -> None:
    """(0, -inf), with zero gradients in both modes, next to rows that are not empty."""
    outputs, lses = _numbers(parts)
    for output, lse in zip(outputs, lses):
        output[2:4], lse[2:4] = 0.0, -np.inf
    (out, lse), vjp = jax.vjp(jax_na.merge_attentions, outputs, lses)
    assert not np.asarray(out[2:4]).any()
    assert np.isneginf(np.asarray(lse[2:4])).all()
    doutputs, dlses = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    for gradient in (*doutputs, *dlses):
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient[2:4]).any()
    ones = jax.tree.map(jnp.ones_like, (outputs, lses))
    _, (tout, tlse) = jax.jvp(jax_na.merge_attentions, (outputs, lses), ones)
    assert np.isfinite(tout).all() and np.isfinite(tlse).all()
    live = np.r_[0:2, 4]
    expected = jax.vjp(
        jax_na.merge_attentions, [o[live] for o in outputs], [x[live] for x in lses]
    )[1]((jnp.ones_like(out[live]), jnp.ones_like(lse[live])))
    for gradient, other in zip(
        jax.tree.leaves((doutputs, dlses)), jax.tree.leaves(expected)
    ):
        np.testing.assert_allclose(gradient[live], other, rtol=1e-6, atol=1e-7)


def test_second_order_next_to_empty_rows() -> None:
    outputs, lses = _numbers(2)
    for output, lse in zip(outputs, lses):
        output[2:4], lse[2:4] = 0.0, -np.inf

    def loss(outputs: Any, lses: Any) -> jax.Array:
        out, lse = jax_na.merge_attentions(outputs, lses)
        return (out**2).sum() + (jnp.where(jnp.isfinite(lse), lse, 0.0) ** 2).sum()

    for mode in (jax.jacfwd, jax.jacrev):
        second = jax.jit(mode(jax.grad(loss, argnums=(0, 1)), argnums=(0, 1)))(
            outputs, lses
        )
        for block in jax.tree.leaves(second):
            assert np.isfinite(block).all()


@each_implementation
def test_parts_that_see_nothing(implementation: str) -> None:
    """Attention that sees no key anywhere merges to (0, -inf) with zero gradients."""
    spec = ProblemSpec("empty", (6,), (3,), frame=FrameSpec(0))
    arrays = make_arrays(spec, "float32", poison=False)

    @jax.jit
    def evaluate(inputs: Any, dout: Any, dlse: Any) -> Any:
        def attend(inputs: Any) -> Any:
            part = jax_na.na1d(
                **inputs,
                **spec.static_arguments(),
                frame=jax_na.Frame(0),
                return_lse=True,
                implementation=implementation,
            )
            outputs, lses = zip(part, part, strict=True)
            return jax_na.merge_attentions(outputs, lses)

        results, vjp = jax.vjp(attend, inputs)
        return results, vjp((dout, dlse))[0]

    (out, lse), gradients = evaluate(arrays.inputs, arrays.dout, arrays.dlse)
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape), err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        outputs, lses = _numbers(3, jnp.dtype(dtype))
        if dtype == "float64":
            lses = [lse.astype(np.float64) for lse in lses]
        out, lse = jax_na.merge_attentions(outputs, lses)
        assert out.dtype == jnp.dtype(dtype)
        assert lse.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        expected_out, expected_lse = _merged(outputs, lses)
        assert_close(out, expected_out, np.abs(expected_out), dtype, "out")
        tolerance = "float64" if dtype == "float64" else "float32"
        assert_close(lse, expected_lse, np.abs(expected_lse), tolerance, "lse")
