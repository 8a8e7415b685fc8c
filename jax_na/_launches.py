"""What one call launches on an NVIDIA GPU: kernels, and the shared memory of each.

Counted on the host, as ``cuda/fused/backward.cu``, ``cuda/sm90/backward.cu``,
``cuda/naive/backward.cu`` and ``jax_na/_gemm.py`` launch and as the ``Shared`` structures
of the kernels are laid out.
"""

from __future__ import annotations

import dataclasses
import math

from jax_na import _shared_memory, _tiling_sm90
from jax_na._plan import HopperTilings, Plan
from jax_na._problem import Operands, Problem

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

    The kernels are the portable ones.
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


# ---- Fused ---------------------------------------------------------------------------


def _channels(operands: Operands) -> int:
    return max(operands.query.shape[-1], operands.value.shape[-1])


def _row_bytes(operands: Operands) -> int:
    itemsize = operands.query.dtype.itemsize
    return _shared_memory.row_bytes(_channels(operands), itemsize)


def _bias_entries(problem: Problem, operands: Operands) -> int | None:
    return None if operands.bias is None else math.prod(problem.bias_shape)


def _fused_forward(
    problem: Problem, operands: Operands, plan: Plan
) -> tuple[Launch, ...]:
    shape = (plan.forward.rows, plan.forward.columns)
    entries = _bias_entries(problem, operands)
    return (
        Launch("forward", _shared_memory.forward(_row_bytes(operands), shape, entries)),
    )


def _fused_backward(
    problem: Problem, operands: Operands, plan: Plan
) -> tuple[Launch, ...]:
    row_bytes = _row_bytes(operands)
    entries = _bias_entries(problem, operands)
    shape = (plan.dquery.rows, plan.dquery.columns)
    found = [
        Launch("delta", 0),
        Launch("dquery", _shared_memory.dquery(row_bytes, shape, entries)),
    ]
    if plan.dbias is not None and entries is not None:
        shape = (plan.dbias.rows, plan.dbias.columns)
        found.append(Launch("dbias", _shared_memory.dbias(row_bytes, shape, entries)))
        if plan.bias_splits > 1:
            found.append(Launch("sum of dbias", 0))

    shape = (plan.dkey.rows, plan.dkey.columns)
    itemsize = operands.query.dtype.itemsize
    size = _shared_memory.dkey(row_bytes, shape, itemsize, entries)
    # The sums of both do not fit the registers where heads are wide.
    wide = _channels(operands) > 128
    found += _key_and_value("d{}", wide, size)
    if operands.additional_key is not None:
        size = _shared_memory.dkey(row_bytes, shape, itemsize, None)
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
        names = ("delta", "dquery", "dkey, dvalue", "dkey", "dvalue")
        rest = (launch for launch in backward if launch.kernel not in names)
        if "gradients" in tilings:
            own = [
                Launch("delta", 0),
                Launch("dquery, dkey, dvalue", _HOPPER_SHARED),
                Launch("sum of dquery", 0),
            ]
        else:
            own = [Launch(name, _HOPPER_SHARED) for name in ("dquery", "dkey, dvalue")]
            if not _dquery_makes_delta(problem, operands, tilings["dquery"]):
                own.insert(0, Launch("delta", 0))
        backward = (*own, *rest)
    return forward, backward


def _dquery_makes_delta(
    problem: Problem, operands: Operands, tiling: _tiling_sm90.Tiling
) -> bool:
    """As in ``cuda/sm90/backward.cu``: by the most boxes that a tile visits."""
    if _tiling_sm90.DQUERY.padded(_channels(operands)) < 96:
        return False
    boxes = 1
    grid = operands.key.shape[-problem.rank - 2 : -2]
    for axis, length in enumerate(grid):
        rows = tiling.row_box[axis] * (tiling.kernel.groups if axis == 0 else 1)
        seen = rows + problem.kernel_size[axis] + problem.stride[axis] - 2
        most = min(seen, -(-length // problem.dilation[axis]))
        boxes *= -(-most // tiling.column_box[axis])
    return boxes >= 12


# ---- Products ------------------------------------------------------------------------


def _gemm(operands: Operands) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    head_dim, value_dim = operands.query.shape[-1], operands.value.shape[-1]
    element = operands.query.dtype.itemsize

    def product(function: str, name: str, channels: int) -> Launch:
        padded = next(dim for dim in (32, 64, 128, 256) if channels <= dim)
        row_bytes = padded * element
        rows = 64 if row_bytes <= 512 else 32
        columns = 64 if row_bytes <= 256 else 32
        tables = 3 * _shared_memory.aligned(8 * columns + 12 * columns // 32, 8)
        run = 16
        if function == "pair":
            stages = 2 if row_bytes <= 512 else 1
            size = (rows + stages * columns) * row_bytes
            size += rows * (4 * columns + 16 + run)
        elif function == "gather":
            size = 2 * columns * row_bytes + 2 * rows * (element * columns + 16 + run)
            size += 16  # zeros
        else:
            size = 2 * columns * (row_bytes + 240) + 3 * columns * run + 16
            tables += 60  # frame
        tables += -tables % 8
        return Launch(
            name,
            _shared_memory.aligned(size + tables + _shared_memory.row_tables(rows)),
        )

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
