"""Every wrong argument raises at trace time, and says which, what, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_na


def _arrays(
    grid: tuple[int, ...] = (6, 8),
    batch: tuple[int, ...] = (2,),
    heads: int = 4,
    key_heads: int = 2,
    channels: int = 8,
    dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    query = jnp.ones((*batch, *grid, heads, channels), dtype)
    key = jnp.ones((*batch, *grid, key_heads, channels), dtype)
    return {"query": query, "key": key, "value": key}


def _call(**changes: Any) -> Any:
    """A valid call of two axes, with changed arguments."""
    return jax_na.neighborhood_attention(
        **({"kernel_size": (3, 3)} | _arrays() | changes)
    )


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


def _frame(**fields: Any) -> jax_na.Frame:
    return jax_na.Frame(**({"length": (6, 8)} | fields))


def test_the_valid_call_is_valid() -> None:
    assert _call().shape == (2, 6, 8, 4, 8)


# Changed arguments, the exception, and what its message must hold: the argument's name,
# the offending value, the rule.
BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    # kernel_size
    "kernel_size 0": (
        {"kernel_size": (3, 0)},
        ValueError,
        ("kernel_size", "0", "axis 1"),
    ),
    "kernel_size negative": (
        {"kernel_size": (-3, 3)},
        ValueError,
        ("kernel_size", "-3", "axis 0", "at least 1"),
    ),
    "kernel_size float": ({"kernel_size": (3.0, 3)}, TypeError, ("kernel_size", "3.0")),
    "kernel_size bool": (
        {"kernel_size": (True, 3)},
        TypeError,
        ("kernel_size", "True"),
    ),
    "kernel_size string": (
        {"kernel_size": ("3", 3)},
        TypeError,
        ("kernel_size", "'3'"),
    ),
    "kernel_size None": (
        {"kernel_size": (None, 3)},
        TypeError,
        ("kernel_size", "None"),
    ),
    "kernel_size of rank 0": ({"kernel_size": ()}, ValueError, ("kernel_size", "()")),
    "kernel_size of rank 4": (
        {"kernel_size": (3, 3, 3, 3)},
        ValueError,
        ("kernel_size", "(3, 3, 3, 3)"),
    ),
    "kernel_size without a rank": ({"kernel_size": 3}, TypeError, ("kernel_size", "3")),
    "kernel_size larger than the grid": (
        {"kernel_size": (3, 9)},
        ValueError,
        ("kernel_size", "9", "> 8", "axis 1"),
    ),
    "kernel_size * dilation larger than the grid": (
        {"kernel_size": (3, 3), "dilation": (3, 1)},
        ValueError,
        ("kernel_size", "dilation", "3 * 3", "> 6", "axis 0"),
    ),
    # stride
    "stride 0": ({"stride": 0}, ValueError, ("stride", "0", "1 <= stride")),
    "stride > kernel_size": (
        {"stride": (1, 4)},
        ValueError,
        ("stride", "4", "axis 1", "kernel_size"),
    ),
    "stride negative": ({"stride": (-1, 1)}, ValueError, ("stride", "-1", "axis 0")),
    "stride float": ({"stride": 1.5}, TypeError, ("stride", "1.5", "integer")),
    "stride bool": ({"stride": True}, TypeError, ("stride", "True", "integer")),
    "stride of another rank": (
        {"stride": (1, 1, 1)},
        ValueError,
        ("stride", "(1, 1, 1)"),
    ),
    # dilation
    "dilation 0": ({"dilation": 0}, ValueError, ("dilation", "0", "at least 1")),
    "dilation negative": (
        {"dilation": (1, -2)},
        ValueError,
        ("dilation", "-2", "axis 1"),
    ),
    "dilation float": (
        {"dilation": (1, 2.0)},
        TypeError,
        ("dilation", "2.0", "integer"),
    ),
    "dilation of another rank": ({"dilation": (1,)}, ValueError, ("dilation", "(1,)")),
    # is_causal
    "is_causal int": ({"is_causal": 1}, TypeError, ("is_causal", "1", "bool")),
    "is_causal None": ({"is_causal": None}, TypeError, ("is_causal", "None", "bool")),
    "is_causal string": ({"is_causal": "no"}, TypeError, ("is_causal", "'no'", "bool")),
    "is_causal of another rank": (
        {"is_causal": (True, False, True)},
        ValueError,
        ("is_causal", "(True, False, True)"),
    ),
    # scale
    "scale NaN": ({"scale": float("nan")}, ValueError, ("scale", "nan", "finite")),
    "scale infinite": ({"scale": float("inf")}, ValueError, ("scale", "inf", "finite")),
    "scale string": ({"scale": "1"}, TypeError, ("scale", "'1'", "number")),
    "scale complex": ({"scale": 1j}, TypeError, ("scale", "1j", "number")),
    "scale bool": ({"scale": True}, TypeError, ("scale", "True", "number")),
    # Ranks, shapes and dtypes of query, key and value.
    "query of too low a rank": (
        {"query": _array(6, 8, 4)},
        ValueError,
        ("query", "(6, 8, 4)"),
    ),
    "key of too low a rank": (
        {"key": _array(8, 2, 8)},
        ValueError,
        ("key", "(8, 2, 8)"),
    ),
    "value of too low a rank": ({"value": _array(8)}, ValueError, ("value", "(8,)")),
    "key's batch": (
        {"key": _array(3, 6, 8, 2, 8), "value": _array(3, 6, 8, 2, 8)},
        ValueError,
        ("key", "batch", "(3,)", "(2,)"),
    ),
    "value's batch": (
        {"value": _array(1, 6, 8, 2, 8)},
        ValueError,
        ("value", "batch", "(1,)", "(2,)"),
    ),
    "key without the batch": (
        {"key": _array(6, 8, 2, 8), "value": _array(6, 8, 2, 8)},
        ValueError,
        ("key", "batch", "()", "(2,)"),
    ),
    "key's grid": (
        {"key": _array(2, 6, 9, 2, 8), "value": _array(2, 6, 9, 2, 8)},
        ValueError,
        ("key", "grid", "(6, 9)", "(6, 8)"),
    ),
    "value's grid": (
        {"value": _array(2, 7, 8, 2, 8)},
        ValueError,
        ("value", "grid", "(7, 8)", "(6, 8)"),
    ),
    "key's channels": ({"key": _array(2, 6, 8, 2, 16)}, ValueError, ("key", "16", "8")),
    "value's heads": (
        {"value": _array(2, 6, 8, 1, 8)},
        ValueError,
        ("value", "1", "2"),
    ),
    "heads that do not divide": (
        {"key": _array(2, 6, 8, 3, 8), "value": _array(2, 6, 8, 3, 8)},
        ValueError,
        ("heads", "multiple", "4", "3"),
    ),
    "more key heads than query heads": (
        {"key": _array(2, 6, 8, 8, 8), "value": _array(2, 6, 8, 8, 8)},
        ValueError,
        ("heads", "multiple", "4", "8"),
    ),
    "mixed dtypes": (
        {"key": _array(2, 6, 8, 2, 8, dtype=jnp.bfloat16)},
        TypeError,
        ("key", "bfloat16", "float32", "same dtype"),
    ),
    "value of another dtype": (
        {"value": _array(2, 6, 8, 2, 8, dtype=jnp.float16)},
        TypeError,
        ("value", "float16", "float32", "same dtype"),
    ),
    "integer inputs": (
        _arrays(dtype=jnp.int32),
        TypeError,
        ("query", "int32", "dtypes"),
    ),
    "bool inputs": (_arrays(dtype=jnp.bool_), TypeError, ("query", "bool", "dtypes")),
    "complex inputs": (
        _arrays(dtype=jnp.complex64),
        TypeError,
        ("query", "complex64", "dtypes"),
    ),
    "8-bit inputs": (
        _arrays(dtype=jnp.float8_e4m3fn),
        TypeError,
        ("query", "float8_e4m3fn", "dtypes"),
    ),
    "query a list of strings": ({"query": ["a"]}, TypeError, ("query", "'a'")),
    "query None": ({"query": None}, TypeError, ("query", "None")),
    "value None": ({"value": None}, TypeError, ("value", "None")),
    # Empty axes, other than batch axes.
    "empty grid": (
        _arrays(grid=(0, 8)),
        ValueError,
        ("query", "empty", "(2, 0, 8, 4, 8)"),
    ),
    "no channels": (
        _arrays(channels=0),
        ValueError,
        ("query", "empty", "(2, 6, 8, 4, 0)"),
    ),
    "no heads": (
        _arrays(heads=0, key_heads=0),
        ValueError,
        ("query", "empty", "(2, 6, 8, 0, 8)"),
    ),
    "no key heads": (
        _arrays(key_heads=0),
        ValueError,
        ("key", "empty", "(2, 6, 8, 0, 8)"),
    ),
    "no value channels": (
        {"value": _array(2, 6, 8, 2, 0)},
        ValueError,
        ("value", "empty", "(2, 6, 8, 2, 0)"),
    ),
    # rel_pos_bias
    "bias table": (
        {"rel_pos_bias": _array(4, 5, 3)},
        ValueError,
        ("rel_pos_bias", "(4, 5, 3)", "(4, 5, 5)"),
    ),
    "bias heads": (
        {"rel_pos_bias": _array(2, 5, 5)},
        ValueError,
        ("rel_pos_bias", "(2, 5, 5)", "(4, 5, 5)"),
    ),
    "bias rank": (
        {"rel_pos_bias": _array(2, 4, 5, 5)},
        ValueError,
        ("rel_pos_bias", "(2, 4, 5, 5)", "(4, 5, 5)"),
    ),
    "bias dtype": (
        {"rel_pos_bias": _array(4, 5, 5, dtype=jnp.int32)},
        TypeError,
        ("rel_pos_bias", "int32", "dtypes"),
    ),
    # Additional keys and values.
    "additional_keys alone": (
        {"additional_keys": _array(2, 3, 2, 8)},
        ValueError,
        ("additional_keys", "additional_values", "together"),
    ),
    "additional_values alone": (
        {"additional_values": _array(2, 3, 2, 8)},
        ValueError,
        ("additional_keys", "additional_values", "together"),
    ),
    "additional counts": (
        {
            "additional_keys": _array(2, 3, 2, 8),
            "additional_values": _array(2, 4, 2, 8),
        },
        ValueError,
        ("additional_values", "(2, 4, 2, 8)", "(2, 3, 2, 8)"),
    ),
    "additional heads": (
        {
            "additional_keys": _array(2, 3, 4, 8),
            "additional_values": _array(2, 3, 4, 8),
        },
        ValueError,
        ("additional_keys", "(2, 3, 4, 8)", "(2, 3, 2, 8)"),
    ),
    "additional channels": (
        {
            "additional_keys": _array(2, 3, 2, 8),
            "additional_values": _array(2, 3, 2, 4),
        },
        ValueError,
        ("additional_values", "(2, 3, 2, 4)", "(2, 3, 2, 8)"),
    ),
    "additional batch": (
        {
            "additional_keys": _array(1, 3, 2, 8),
            "additional_values": _array(1, 3, 2, 8),
        },
        ValueError,
        ("additional_keys", "(1, 3, 2, 8)", "(2, 3, 2, 8)"),
    ),
    "additional rank": (
        {"additional_keys": _array(3, 2, 8), "additional_values": _array(3, 2, 8)},
        ValueError,
        ("additional_keys", "(3, 2, 8)"),
    ),
    "additional dtype": (
        {
            "additional_keys": _array(2, 3, 2, 8, dtype=jnp.bfloat16),
            "additional_values": _array(2, 3, 2, 8, dtype=jnp.bfloat16),
        },
        TypeError,
        ("additional_keys", "bfloat16", "float32", "same dtype"),
    ),
    # Frames.
    "frame of another type": (
        {"frame": (6, 8)},
        TypeError,
        ("frame", "(6, 8)", "Frame"),
    ),
    "frame length shape": (
        {"frame": _frame(length=(6, 8, 9))},
        ValueError,
        ("frame.length", "(3,)", "(2, 2)"),
    ),
    "frame length batch": (
        {"frame": _frame(length=np.ones((3, 2), np.int32))},
        ValueError,
        ("frame.length", "(3, 2)", "(2, 2)"),
    ),
    "frame query_origin rank": (
        {"frame": _frame(query_origin=np.zeros((1, 2, 2), np.int32))},
        ValueError,
        ("frame.query_origin", "(1, 2, 2)", "(2, 2)"),
    ),
    "frame length dtype": (
        {"frame": _frame(length=(6.0, 8.0))},
        TypeError,
        ("frame.length", "float64", "integer"),
    ),
    "frame key_origin dtype": (
        {"frame": _frame(key_origin=jnp.zeros(2))},
        TypeError,
        ("frame.key_origin", "float32", "integer"),
    ),
    "frame query_origin bool": (
        {"frame": _frame(query_origin=np.array([True, False]))},
        TypeError,
        ("frame.query_origin", "bool", "integer"),
    ),
    "frame length None": (
        {"frame": _frame(length=None)},
        TypeError,
        ("frame.length", "integer"),
    ),
    "frame length ragged": (
        {"frame": _frame(length=((6, 8), (6,)))},
        TypeError,
        ("frame.length", "((6, 8), (6,))"),
    ),
    "frame length string": (
        {"frame": _frame(length="six")},
        TypeError,
        ("frame.length", "integer"),
    ),
    # Options.
    "unknown implementation": (
        {"implementation": "fastest"},
        ValueError,
        ("implementation", "'fastest'", "'fused'", "'naive'", "'xla'"),
    ),
    "implementation of another type": (
        {"implementation": 3},
        ValueError,
        ("implementation", "3"),
    ),
    "unknown precision": ({"precision": "best"}, ValueError, ("precision", "'best'")),
    "two precisions": (
        {"precision": ("highest", "default")},
        ValueError,
        ("precision", "'highest', 'default'"),
    ),
    "deterministic_grads int": (
        {"deterministic_grads": 1},
        TypeError,
        ("deterministic_grads", "1", "bool"),
    ),
}


def _assert_raises(
    call: Callable[[], Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(exception) as raised:
        call()
    assert type(raised.value) is exception
    message = str(raised.value)
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message), (part, message)


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    """The named function, eagerly and while tracing, forward and backward."""
    changes, exception, parts = BAD[name]
    _assert_raises(lambda: _call(**changes), exception, parts)
    arrays = {n: v for n, v in changes.items() if isinstance(v, jax.Array)}
    static = {n: v for n, v in changes.items() if n not in arrays}
    traced = lambda arrays: _call(**static, **arrays)  # noqa: E731
    _assert_raises(lambda: jax.jit(traced)(arrays), exception, parts)
    _assert_raises(lambda: jax.eval_shape(traced, arrays), exception, parts)


@pytest.mark.parametrize("name", [n for n in BAD if "rank" not in n])
def test_bad_argument_of_na2d(name: str) -> None:
    changes, exception, parts = BAD[name]
    if name == "kernel_size without a rank":
        changes, exception, parts = (
            {"kernel_size": "3"},
            TypeError,
            ("kernel_size", "'3'"),
        )
    arguments = {"kernel_size": 3} | _arrays() | changes
    _assert_raises(lambda: jax_na.na2d(**arguments), exception, parts)


@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation"])
def test_traced_integer(name: str) -> None:
    def call(value: Any) -> Any:
        return _call(**{name: (value, 1)})

    _assert_raises(lambda: jax.jit(call)(1), TypeError, (name, "static", "traced"))


def test_traced_is_causal() -> None:
    def call(value: Any) -> Any:
        return _call(is_causal=value)

    _assert_raises(lambda: jax.jit(call)(True), TypeError, ("is_causal", "static"))


def test_traced_scale() -> None:
    def call(value: Any) -> Any:
        return _call(scale=value)

    _assert_raises(lambda: jax.jit(call)(0.5), TypeError, ("scale", "static", "traced"))
    _assert_raises(
        lambda: jax.grad(lambda s: call(s).sum())(0.5), TypeError, ("scale",)
    )


@pytest.mark.parametrize(
    ("function", "kernel_size"),
    [("na1d", (3, 3)), ("na2d", (3,)), ("na2d", (3, 3, 3)), ("na3d", (3, 3))],
)
def test_kernel_size_of_another_rank(function: str, kernel_size: Any) -> None:
    rank = int(function[2])
    arrays = _arrays(grid=(6,) * rank)
    _assert_raises(
        lambda: getattr(jax_na, function)(**arrays, kernel_size=kernel_size),
        ValueError,
        ("kernel_size", str(kernel_size)),
    )


def test_arguments_after_kernel_size_have_names() -> None:
    arrays = _arrays()
    with pytest.raises(TypeError, match="positional"):
        jax_na.na2d(arrays["query"], arrays["key"], arrays["value"], 3, 1)


@pytest.mark.parametrize(
    "numpy_integer", [np.int64(3), np.int32(3), np.array(3), jnp.int32(3)]
)
def test_integers_of_other_types_are_integers(numpy_integer: Any) -> None:
    out = _call(kernel_size=(numpy_integer, numpy_integer), stride=numpy_integer)
    np.testing.assert_array_equal(out, _call(stride=3))


def test_unavailable_implementation() -> None:
    """A name that exists but cannot run here says why, and what can."""
    if jax.default_backend() != "cpu":
        pytest.skip("every implementation may exist on this backend")
    with pytest.raises(NotImplementedError) as raised:
        _call(implementation="gemm")
    message = str(raised.value)
    assert "'gemm'" in message and "'xla'" in message and "cpu" in message


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_empty_batches_are_fine(batch: tuple[int, ...]) -> None:
    arrays = _arrays(batch=batch)
    assert jax_na.na2d(**arrays, kernel_size=3).shape == (*batch, 6, 8, 4, 8)
    gradients = jax.grad(lambda a: jax_na.na2d(**a, kernel_size=3).sum())(arrays)
    for name, array in arrays.items():
        assert gradients[name].shape == array.shape


# ---- The other functions -------------------------------------------------------------


def _qk(**changes: Any) -> Any:
    arrays = {n: a for n, a in _arrays().items() if n != "value"}
    return jax_na.na_qk(**({"kernel_size": (3, 3)} | arrays | changes))


def _av(**changes: Any) -> Any:
    arrays = {"weights": _array(2, 6, 8, 4, 9), "value": _array(2, 6, 8, 2, 8)}
    return jax_na.na_av(**({"kernel_size": (3, 3)} | arrays | changes))


@pytest.mark.parametrize(
    ("changes", "exception", "parts"),
    [
        ({"kernel_size": (3, 9)}, ValueError, ("kernel_size", "9", "> 8")),
        ({"stride": 4}, ValueError, ("stride", "4")),
        ({"scale": float("nan")}, ValueError, ("scale", "nan")),
        ({"key": _array(2, 6, 7, 2, 8)}, ValueError, ("key", "(6, 7)", "(6, 8)")),
        ({"key": _array(2, 6, 8, 2, 4)}, ValueError, ("key", "4", "8")),
        ({"key": _array(2, 6, 8, 3, 8)}, ValueError, ("heads", "4", "3")),
        (
            {"key": _array(2, 6, 8, 2, 8, dtype=jnp.float16)},
            TypeError,
            ("key", "float16"),
        ),
        ({"rel_pos_bias": _array(4, 5, 4)}, ValueError, ("rel_pos_bias", "(4, 5, 4)")),
        ({"frame": _frame(length=(1.0, 2.0))}, TypeError, ("frame.length", "integer")),
    ],
)
def test_bad_argument_of_na_qk(
    changes: dict[str, Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    assert _qk().shape == (2, 6, 8, 4, 9)
    _assert_raises(lambda: _qk(**changes), exception, parts)
    _assert_raises(lambda: jax.jit(lambda: _qk(**changes))(), exception, parts)


@pytest.mark.parametrize(
    ("changes", "exception", "parts"),
    [
        ({"kernel_size": (3, 9)}, ValueError, ("kernel_size", "9")),
        ({"dilation": -1}, ValueError, ("dilation", "-1")),
        ({"weights": _array(2, 6, 8, 4, 8)}, ValueError, ("weights", "8", "9")),
        ({"weights": _array(4, 9)}, ValueError, ("weights", "(4, 9)")),
        ({"value": _array(2, 6, 7, 2, 8)}, ValueError, ("value", "(6, 7)", "(6, 8)")),
        ({"value": _array(2, 6, 8, 3, 8)}, ValueError, ("heads", "4", "3")),
        (
            {"value": _array(2, 6, 8, 2, 8, dtype=jnp.float16)},
            TypeError,
            ("value", "float16"),
        ),
    ],
)
def test_bad_argument_of_na_av(
    changes: dict[str, Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    assert _av().shape == (2, 6, 8, 4, 8)
    _assert_raises(lambda: _av(**changes), exception, parts)
    _assert_raises(lambda: jax.jit(lambda: _av(**changes))(), exception, parts)


OUT, LSE = _array(2, 6, 8, 4, 8), _array(2, 6, 8, 4)


@pytest.mark.parametrize(
    ("outputs", "lses", "exception", "parts"),
    [
        ([], [], ValueError, ("outputs", "empty")),
        ([OUT, OUT], [LSE], ValueError, ("outputs", "lses", "2", "1")),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], ValueError, ("outputs", "(1, 6, 8, 4, 8)")),
        ([OUT, OUT], [LSE, LSE[..., :2]], ValueError, ("lses", "(2, 6, 8, 2)")),
        ([OUT, OUT], [LSE, OUT], ValueError, ("lses", "(2, 6, 8, 4, 8)")),
        (
            [OUT, OUT.astype(jnp.bfloat16)],
            [LSE, LSE],
            TypeError,
            ("outputs", "bfloat16", "float32"),
        ),
        (
            [OUT.astype(jnp.int32)] * 2,
            [LSE, LSE],
            TypeError,
            ("outputs", "int32"),
        ),
        ([OUT, OUT], [LSE, LSE.astype(jnp.int32)], TypeError, ("lses", "int32")),
    ],
)
def test_bad_argument_of_merge_attentions(
    outputs: Any, lses: Any, exception: type[Exception], parts: tuple[str, ...]
) -> None:
    _assert_raises(lambda: jax_na.merge_attentions(outputs, lses), exception, parts)


@pytest.mark.parametrize(
    ("arguments", "exception", "parts"),
    [
        ({"grid": (6, 8), "kernel_size": (3, 9)}, ValueError, ("kernel_size", "9")),
        ({"grid": (6, 8), "kernel_size": (3, 0)}, ValueError, ("kernel_size", "0")),
        (
            {"grid": (6, 8), "kernel_size": (3, 3), "stride": 4},
            ValueError,
            ("stride", "4"),
        ),
        ({"grid": (6, 8), "kernel_size": (3,)}, ValueError, ("kernel_size", "(3,)")),
        ({"grid": (6, 0), "kernel_size": (3, 3)}, ValueError, ("grid", "0")),
        ({"grid": (6, 8.0), "kernel_size": (3, 3)}, TypeError, ("grid", "8.0")),
    ],
)
def test_bad_argument_of_window_mask(
    arguments: dict[str, Any], exception: type[Exception], parts: tuple[str, ...]
) -> None:
    _assert_raises(lambda: jax_na.window_mask(**arguments), exception, parts)
