"""Every implementation against the float64 oracle: results, gradients, edges.

``JAX_NA_RANDOM_PROBLEMS`` sets the number of random problems (default 60).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attention
from derivatives import second_order
from hypothesis import given, settings
from problems import (
    CHOSEN,
    DIFFERENTIABLE,
    Arrays,
    FrameSpec,
    ProblemSpec,
    SeededChooser,
    chosen_dtypes,
    dtypes,
    implementations,
    make_arrays,
    on_tensor_cores,
    platform,
    random_spec,
    specs,
    visibility,
)
from tolerance import (
    TF32_TOLERANCE,
    assert_close,
    assert_results_close,
    assert_trees_close,
)

import jax_na

pytestmark = pytest.mark.usefixtures("quick_compile")

IMPLEMENTATIONS = implementations()
RANDOM_PROBLEMS = int(os.environ.get("JAX_NA_RANDOM_PROBLEMS", "60"))
SPECS = {spec.name: spec for spec in CHOSEN}

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _attend(
    spec: ProblemSpec,
    implementation: str | None,
    inputs: dict[str, jax.Array],
    frame: dict[str, jax.Array] | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    options = {"precision": "highest"} | options
    return jax_na.neighborhood_attention(
        **inputs,
        **spec.static_arguments(),
        frame=None if frame is None else jax_na.Frame(**frame),
        return_lse=True,
        implementation=implementation,
        **options,
    )


@functools.partial(jax.jit, static_argnames=("spec", "implementation", "options"))
def _evaluate(
    spec: ProblemSpec,
    implementation: str | None,
    options: tuple[tuple[str, Any], ...],
    inputs: dict[str, jax.Array],
    frame: dict[str, jax.Array] | None,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> dict[str, jax.Array]:
    def attend(inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _attend(spec, implementation, inputs, frame, **dict(options))

    if dlse is None:
        out, vjp, lse = jax.vjp(attend, inputs, has_aux=True)
        (gradients,) = vjp(dout)
    else:
        (out, lse), vjp = jax.vjp(attend, inputs)
        (gradients,) = vjp((dout, dlse))
    return {"out": out, "lse": lse, **gradients}


def _wide(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """Where arrays of this dtype can exist."""
    wide = np.dtype(dtype) == "float64"
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _run(
    arrays: Arrays, implementation: str | None, **options: Any
) -> dict[str, np.ndarray]:
    """Every result of the problem, by an implementation."""
    frame = None if arrays.spec.frame is None else arrays.spec.frame.arrays()
    with _wide(arrays.dout.dtype):
        results = _evaluate(
            arrays.spec,
            implementation,
            tuple(options.items()),
            arrays.inputs,
            frame,
            arrays.dout,
            arrays.dlse,
        )
        return jax.tree.map(np.asarray, results)


def _check(arrays: Arrays, implementation: str | None) -> None:
    dtype = arrays.dout.dtype
    results = _run(arrays, implementation)
    accumulation = "float64" if dtype == "float64" else "float32"
    assert results["out"].dtype == dtype
    assert results["lse"].dtype == accumulation
    for name, array in arrays.inputs.items():
        assert results[name].dtype == array.dtype, name
    assert_results_close(
        results,
        arrays.oracle(),
        dtype,
        f"implementation={implementation!r}, {dtype}, {arrays.spec}",
    )


# ---- Against the oracle --------------------------------------------------------------


@pytest.mark.parametrize("spec", CHOSEN, ids=list(SPECS))
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(name, dtype) for name in IMPLEMENTATIONS for dtype in chosen_dtypes(name)],
)
def test_chosen(spec: ProblemSpec, implementation: str, dtype: str) -> None:
    _check(make_arrays(spec, dtype), implementation)


def _taking_turns() -> Iterator[tuple[str, str]]:
    """An implementation and a dtype for each of the random problems."""
    for index in range(RANDOM_PROBLEMS):
        turn, which = divmod(index, len(IMPLEMENTATIONS))
        options = dtypes(IMPLEMENTATIONS[which])
        yield IMPLEMENTATIONS[which], options[turn % len(options)]


@pytest.mark.parametrize(
    ("index", "implementation", "dtype"),
    [(index, *turn) for index, turn in enumerate(_taking_turns())],
)
def test_random(index: int, implementation: str, dtype: str) -> None:
    spec = random_spec(SeededChooser(np.random.default_rng((2403, index))))
    if jnp.finfo(dtype).bits == 16:
        # The gradient of a saturated softmax is a small difference of large numbers, of
        # which the output is one: rounded to 16 bits, it leaves few digits. With few
        # tokens no other gradient covers that; the chosen problems have enough.
        spec = dataclasses.replace(spec, amplitude=min(spec.amplitude, 2.0))
    _check(make_arrays(spec, dtype, seed=index), implementation)


@each_implementation
def test_simplest_failure(implementation: str) -> None:
    """Hypothesis reduces a failing problem to its simplest form."""

    @given(specs())
    @settings(
        max_examples=max(4, RANDOM_PROBLEMS // 20),
        deadline=None,
        derandomize=True,
        database=None,
    )
    def check(spec: ProblemSpec) -> None:
        _check(make_arrays(spec, "float32"), implementation)

    check()


@each_implementation
@pytest.mark.parametrize(("head_dim", "value_dim"), [(5, 3), (1, 17), (33, 100)])
def test_odd_channels(implementation: str, head_dim: int, value_dim: int) -> None:
    if on_tensor_cores(implementation):
        pytest.skip("tensor-core kernels take head dimensions that are multiples of 8")
    spec = ProblemSpec(
        "odd channels",
        (5, 6),
        (3, 4),
        head_dim=head_dim,
        value_dim=value_dim,
        bias=True,
        additional=2,
    )
    for dtype in ("float32", "bfloat16"):
        _check(make_arrays(spec, dtype), implementation)


def test_default_implementation_is_the_best() -> None:
    arrays = make_arrays(SPECS["7x7"], "bfloat16")
    expected = _run(arrays, IMPLEMENTATIONS[0])
    for name, array in _run(arrays, None).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@each_implementation
def test_default_precision(implementation: str) -> None:
    """float32 at default precision may use TF32 tensor cores, on a GPU."""
    arrays = make_arrays(SPECS["large scores"], "float32")
    arrays = make_arrays(dataclasses.replace(arrays.spec, amplitude=1.0), "float32")
    results = _run(arrays, implementation, precision="default")
    tolerance = 1e-5 if platform() == "cpu" else TF32_TOLERANCE
    assert_results_close(results, arrays.oracle(), tolerance, implementation)


@each_implementation
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_named_rank_functions(implementation: str, rank: int) -> None:
    spec = ProblemSpec("rank", (4, 5, 6)[:rank], (3, 2, 3)[:rank], stride=2)
    arrays = make_arrays(spec, "float32")
    function = {1: jax_na.na1d, 2: jax_na.na2d, 3: jax_na.na3d}[rank]
    out = jax.jit(
        lambda inputs: function(
            **inputs,
            **spec.static_arguments(),
            precision="highest",
            implementation=implementation,
        )
    )(arrays.inputs)
    value, magnitude = arrays.oracle()["out"]
    assert_close(out, value, magnitude, "float32", "out")


@each_implementation
def test_eager(implementation: str) -> None:
    arrays = make_arrays(SPECS["video"], "float32")
    out, lse = _attend(arrays.spec, implementation, arrays.inputs, None)
    expected = arrays.oracle()
    assert_close(out, *expected["out"], "float32", "out")
    assert_close(lse, *expected["lse"], "float32", "lse")


@each_implementation
def test_scalars_stand_for_every_axis(implementation: str) -> None:
    """kernel_size may be one integer where the function's name tells the rank."""
    spec = ProblemSpec("scalars", (6, 7), (3, 3), stride=2, dilation=2, is_causal=True)
    arrays = make_arrays(spec, "float32")
    arguments = spec.static_arguments() | {"kernel_size": 3}
    out = jax_na.na2d(
        **arrays.inputs,
        **arguments,
        precision="highest",
        implementation=implementation,
    )
    assert_close(out, *arrays.oracle()["out"], "float32", "out")


@each_implementation
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float16", "float32"])
def test_bias_of_another_dtype(implementation: str, bias_dtype: str) -> None:
    arrays = make_arrays(SPECS["mixed"], "float32")
    bias = arrays.inputs["rel_pos_bias"].astype(jnp.dtype(bias_dtype))
    arrays = dataclasses.replace(arrays, inputs=arrays.inputs | {"rel_pos_bias": bias})
    results, expected = _run(arrays, implementation), arrays.oracle()
    gradient = results.pop("rel_pos_bias")
    assert gradient.dtype == bias.dtype
    assert_close(gradient, *expected.pop("rel_pos_bias"), bias.dtype, "rel_pos_bias")
    assert_results_close(results, expected, "float32", implementation)


# ---- Gradients -----------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_gradient_alone(implementation: str, name: str) -> None:
    """Asking for one gradient gives what asking for all gives."""
    arrays = make_arrays(SPECS["video"], "float32")

    @jax.jit
    def gradient(array: jax.Array) -> jax.Array:
        def attend(array: jax.Array) -> Any:
            inputs = arrays.inputs | {name: array}
            return _attend(arrays.spec, implementation, inputs, None)

        return jax.vjp(attend, array)[1]((arrays.dout, arrays.dlse))[0]

    result = gradient(arrays.inputs[name])
    assert_close(result, *arrays.oracle()[name], "float32", name)


@each_implementation
def test_cotangent_of_lse_alone(implementation: str) -> None:
    arrays = make_arrays(SPECS["video"], "float32")

    @jax.jit
    def gradients(inputs: dict[str, jax.Array]) -> Any:
        def attend(inputs: dict[str, jax.Array]) -> jax.Array:
            return _attend(arrays.spec, implementation, inputs, None)[1]

        return jax.vjp(attend, inputs)[1](arrays.dlse)[0]

    silent = dataclasses.replace(arrays, dout=np.zeros_like(arrays.dout))
    expected = {n: silent.oracle()[n] for n in arrays.inputs}
    assert_results_close(gradients(arrays.inputs), expected, "float32", implementation)


@each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_key(implementation: str, dtype: str) -> None:
    """A query that sees itself alone: its value, and no gradient but the value's."""
    spec = ProblemSpec(
        "k=1", (5, 6), (1, 1), heads=4, key_heads=2, head_dim=64, lse_cotangent=False
    )
    arrays = make_arrays(spec, dtype)
    results, expected = _run(arrays, implementation), arrays.oracle()
    value = np.repeat(arrays.inputs["value"], 2, axis=-2)
    if on_tensor_cores(implementation):  # which add up the parts of a split float32
        np.testing.assert_allclose(results["out"], value, rtol=2**-22)
    else:
        np.testing.assert_array_equal(results["out"], value)
    for name in ("query", "key"):
        assert np.abs(expected[name].value).max() < 1e-13, name
    assert_results_close(results, expected, dtype, implementation)


# What test_composition.py differentiates has no frame, third axis or ragged dilation.
SECOND_ORDER = (
    ProblemSpec("dilation", (7,), (3,), stride=2, dilation=2, batch=(), head_dim=3),
    ProblemSpec(
        "frame",
        (4,),
        (3,),
        dilation=2,
        heads=1,
        head_dim=3,
        bias=True,
        key_grid=(7,),
        frame=FrameSpec(((9,), (3,)), ((3,), (-1,)), ((-1,), (0,))),
    ),
    ProblemSpec("3-D", (2, 3, 2), (2, 3, 1), batch=(), heads=1, head_dim=2, bias=True),
)


@pytest.mark.parametrize("spec", SECOND_ORDER, ids=[s.name for s in SECOND_ORDER])
def test_second_order(spec: ProblemSpec) -> None:
    """Forward and reverse mode over each other, against JAX's of the definition."""
    inputs = make_arrays(spec, "float64", poison=False).inputs
    window = spec.static_arguments()
    assert window.pop("scale") is None

    def attend(implementation: str | None, inputs: dict[str, jax.Array]) -> Any:
        frame = None if spec.frame is None else spec.frame.arrays()
        if implementation == "dense":
            placement = None if frame is None else jax_na.Frame(**frame)
            out, lse = dense_attention(**inputs, **window, frame=placement)
        else:
            out, lse = _attend(spec, implementation, inputs, frame)
        return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

    with jax.enable_x64(True):
        expected, *results = (
            second_order(functools.partial(attend, implementation), inputs)
            for implementation in ("dense", None, "xla")
        )
        for result in results:
            assert_trees_close(result, expected, 1e-10)


# ---- Non-finite values ---------------------------------------------------------------

ISOLATION = ProblemSpec(
    "isolation",
    (7, 9),
    (3, 4),
    stride=(2, 1),
    dilation=(1, 2),
    is_causal=(False, True),
    heads=4,
    key_heads=2,
    head_dim=16,
    additional=2,
)
SAMPLE, TOKEN, KEY_HEAD = 1, 31, 1
isolating = pytest.mark.parametrize(
    "implementation",
    [name for name in IMPLEMENTATIONS if not on_tensor_cores(name)],
)


def _tokens(array: np.ndarray) -> np.ndarray:
    """``[samples, tokens, ...]`` of an array ``[samples, *ISOLATION.grid, ...]``."""
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _spoil(arrays: Arrays, name: str, value: float, head: int) -> Arrays:
    """One bad token, in one sample and head."""
    fields = arrays.inputs | {"dout": arrays.dout, "dlse": arrays.dlse}
    spoiled = fields[name].copy()
    if name.startswith("additional"):
        spoiled[SAMPLE, 1, head] = value
    else:
        _tokens(spoiled)[SAMPLE, TOKEN, head] = value
    fields[name] = spoiled
    dout, dlse = fields.pop("dout"), fields.pop("dlse")
    return Arrays(arrays.spec, fields, dout, dlse)


@isolating
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name",
    ["query", "key", "value", "additional_keys", "additional_values", "dout", "dlse"],
)
def test_isolation(implementation: str, name: str, value: float) -> None:
    """A value that is not finite reaches only what sees it."""
    arrays = make_arrays(ISOLATION, "float32")
    expected = arrays.oracle()
    by_query = name in ("query", "dout", "dlse")
    head = 2 * KEY_HEAD if by_query else KEY_HEAD
    results = _run(_spoil(arrays, name, value, head), implementation)

    # Which queries depend on the bad value, and which keys those see.
    sees = visibility(ISOLATION)[SAMPLE]
    if by_query:
        queries = np.arange(sees.shape[0]) == TOKEN
    elif name.startswith("additional"):
        queries = np.ones(sees.shape[0], bool)
    else:
        queries = sees[:, TOKEN]
    keys = sees[queries].any(axis=0)
    heads = slice(head, head + 1) if by_query else slice(2 * KEY_HEAD, 2 * KEY_HEAD + 2)

    spoiled = {n: np.zeros(array.shape, bool) for n, array in results.items()}
    forward = {
        "key": ("out", "lse"),
        "query": ("out", "lse"),
        "additional_keys": ("out", "lse"),
        "value": ("out",),
        "additional_values": ("out",),
    }.get(name, ())
    # The probabilities, and so the value's gradient, depend on query and key alone.
    backward = {"query", "key", "additional_keys"}
    backward |= (
        {"value", "additional_values"} if name not in ("value", "dlse") else set()
    )
    if name == "additional_values":
        backward -= {"value", "additional_values"}
    for result in (*forward, "query"):
        _tokens(spoiled[result])[SAMPLE, queries, heads] = True
    for result in backward - {"query"}:
        if result.startswith("additional"):
            spoiled[result][SAMPLE, :, KEY_HEAD] = True
        else:
            _tokens(spoiled[result])[SAMPLE, keys, KEY_HEAD] = True
    for result, (exact, magnitude) in expected.items():
        clean = ~spoiled[result]
        assert_close(
            results[result][clean], exact[clean], magnitude[clean], "float32", result
        )
    # And what depends on it does show it.
    if np.isnan(value):
        for result in forward:
            assert np.isnan(results[result][spoiled[result]]).all(), result


# ---- Bits ----------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["7x7", "stride, dilation", "last shard, dilation"])
def test_reruns_are_equal_bit_by_bit(
    implementation: str, dtype: str, name: str
) -> None:
    arrays = make_arrays(SPECS[name], dtype)
    first = _run(arrays, implementation, deterministic_grads=True)
    for _ in range(19):
        again = _run(arrays, implementation, deterministic_grads=True)
        for result, array in first.items():
            assert array.tobytes() == again[result].tobytes(), result


@each_implementation
@pytest.mark.parametrize("name", ["7x7", "last shard, dilation", "empty grid", "video"])
def test_every_element_is_written(implementation: str, name: str) -> None:
    """Results land in buffers full of NaN that the caller donates."""
    spec = SPECS[name]
    arrays = make_arrays(spec, "float32")
    frame = None if spec.frame is None else spec.frame.arrays()
    shapes = spec.shapes()
    poison = {
        n: jnp.full(shapes[n], jnp.nan, jnp.float32)
        for n in ("out", "lse", *arrays.inputs)
    }
    addresses = {n: p.unsafe_buffer_pointer() for n, p in poison.items()}

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def evaluate(poison: Any, inputs: Any, dout: Any, dlse: Any) -> Any:
        del poison
        return _evaluate(spec, implementation, (), inputs, frame, dout, dlse)

    results = evaluate(poison, arrays.inputs, arrays.dout, arrays.dlse)
    reused = [r.unsafe_buffer_pointer() for r in results.values()]
    assert set(reused) <= set(addresses.values()), "donation did not happen"
    assert_results_close(results, arrays.oracle(), "float32", implementation)


# ---- Large arrays --------------------------------------------------------------------


def check_excerpts(implementation: str, dtype: str, tokens: int, heads: int) -> None:
    """A long sequence, checked at its start, middle and end.

    A frame places a short excerpt in the long grid, so that the oracle needs no more
    than the excerpt; its inner tokens have all their keys and observers within it.
    """
    spec = ProblemSpec(
        "excerpt",
        (tokens,),
        (9,),
        stride=3,
        dilation=2,
        batch=(),
        heads=heads,
        head_dim=256,
    )
    names = ("query", "key", "value", "dout")
    shape = spec.shapes()["query"]
    arrays = {
        name: jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))
        for seed, name in enumerate(names)
    }
    dout = arrays.pop("dout")
    results = _evaluate(spec, implementation, (), arrays, None, dout, None)
    margin, size = 40, 160
    for origin in (0, tokens // 2 - 7, tokens - size):
        piece = slice(origin, origin + size)
        excerpt = Arrays(
            dataclasses.replace(
                spec,
                grid=(size,),
                frame=FrameSpec((tokens,), (origin,), (origin,)),
                lse_cotangent=False,
            ),
            {name: np.asarray(array[piece]) for name, array in arrays.items()},
            np.asarray(dout[piece]),
            None,
        )
        inner = slice(
            0 if origin == 0 else margin,
            size if origin + size == tokens else size - margin,
        )
        for name, (value, magnitude) in excerpt.oracle().items():
            assert_close(
                np.asarray(results[name][piece])[inner],
                value[inner],
                magnitude[inner],
                dtype,
                f"{name} from token {origin}",
            )


@each_implementation
def test_excerpts_of_long_sequence(implementation: str) -> None:
    check_excerpts(implementation, "float32", 2**12 + 64, 2)


@pytest.mark.skipif(
    platform() == "cpu", reason="needs 40 GB of accelerator memory and its speed"
)
@pytest.mark.parametrize("implementation", [n for n in IMPLEMENTATIONS if n != "xla"])
def test_arrays_of_more_than_2_to_31_elements(implementation: str) -> None:
    check_excerpts(implementation, "bfloat16", 2**21 + 64, 4)
