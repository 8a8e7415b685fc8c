"""One call in canonical form: static parameters, operands, and their validation.

Every public function turns its arguments into a :class:`Problem` (hashable, static) and
:class:`Operands` (arrays) here, and nothing below this module checks them again.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_na._frame import Frame

FLOAT_TYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static parameters of one call, one entry per grid axis where plural."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    scale: float
    precision: jax.lax.Precision = jax.lax.Precision.DEFAULT
    deterministic_grads: bool | None = None

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative positional bias table."""
        return tuple(2 * k - 1 for k in self.kernel_size)


class Operands(NamedTuple):
    """The arrays of one call; None where the caller gave none.

    ``B`` below stands for any number of batch axes. The axes ``B'`` of ``bias`` and
    ``frame`` are as many, each either full or of size 1.

    Attributes:
        query: ``[B, *grid, N, D]``.
        key: ``[B, *grid, K, D]``.
        value: ``[B, *grid, K, Dv]``.
        bias: ``[B', N, *(2 * kernel_size - 1)]`` in the accumulation dtype.
        additional_key: ``[B, M, K, D]``.
        additional_value: ``[B, M, K, Dv]``.
        frame: int32 ``[B', 3, rank]``: length, query origin, key origin.
    """

    query: Any
    key: Any
    value: Any
    bias: Any = None
    additional_key: Any = None
    additional_value: Any = None
    frame: Any = None


# The fields of Operands that have gradients, in order.
DIFFERENTIABLE = Operands._fields[:6]


def accumulation_dtype(dtype: Any) -> np.dtype:
    """float64 for float64, else float32: of lse, of the bias, and of every sum."""
    return np.dtype("float64" if dtype == np.dtype("float64") else "float32")


# ---- Static parameters ---------------------------------------------------------------


def rank_of(kernel_size: Any, alternative: str) -> int:
    """The number of grid axes, which only a sequence of window lengths tells.

    Args:
        kernel_size: one entry per grid axis.
        alternative: what to use for one number, for the message.

    Raises:
        TypeError: ``kernel_size`` is no sequence.
        ValueError: ``kernel_size`` has not 1, 2 or 3 entries.
    """
    is_sequence = isinstance(kernel_size, (Sequence, np.ndarray))
    if not is_sequence or isinstance(kernel_size, str):
        raise TypeError(
            f"kernel_size must have one entry per grid axis, got {kernel_size!r}: one "
            f"number for all axes needs {alternative}."
        )
    if len(kernel_size) not in (1, 2, 3):
        raise ValueError(
            f"kernel_size must have 1, 2 or 3 entries, one per grid axis, got "
            f"{kernel_size!r}."
        )
    return len(kernel_size)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a static integer, got the traced value {value}: it decides "
            "array shapes and kernels, so mark it static (jit's static_argnames)."
        )
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None


def grid_lengths(name: str, value: Any) -> tuple[int, ...]:
    """Lengths of a grid's 1 to 3 axes.

    Raises:
        TypeError: no sequence of static integers.
        ValueError: not 1 to 3 entries, or one below 1.
    """
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}.")
    lengths = tuple(_integer(f"{name}[{a}]", entry) for a, entry in enumerate(value))
    if len(lengths) not in (1, 2, 3) or min(lengths) < 1:
        raise ValueError(
            f"{name} must have 1, 2 or 3 lengths of at least 1, got {lengths}."
        )
    return lengths


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be a static bool, got {value!r}.")


def _per_axis(name: str, value: Any, rank: int, convert: Any) -> tuple[Any, ...]:
    """One entry per axis from a scalar or a sequence of ``rank`` entries."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (convert(name, value),) * rank
    if len(value) != rank:
        raise ValueError(
            f"{name} must be one value or one per grid axis ({rank}), got "
            f"{len(value)} entries: {tuple(value)}."
        )
    return tuple(convert(f"{name}[{axis}]", entry) for axis, entry in enumerate(value))


def _scale(value: Any, head_dim: int) -> float:
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"scale must be a static number, got the traced value {value}: multiply "
            "the query for a learned scale."
        )
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"scale must be a number or None, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value!r}.")
    return float(value)


def _precision(value: Any) -> jax.lax.Precision:
    """Canonical precision; None follows ``jax_default_matmul_precision``."""
    if value is None:
        value = jax.config.jax_default_matmul_precision
    if value is None:
        return jax.lax.Precision.DEFAULT
    if isinstance(value, (tuple, list)):
        raise ValueError(
            f"precision must be one jax.lax.Precision or its name, got {value!r}: both "
            "products of attention use the same."
        )
    try:
        return jax.lax.Precision(value)
    except ValueError:
        pass
    # Names of the configuration option that jax.lax.Precision itself does not know.
    aliases = {
        "bfloat16": jax.lax.Precision.DEFAULT,
        "tensorfloat32": jax.lax.Precision.HIGH,
        "float32": jax.lax.Precision.HIGHEST,
    }
    if value in aliases:
        return aliases[value]
    raise ValueError(
        f"precision must be None, a jax.lax.Precision or one of its names ('default', "
        f"'high', 'highest'), got {value!r}."
    )


def make_problem(
    rank: int,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    *,
    scale: Any = 1.0,
    head_dim: int = 1,
    precision: Any = None,
    deterministic_grads: Any = None,
) -> Problem:
    """Canonical static parameters.

    Raises:
        TypeError: an argument is not static or not of its type.
        ValueError: ``kernel_size < 1``, ``dilation < 1``, or ``stride`` outside
            ``[1, kernel_size]``; the message names the axis, the value and the rule.
    """
    kernel_size = _per_axis("kernel_size", kernel_size, rank, _integer)
    stride = _per_axis("stride", stride, rank, _integer)
    dilation = _per_axis("dilation", dilation, rank, _integer)
    is_causal = _per_axis("is_causal", is_causal, rank, _boolean)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation)):
        if k < 1:
            raise ValueError(
                f"kernel_size must be at least 1, got {k} on axis {axis}: {kernel_size}."
            )
        if d < 1:
            raise ValueError(
                f"dilation must be at least 1, got {d} on axis {axis}: {dilation}."
            )
        if not 1 <= s <= k:
            raise ValueError(
                f"stride must satisfy 1 <= stride <= kernel_size, got {s} on axis "
                f"{axis} with kernel_size {k}: a larger one would skip keys."
            )
    if deterministic_grads is not None:
        deterministic_grads = _boolean("deterministic_grads", deterministic_grads)
    return Problem(
        kernel_size,
        stride,
        dilation,
        is_causal,
        _scale(scale, head_dim),
        _precision(precision),
        deterministic_grads,
    )


# ---- Operands ------------------------------------------------------------------------


def as_arrays(**arrays: Any) -> list[jax.Array]:
    """Floating-point arrays of one dtype.

    Raises:
        TypeError: an argument is no array, not of a supported floating-point type, or
            not of the same type as the others.
    """
    result = []
    for name, array in arrays.items():
        try:
            array = jnp.asarray(array)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be an array, got {array!r}: {error}"
            ) from None
        if str(array.dtype) not in FLOAT_TYPES:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(FLOAT_TYPES)}, got "
                f"{array.dtype}."
            )
        result.append(array)
    if len({array.dtype for array in result}) > 1:
        dtypes = ", ".join(f"{n} {a.dtype}" for n, a in zip(arrays, result))
        raise TypeError(f"{', '.join(arrays)} must have the same dtype, got {dtypes}.")
    return result


def check_grid(name: str, array: Any, rank: int) -> None:
    """``array`` is ``[*batch, *grid, heads, channels]`` with nothing empty but batch."""
    if array.ndim < rank + 2:
        raise ValueError(
            f"{name} must have shape [*batch, *grid, heads, channels] with {rank} grid "
            f"axes, so at least {rank + 2} axes, got shape {array.shape}."
        )
    for size in array.shape[-rank - 2 :]:
        if isinstance(size, int) and size == 0:
            raise ValueError(
                f"{name} must not be empty on a grid, head or channel axis, got shape "
                f"{array.shape}."
            )


def _check_equal(name: str, value: Any, rule: str, expected: Any) -> None:
    if value != expected:
        raise ValueError(f"{name} must equal {rule} = {expected}, got {value}.")


def check_pair(
    first: tuple[str, Any], second: tuple[str, Any], rank: int, same_grid: bool
) -> None:
    """Two grid arrays agree on the batch axes and, without a frame, on the grid."""
    (name, array), (other_name, other) = first, second
    _check_equal(
        f"{other_name}'s batch axes",
        tuple(other.shape[: -rank - 2]),
        f"{name}'s",
        tuple(array.shape[: -rank - 2]),
    )
    if same_grid:
        _check_equal(
            f"{other_name}'s grid",
            tuple(other.shape[-rank - 2 : -2]),
            f"{name}'s",
            tuple(array.shape[-rank - 2 : -2]),
        )


def check_head_dim(query: Any, key: Any) -> None:
    _check_equal("key's head dimension", key.shape[-1], "query's", query.shape[-1])


def check_heads(name: str, heads: int, key_heads: int) -> None:
    if heads % key_heads:
        raise ValueError(
            f"{name}'s number of heads must be a multiple of the key heads', got "
            f"{heads} and {key_heads}."
        )


def check_slots(weights: Any, problem: Problem) -> None:
    """The last axis of unfused weights has one entry per key of a window."""
    slots = math.prod(problem.kernel_size)
    if weights.shape[-1] != slots:
        raise ValueError(
            f"weights must have prod(kernel_size) = {slots} entries on the last axis, "
            f"got {weights.shape[-1]}: shape {weights.shape}."
        )


def check_window_fits(problem: Problem, grid: Sequence[int]) -> None:
    """Without a frame every residue class holds a whole window."""
    for axis, (k, d, length) in enumerate(
        zip(problem.kernel_size, problem.dilation, grid)
    ):
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation must not exceed the grid's length, got "
                f"{k} * {d} = {k * d} > {length} on axis {axis} of the grid "
                f"{tuple(grid)}. Pad the grid and pass a frame to allow it."
            )


def canonical_bias(
    bias: Any, problem: Problem, heads: int, batch_rank: int, dtype: Any
) -> jax.Array | None:
    """The bias as the primitives take it: ``[1, ..., N, *table]``, accumulation dtype."""
    if bias is None:
        return None
    (bias,) = as_arrays(rel_pos_bias=bias)
    expected = (heads, *problem.bias_shape)
    if bias.shape != expected:
        raise ValueError(
            f"rel_pos_bias must have shape [heads, *(2 * kernel_size - 1)] = {expected}, "
            f"got {bias.shape}."
        )
    bias = bias.astype(accumulation_dtype(dtype))
    return jnp.expand_dims(bias, tuple(range(batch_rank)))


def canonical_frame(
    frame: Any, batch_shape: tuple[int, ...], rank: int
) -> jax.Array | None:
    """The frame as the primitives take it: int32 ``[*batch', 3, rank]``."""
    if frame is None:
        return None
    if not isinstance(frame, Frame):
        raise TypeError(f"frame must be a jax_na.Frame or None, got {frame!r}.")
    return frame._pack(batch_shape, rank)


def make_operands(
    problem: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rel_pos_bias: Any,
    additional_keys: Any,
    additional_values: Any,
    frame: Any,
) -> Operands:
    """Checked operands of one attention call.

    Raises:
        TypeError, ValueError: the message names the argument, the value and the rule.
    """
    rank = problem.rank
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_grid(name, array, rank)
    check_pair(("query", query), ("key", key), rank, same_grid=frame is None)
    check_pair(("key", key), ("value", value), rank, same_grid=True)
    check_head_dim(query, key)
    _check_equal("value's number of heads", value.shape[-2], "key's", key.shape[-2])
    check_heads("query", query.shape[-2], key.shape[-2])
    batch_shape = query.shape[: -rank - 2]
    if frame is None:
        check_window_fits(problem, query.shape[-rank - 2 : -2])

    if (additional_keys is None) != (additional_values is None):
        given = "additional_values" if additional_keys is None else "additional_keys"
        raise ValueError(
            "additional_keys and additional_values must be given together, got only "
            f"{given}."
        )
    if additional_keys is not None:
        _, additional_keys, additional_values = as_arrays(
            query=query,
            additional_keys=additional_keys,
            additional_values=additional_values,
        )
        for name, array, like in (
            ("additional_keys", additional_keys, key),
            ("additional_values", additional_values, value),
        ):
            tokens = (
                additional_keys.shape[len(batch_shape)]
                if (additional_keys.ndim == len(batch_shape) + 3)
                else "M"
            )
            expected = (*batch_shape, tokens, *like.shape[-2:])
            if array.shape != expected:
                raise ValueError(
                    f"{name} must have shape [*batch, M, key heads, channels] = "
                    f"{expected}, got {array.shape}."
                )
        if additional_keys.shape[-3] == 0:
            additional_keys = additional_values = None
    return Operands(
        query,
        key,
        value,
        canonical_bias(
            rel_pos_bias, problem, query.shape[-2], len(batch_shape), query.dtype
        ),
        additional_keys,
        additional_values,
        canonical_frame(frame, batch_shape, rank),
    )
