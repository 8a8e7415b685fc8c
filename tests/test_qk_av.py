"""Unfused neighborhood attention: scores, and weighted sums of values."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from problems import (
    CHOSEN,
    DIFFERENTIABLE,
    FrameSpec,
    ProblemSpec,
    chosen_dtypes,
    make_arrays,
    platform,
)
from tolerance import assert_close, assert_results_close

import jax_na
from jax_na import _gemm, _ops, _reference, _support

SPECS = (
    ProblemSpec("1-D", (13,), (4,), stride=2, dilation=2, bias=True, head_dim=16),
    ProblemSpec("causal", (9,), (4,), is_causal=True, batch=(), heads=1),
    ProblemSpec(
        "2-D",
        (6, 9),
        (3, 4),
        dilation=(1, 2),
        stride=(2, 1),
        is_causal=(True, False),
        batch=(2, 1),
        heads=4,
        key_heads=2,
        head_dim=24,
        value_dim=8,
        bias=True,
    ),
    ProblemSpec("3-D", (3, 4, 5), (2, 3, 3), heads=2, key_heads=1, bias=True),
    ProblemSpec("k=1", (3, 4), (1, 1), scale=-0.3),
    ProblemSpec("empty batch", (3, 4), (3, 3), batch=(0,), bias=True),
    ProblemSpec(
        "shard",
        (5, 6),
        (3, 3),
        dilation=(2, 1),
        key_grid=(9, 8),
        frame=FrameSpec((14, 12), (4, 0), (2, -1)),
        bias=True,
    ),
    ProblemSpec(
        "lengths",
        (7,),
        (5,),
        batch=(3,),
        frame=FrameSpec(((7,), (3,), (0,))),
        bias=True,
    ),
)
pytestmark = pytest.mark.usefixtures("quick_compile")

each_spec = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
#: What computes the products here, best first.
IMPLEMENTATIONS = tuple(
    name
    for name in _support.IMPLEMENTATIONS
    if _support.refusal(name, platform(), function="pair") is None
)
each_implementation_and_dtype = pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(name, dtype) for name in IMPLEMENTATIONS for dtype in chosen_dtypes(name)],
)


def _wide(dtype: str) -> contextlib.AbstractContextManager[None]:
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _window(spec: ProblemSpec) -> dict[str, Any]:
    return {n: v for n, v in spec.static_arguments().items() if n != "scale"}


def _frame(spec: ProblemSpec) -> jax_na.Frame | None:
    return None if spec.frame is None else jax_na.Frame(**spec.frame.arrays())


def _qk(
    spec: ProblemSpec, inputs: dict[str, Any], implementation: Any = None
) -> jax.Array:
    return jax_na.na_qk(
        **inputs,
        **spec.static_arguments(),
        frame=_frame(spec),
        precision="highest",
        implementation=implementation,
    )


def _av(
    spec: ProblemSpec, inputs: dict[str, Any], implementation: Any = None
) -> jax.Array:
    return jax_na.na_av(
        **inputs,
        **_window(spec),
        frame=_frame(spec),
        precision="highest",
        implementation=implementation,
    )


def _qk_inputs(spec: ProblemSpec, dtype: str, poison: bool = True) -> dict[str, Any]:
    inputs = make_arrays(spec, dtype, poison=poison).inputs
    return {n: a for n, a in inputs.items() if n != "value"}


def _slots(spec: ProblemSpec) -> tuple[int, ...]:
    return (*spec.shapes()["lse"], math.prod(spec.kernel_size))


def _empty_slots(spec: ProblemSpec) -> np.ndarray:
    """Which slots no key fills: bool, in the shape of the scores."""
    shapes = spec.shapes()
    scores = _reference.qk(
        np.zeros(shapes["query"]),
        np.zeros(shapes["key"]),
        **spec.static_arguments(),
        frame=spec.frame,
    )
    return np.isneginf(scores["scores"].value)


def _av_inputs(spec: ProblemSpec, dtype: str) -> dict[str, Any]:
    """Weights hold NaN in slots that no key fills."""
    weights = np.random.default_rng(5).standard_normal(_slots(spec))
    weights = np.where(_empty_slots(spec), np.nan, weights).astype(jnp.dtype(dtype))
    return {"weights": weights, "value": make_arrays(spec, dtype).inputs["value"]}


@each_spec
@each_implementation_and_dtype
def test_qk(spec: ProblemSpec, implementation: str, dtype: str) -> None:
    inputs = _qk_inputs(spec, dtype)
    with _wide(dtype):
        scores, vjp = jax.vjp(jax.jit(lambda x: _qk(spec, x, implementation)), inputs)
        # NaN where no key fills the slot: it must not matter.
        dscores = np.random.default_rng(7).standard_normal(_slots(spec))
        dscores = np.where(_empty_slots(spec), np.nan, dscores).astype(scores.dtype)
        (gradients,) = vjp(dscores)
    expected = _reference.qk(
        **inputs, **spec.static_arguments(), frame=spec.frame, dscores=dscores
    )
    results = {"scores": scores, **gradients}
    assert_results_close(results, expected, dtype, f"{spec}")


@each_spec
@each_implementation_and_dtype
def test_av(spec: ProblemSpec, implementation: str, dtype: str) -> None:
    inputs = _av_inputs(spec, dtype)
    dout = make_arrays(spec, dtype, seed=1).dout
    with _wide(dtype):
        out, vjp = jax.vjp(jax.jit(lambda x: _av(spec, x, implementation)), inputs)
        (gradients,) = vjp(dout)
    assert out.dtype == dout.dtype
    expected = _reference.av(**inputs, **_window(spec), frame=spec.frame, dout=dout)
    results = {"out": out, **gradients}
    assert_results_close(results, expected, dtype, f"{spec}")


@each_spec
def test_unfused_is_fused(spec: ProblemSpec) -> None:
    """softmax over the slots of qk, then av, is attention."""
    spec = dataclasses.replace(spec, frame=None, key_grid=None, dilation=1)
    arrays = make_arrays(spec, "float32")
    inputs = dict(arrays.inputs)
    value = inputs.pop("value")
    weights = jax.nn.softmax(_qk(spec, inputs), axis=-1)
    out = _av(spec, {"weights": weights, "value": value})
    assert_close(out, *arrays.oracle()["out"], "float32", "out")


def test_second_order() -> None:
    spec = next(spec for spec in SPECS if spec.name == "shard")
    spec = dataclasses.replace(spec, heads=2, key_heads=1, head_dim=2, value_dim=2)
    empty = _empty_slots(spec)
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, _qk_inputs(spec, "float64", poison=False))
        qk = jax.jit(lambda inputs: jnp.where(empty, 0.0, _qk(spec, inputs)))
        check_grads(qk, (inputs,), order=2, modes=("fwd", "rev"))
        generator = np.random.default_rng(5)
        inputs = {
            "weights": jnp.asarray(generator.standard_normal(_slots(spec))),
            "value": jnp.asarray(generator.standard_normal(spec.shapes()["value"])),
        }
        av = jax.jit(lambda inputs: _av(spec, inputs))
        check_grads(av, (inputs,), order=2, modes=("fwd", "rev"))


@each_spec
def test_slots_are_keys_in_order(spec: ProblemSpec) -> None:
    """Slot j of an axis is the j-th key of the window, the last axis fastest."""
    spec = dataclasses.replace(spec, heads=1, key_heads=1, scale=1.0, bias=False)
    spec = dataclasses.replace(spec, head_dim=1, value_dim=len(spec.grid))
    key_grid = spec.key_grid or spec.grid
    coordinates = np.stack(np.meshgrid(*map(np.arange, key_grid), indexing="ij"), -1)
    value = np.broadcast_to(
        coordinates[..., None, :], (*spec.batch, *key_grid, 1, len(key_grid))
    ).astype(np.float32)
    names = ("stride", "dilation", "is_causal")
    window = list(
        zip(
            spec.kernel_size,
            *(np.broadcast_to(getattr(spec, name), len(spec.grid)) for name in names),
            strict=True,
        )
    )
    frame = spec.frame or FrameSpec(spec.grid)
    length, query_origin, key_origin = (
        np.broadcast_to(field, (*spec.batch, len(spec.grid)))
        for field in (frame.length, frame.query_origin, frame.key_origin)
    )
    slots = math.prod(spec.kernel_size)
    for slot in range(slots):
        weights = np.zeros((*spec.batch, *spec.grid, 1, slots), np.float32)
        weights[..., slot] = 1.0
        out = np.asarray(_av(spec, {"weights": weights, "value": value}))
        expected = np.zeros_like(out)
        per_axis = np.unravel_index(slot, spec.kernel_size)
        for sample in np.ndindex(*spec.batch):
            for position in np.ndindex(*spec.grid):
                key = []
                for axis, parameters in enumerate(window):
                    keys = _reference.visible_keys(
                        int(position[axis] + query_origin[sample][axis]),
                        int(length[sample][axis]),
                        *parameters,
                    )
                    if per_axis[axis] < len(keys):
                        local = keys[per_axis[axis]] - key_origin[sample][axis]
                        if 0 <= local < key_grid[axis]:
                            key.append(local)
                if len(key) == len(spec.grid):
                    expected[sample][position] = key
        np.testing.assert_allclose(out, expected, atol=1e-6, err_msg=f"slot {slot}")


@pytest.mark.parametrize("name", ["2-D", "lengths"])
def test_per_example_gradients(name: str) -> None:
    """vmap of grad, also over an unmapped bias and a mapped frame, is one by one."""
    spec = next(spec for spec in SPECS if spec.name == name)
    arrays = make_arrays(spec, "float32", poison=False).inputs
    mapped = {n: jnp.asarray(arrays[n]) for n in ("query", "key")}
    bias = jnp.asarray(arrays["rel_pos_bias"])
    static = dict(spec.static_arguments(), precision="highest")

    def loss(mapped: dict[str, Any], bias: jax.Array, length: Any) -> jax.Array:
        frame = None if length is None else jax_na.Frame(length)
        scores = jax_na.na_qk(**mapped, rel_pos_bias=bias, frame=frame, **static)
        return jnp.sum(jnp.where(scores == -jnp.inf, 0.0, jnp.sin(scores)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    length = None if spec.frame is None else jnp.asarray(spec.frame.length)
    actual = jax.vmap(gradient, in_axes=(0, None, 0))(mapped, bias, length)
    examples = [
        gradient({n: a[i] for n, a in mapped.items()}, bias, one)
        for i in range(spec.batch[0])
        for one in [None if length is None else length[i]]
    ]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *examples)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("function", [_qk, _av])
def test_implementation_that_cannot_run(function: Any) -> None:
    spec = SPECS[1]
    inputs = (_qk_inputs if function is _qk else _av_inputs)(spec, "float32")
    with pytest.raises(NotImplementedError, match="'fused' never holds the scores"):
        function(spec, inputs, "fused")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        function(spec, inputs, "fast")
    for name in {"gemm", "naive"} - set(IMPLEMENTATIONS):
        with pytest.raises(NotImplementedError, match=f"'{name}'.*these can: 'xla'"):
            function(spec, inputs, name)


# ---- Attention as a composition of products -------------------------------------------

COMPOSED = (
    "stride, dilation",
    "causal, all",
    "video",
    "40, 24",
    "empty batch",
    "two batch axes",
    "many additional",
    "large scores, additional",
    "last shard, dilation",
    "class shorter than the window",
    "nothing visible but additional keys",
    "queries partly before the grid",
)


@pytest.mark.parametrize("spec", [spec for spec in CHOSEN if spec.name in COMPOSED])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_composed_attention(spec: ProblemSpec, dtype: str) -> None:
    """'gemm', whichever implementation its products have."""
    arrays = make_arrays(spec, dtype)
    implementation = next(
        name for name in reversed(IMPLEMENTATIONS) if name in ("naive", "xla")
    )

    @jax.jit
    def evaluate(inputs: Any, dout: Any, dlse: Any) -> dict[str, jax.Array]:
        static = spec.static_arguments()
        problem, operands = _ops.canonical_call(
            len(spec.grid),
            **inputs,
            **static,
            frame=_frame(spec),
            precision="highest",
        )
        names = {
            name: argument
            for name, argument in zip(operands._fields, DIFFERENTIABLE)
            if argument in inputs
        }
        out, lse = _gemm.forward(operands, problem, implementation)
        gradients = _gemm.backward(
            operands, problem, out, lse, dout, dlse, frozenset(names), implementation
        )
        return {
            "out": out,
            "lse": lse,
            **{
                names[name]: array.reshape(inputs[names[name]].shape)
                for name, array in gradients.items()
            },
        }

    with _wide(dtype):
        results = evaluate(arrays.inputs, arrays.dout, arrays.dlse)
        results = jax.tree.map(np.asarray, results)
    assert_results_close(results, arrays.oracle(), dtype, f"{spec}")
