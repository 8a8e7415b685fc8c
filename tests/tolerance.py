"""When two results agree.

Errors are measured against the size of the result: rms(error) <= tolerance * r and
max|error| <= 10 * tolerance * r, with r the larger of rms(oracle) and a hundredth of
the rms of the same sum taken with absolute values. An absolute tolerance would accept a
zero gradient where the true one is small, and a relative one would divide by zero where
it is zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: By the dtype of query, key and value, also for results of another dtype.
TOLERANCES = {
    "float64": 1e-12,
    "float32": 1e-5,
    "float16": 2e-3,
    "bfloat16": 1.5e-2,
}
#: float32 on tensor cores at default precision.
TF32_TOLERANCE = 2e-3

# Errors that the dtype's range, not its precision, makes: half of float16's smallest
# subnormal; the others accumulate where subnormals may be flushed to zero.
_UNDERFLOW = {
    "float64": float(np.finfo(np.float64).tiny),
    "float32": float(np.finfo(np.float32).tiny),
    "float16": float(np.finfo(np.float16).smallest_subnormal) / 2,
    "bfloat16": float(np.finfo(np.float32).tiny),
}


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def assert_close(
    actual: Any, expected: Any, magnitude: Any, tolerance: Any, name: str
) -> None:
    """Asserts that a result agrees with the oracle's.

    Args:
        actual: the result.
        expected: the oracle's value, float64. The result must be finite where it is
            finite, and -inf where it is -inf.
        magnitude: the same sum taken with absolute values. Where it is 0 the result
            must be exactly the oracle's.
        tolerance: a number, or the dtype of the inputs.
        name: of the result, for the message.
    """
    expected = np.asarray(expected, np.float64)
    assert np.shape(actual) == expected.shape, (
        f"{name} has shape {np.shape(actual)}, expected {expected.shape}"
    )
    actual = np.asarray(actual, np.float64)
    underflow = _UNDERFLOW["float32"]
    if not isinstance(tolerance, float):
        underflow = _UNDERFLOW[str(np.dtype(tolerance))]
        tolerance = TOLERANCES[str(np.dtype(tolerance))]
    assert not np.isnan(expected).any() and not np.isposinf(expected).any()

    magnitude = np.asarray(magnitude, np.float64)

    # Elements that no term contributes to are exact. They stay out of the averages, in
    # which a result of mostly empty tokens would make its own rounding look large.
    computed = np.isfinite(expected) & (magnitude > 0)
    wrong = np.where(computed, ~np.isfinite(actual), actual != expected)
    assert not wrong.any(), (
        f"{name} is wrong in {wrong.sum()} of {wrong.size} elements that must be "
        f"finite, or exactly 0 or -inf; first "
        f"{_describe(actual, expected, wrong.argmax())}"
    )
    error = np.abs(actual[computed] - expected[computed])
    error = np.maximum(error - underflow, 0.0)
    if not error.size:
        return
    size = _rms(expected[computed])
    scale = max(size, 1e-2 * _rms(magnitude[computed]))
    worst = np.flatnonzero(computed)[error.argmax()]
    message = (
        f"{name} is off: rms error {_rms(error):.3e} (limit {tolerance * scale:.3e}), "
        f"largest {error.max():.3e} (limit {10 * tolerance * scale:.3e}), "
        f"rms of the result {size:.3e}; worst {_describe(actual, expected, worst)}"
    )
    assert _rms(error) <= tolerance * scale, message
    assert error.max() <= 10 * tolerance * scale, message


def assert_trees_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Asserts that two trees have one structure, and that each of their arrays agrees.

    ``tolerance`` is relative to the largest element of an array, or to a hundredth.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)
    ):
        assert a.shape == b.shape, (path, a.shape, b.shape)
        size = max(1e-2, float(jnp.max(jnp.abs(b)))) if b.size else 0.0
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * size, err_msg=jax.tree_util.keystr(path)
        )


def assert_results_close(
    actual: dict[str, Any], expected: dict[str, Any], tolerance: Any, context: str
) -> None:
    """:func:`assert_close` for every result of the oracle, by name."""
    assert set(actual) == set(expected), (set(actual), set(expected))
    failures = []
    for name, (value, magnitude) in expected.items():
        try:
            assert_close(actual[name], value, magnitude, tolerance, name)
        except AssertionError as failure:
            failures.append(str(failure).splitlines()[0])
    assert not failures, "\n".join([context, *failures])


def _describe(actual: np.ndarray, expected: np.ndarray, flat_index: Any) -> str:
    index = tuple(int(i) for i in np.unravel_index(flat_index, expected.shape))
    return f"at {list(index)}: {actual[index]!r} instead of {expected[index]!r}"
