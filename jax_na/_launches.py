"""What one call launches on an NVIDIA GPU: kernels, and the shared memory of each.

Counted on the host, as ``cuda/fused/backward.cu``, ``cuda/sm90/backward.cu``,
``cuda/naive/backward.cu`` and ``jax_na/_gemm.py`` launch and as the ``Shared`` structures
of the kernels are laid out.
"""

from __future__ import annotations

import dataclasses
import math

from jax_na._plan import HopperTilings, Plan
from jax_na._problem import Operands, Problem

_LARGEST_SHARED_BIAS = 16 << 10  # as in cuda/fused/bias.cuh
_HOPPER_SHARED = 227 << 10  # as in cuda/sm90/pipeline.cuh


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: what it computes.
        shared_bytes: dynamic shared memory of a CTA; of kernels for Hopper, one CTA of
            which fills a multiprocessor, what it may take at most.
    """

    kernel: str
    shared_bytes: int

    def __str__(self) -> str:
        return f"{self.kernel} ({self.shared_bytes / 1024:.3g} KiB)"


def launches(
    implementation: str, problem: Problem, operands: Operands, plan: Plan | None
) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """Of the forward pass, and of the backward pass for every gradient there is.

    The kernels are those that every NVIDIA GPU runs.
    """
    if implementation == "fused":
        assert plan is not None
        return _fused_forward(problem, operands, plan), _fused_backward(
            problem, operands, plan
        )
    if implementation == "gemm":
        return _gemm(operands)
    backward = ["dquery", "dkey, dvalue"]
    if operands.additional_key is not None:
        backward.append("dadditional")
    if operands.bias is not None:
        backward.append("dbias")
    return (Launch("forward", 0),), tuple(Launch(name, 0) for name in backward)


def _aligned(size: int, to: int = 128) -> int:
    return -(-size // to) * to


def _tables(rows: int) -> int:
    """``TileTables``: intervals, origins, tokens of rows, two lists of columns.

    ``cuda/fused/geometry.cuh`` asserts what this gives.
    """
    return _aligned(12 * (rows + 2) + 12 + 4 * rows, 8) + 2 * 64 * 8


def _bias_tables(rows: int) -> int:
    return 4 * (rows + 64)


# ---- Fused ---------------------------------------------------------------------------


def _padded(channels: int, to: tuple[int, ...]) -> int:
    return next(size for size in to if channels <= size)


def _row_bytes(operands: Operands) -> int:
    """Of a token's channels in shared memory, in the fused kernels."""
    channels = max(operands.query.shape[-1], operands.value.shape[-1])
    padded = _padded(channels, (32, 64, 96, 128, 192, 256))
    return padded * operands.query.dtype.itemsize


def _shared_bias(problem: Problem, operands: Operands) -> int:
    """Of one head's table; a large one is not brought to shared memory."""
    if operands.bias is None:
        return 0
    size = 4 * math.prod(problem.bias_shape)
    return size if size <= _LARGEST_SHARED_BIAS else 0


def _fused_forward(
    problem: Problem, operands: Operands, plan: Plan
) -> tuple[Launch, ...]:
    row_bytes, tiling = _row_bytes(operands), plan.forward
    stages = 2 if row_bytes <= 128 else 1
    tokens = tiling.rows + 2 * stages * tiling.columns
    size = tokens * row_bytes + _tables(tiling.rows) + _bias_tables(tiling.rows) + 4
    return (Launch("forward", _aligned(size) + _shared_bias(problem, operands)),)


def _fused_backward(
    problem: Problem, operands: Operands, plan: Plan
) -> tuple[Launch, ...]:
    row_bytes = _row_bytes(operands)
    stages = 2 if row_bytes <= 256 else 1
    rows, columns = plan.dquery.rows, plan.dquery.columns
    size = _aligned(2 * (rows + stages * columns) * row_bytes + _tables(rows))
    if operands.bias is not None:
        scores = 4 * rows * (columns + 2)
        size = _aligned(_aligned(size + _bias_tables(rows), 8) + scores + 4)
        size += 2 * _shared_bias(problem, operands)
    found = [Launch("dquery" if operands.bias is None else "dquery, dbias", size)]
    if operands.bias is not None and plan.bias_splits > 1:
        found.append(Launch("sum of dbias", 0))

    rows, columns = plan.dkey.rows, plan.dkey.columns
    tokens = 2 * (rows + stages * columns)
    statistics = 2 * 2 * 4 * columns
    size = tokens * row_bytes + statistics + _tables(rows) + _bias_tables(rows)
    size = _aligned(size)
    if operands.query.dtype.itemsize == 2 and 128 < row_bytes <= 256:
        size += 2 * rows * columns  # weights that one warp makes for another
    # The sums of both do not fit the registers where heads are wide.
    wide = max(operands.query.shape[-1], operands.value.shape[-1]) > 128
    found += _key_and_value("d{}", wide, size)
    if operands.additional_key is not None:
        found += _key_and_value("dadditional_{}", wide, size)
        if plan.additional_splits > 1:
            found.append(Launch("sum of dadditional_key", 0))
            found.append(Launch("sum of dadditional_value", 0))
    return tuple(found)


def _key_and_value(name: str, apart: bool, size: int) -> list[Launch]:
    names = [name.format("key"), name.format("value")]
    return [Launch(n, size) for n in (names if apart else [", ".join(names)])]


# ---- Fused, on Hopper ----------------------------------------------------------------


def hopper_launches(
    problem: Problem, operands: Operands, plan: Plan, tilings: HopperTilings
) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """As :func:`launches`, of ``'fused'`` where the device is a Hopper GPU.

    ``tilings`` are those of the gradients of query, key and value.
    """
    forward = _fused_forward(problem, operands, plan)
    if not isinstance(plan.hopper_forward, str):
        forward = (Launch("forward", _HOPPER_SHARED),)
    backward = _fused_backward(problem, operands, plan)
    if not isinstance(tilings, str):
        names = ("dquery", "dkey, dvalue", "dkey", "dvalue")
        rest = (
            Launch(launch.kernel.removeprefix("dquery, "), launch.shared_bytes)
            for launch in backward
            if launch.kernel not in names
        )
        if "gradients" in tilings:
            own = [
                Launch("dquery, dkey, dvalue", _HOPPER_SHARED),
                Launch("sum of dquery", 0),
            ]
        else:
            own = [Launch(name, _HOPPER_SHARED) for name in names[:2]]
        backward = (*own, *rest)
    return forward, backward


# ---- Products ------------------------------------------------------------------------


def _gemm(operands: Operands) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    head_dim, value_dim = operands.query.shape[-1], operands.value.shape[-1]
    element = operands.query.dtype.itemsize

    def product(function: str, name: str, channels: int) -> Launch:
        row_bytes = _padded(channels, (32, 64, 128, 256)) * element
        tokens = 64 if row_bytes <= 512 else 32  # of the rows, and of the columns
        if function == "pair":
            stages = 2 if row_bytes <= 256 else 1
            size = (1 + stages) * tokens * row_bytes + 4 * tokens * tokens
        elif function == "gather":
            size = 2 * tokens * row_bytes + element * tokens * tokens
        else:
            size = 2 * tokens * (row_bytes + 8) + 64
        return Launch(name, _aligned(size + _tables(tokens)))

    scores = product("pair", "scores", head_dim)
    return (
        (scores, product("gather", "out", value_dim)),
        (
            scores,
            product("pair", "dweights", value_dim),
            product("gather", "dquery", head_dim),
            product("scatter", "dkey", head_dim),
            product("scatter", "dvalue", value_dim),
        ),
    )
