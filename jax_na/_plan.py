"""The plan of a native call: what its kernels get beyond the problem itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax_na import _support, _tiling, _tiling_sm90
from jax_na._native import Attributes
from jax_na._problem import Operands, Problem

#: How many CTAs keep a large GPU busy, and the most memory for partial sums.
_WANTED_CTAS = 528
_WORKSPACE_FLOATS = (16 << 20) // 4


@dataclasses.dataclass(frozen=True)
class HopperPlan:
    """How the kernels for Hopper cut a call, where it runs on such a device.

    Attributes:
        forward: boxes of the forward pass, whose row boxes own queries.
    """

    forward: _tiling_sm90.Tiling

    @property
    def forward_attributes(self) -> Attributes:
        """What the custom call of the forward pass carries of it."""
        return _hopper_attributes("forward", self.forward)


def _hopper_attributes(name: str, tiling: _tiling_sm90.Tiling) -> Attributes:
    """Of a pass, as ``ffi/hopper.h`` reads them."""
    return (
        (f"sm90_{name}_row_box", tiling.row_box),
        (f"sm90_{name}_column_box", tiling.column_box),
        (f"sm90_{name}_kernel", (tiling.kernel.columns, tiling.kernel.groups)),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the tensor-core kernels cut a call.

    A program is lowered once for all devices of a platform, so that a call carries a plan
    for every kind of them.

    Attributes:
        forward: boxes of the forward pass, whose tiles own queries.
        dquery: the same of the query's and the bias's gradient.
        dkey: boxes of the gradients of key and value, whose tiles own keys.
        bias_splits: CTAs that share one table of the bias's gradient.
        additional_splits: CTAs that share the queries of 64 additional keys.
        hopper: what the kernels for Hopper do instead, or why they do not run the call.
    """

    forward: _tiling.Tiling
    dquery: _tiling.Tiling
    dkey: _tiling.Tiling
    bias_splits: int
    additional_splits: int
    hopper: HopperPlan | str

    @property
    def forward_attributes(self) -> Attributes:
        """What the custom call of the forward pass carries of it."""
        return (
            ("query_tile", self.forward.row_tile),
            ("key_box", self.forward.column_box),
            *(() if isinstance(self.hopper, str) else self.hopper.forward_attributes),
        )

    @property
    def backward_attributes(self) -> Attributes:
        """What the custom call of the backward pass carries of it."""
        return (
            ("query_tile", self.dquery.row_tile),
            ("key_box", self.dquery.column_box),
            ("query_box", self.dkey.column_box),
            ("key_tile", self.dkey.row_tile),
            ("bias_splits", self.bias_splits),
            ("additional_splits", self.additional_splits),
        )


def make_plan(
    implementation: str, platform: str, problem: Problem, operands: Operands
) -> Plan | None:
    """The plan of a call; None for kernels that need none."""
    if platform != "cuda" or implementation not in ("fused", "gemm"):
        return None
    channels = max(operands.query.shape[-1], operands.value.shape[-1])
    variant = _tiling.variant_of(channels, operands.query.dtype.itemsize)
    model = _tiling.CostModel(wide=variant.wide)
    queries, keys = _axes(problem, operands.query), _axes(problem, operands.key)
    forward = _tiling.plan_rows_are_queries(queries, variant.forward, model)
    dquery = _tiling.plan_rows_are_queries(queries, variant.dquery, model)
    hopper: HopperPlan | str = f"{implementation!r} has no kernels for Hopper"
    if implementation == "fused":
        hopper = _hopper_plan(problem, operands, model.cost(forward))
    return Plan(
        forward,
        dquery,
        _tiling.plan_rows_are_keys(keys, variant.dkey, model),
        _bias_splits(problem, operands, dquery.tiles),
        _additional_splits(problem, operands),
        hopper,
    )


def _hopper_plan(
    problem: Problem, operands: Operands, portable_cost: float
) -> HopperPlan | str:
    """Or why there is none. ``portable_cost`` is that of the portable forward pass."""
    query, value = operands.query, operands.value
    channels = max(query.shape[-1], value.shape[-1])
    refusal = _support.hopper_refusal(query.dtype, problem.dilation)
    if refusal is not None:
        return refusal
    padded = _tiling_sm90.padded(channels)
    forward = _tiling_sm90.plan_rows_are_queries(
        _axes(problem, query), _tiling_sm90.FORWARD[padded], _copies(problem, query)
    )
    ratio = time_over_portable(forward, padded, portable_cost)
    if ratio > 1:
        return (
            f"by the planner's estimate they take {ratio:.2f} times as long as the "
            "portable kernels"
        )
    return HopperPlan(forward)


def time_over_portable(
    tiling: _tiling_sm90.Tiling, padded: int, portable_cost: float
) -> float:
    """Of a pass on a Hopper GPU, by its kernels for Hopper and by the portable ones."""
    portable_cycles = portable_cost * _tiling_sm90.PORTABLE_CYCLES[padded]
    return _tiling_sm90.CostModel().cycles(tiling) / portable_cycles


def workspace_shape(
    plan: Plan,
    problem: Problem,
    operands: Operands,
    wrt: tuple[str, ...],
) -> tuple[Any, ...] | None:
    """``[B or 1, K, elements]`` of the backward pass's partial sums; None for none."""
    *rows, key_heads, _ = operands.key.shape
    batch = tuple(rows[: -problem.rank])
    bias = additional = 0
    if "bias" in wrt and plan.bias_splits > 1:
        group = operands.query.shape[-2] // key_heads
        bias = plan.bias_splits * group * math.prod(problem.bias_shape)
    if plan.additional_splits > 1:
        channels = sum(
            getattr(operands, name).shape[-1]
            for name in ("additional_key", "additional_value")
            if name in wrt
        )
        if channels:
            tokens = operands.additional_key.shape[-3]
            additional = plan.additional_splits * tokens * channels
    if bias == additional == 0:
        return None
    if not bias or operands.bias.shape[: len(batch)] == batch:
        return (*batch, key_heads, bias + additional)
    ones = (1,) * len(batch)
    return (*ones, key_heads, bias + additional * math.prod(batch))


def _axes(problem: Problem, array: Any) -> tuple[_tiling.Axis, ...]:
    """The grid of ``array``; where a frame moves windows, the plan is the whole grid's."""
    return tuple(
        _tiling.Axis(*parameters)
        for parameters in zip(
            array.shape[-problem.rank - 2 : -2],
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            strict=True,
        )
    )


def _copies(problem: Problem, query: Any) -> int | None:
    """Heads of all samples; None where a batch size is symbolic."""
    sizes = (*query.shape[: -problem.rank - 2], query.shape[-2])
    return math.prod(sizes) if all(isinstance(n, int) for n in sizes) else None


def _samples(shape: tuple[Any, ...]) -> int:
    """Product of batch sizes; a symbolic one counts as 1, the smallest it may be."""
    return math.prod(size for size in shape if isinstance(size, int))


def _splits(sums: int, floats: int, most: int) -> int:
    """Into how many partial sums to split ``sums`` sums, ``floats`` numbers in all."""
    wanted = -(-_WANTED_CTAS // max(1, sums))
    return max(1, min(wanted, _WORKSPACE_FLOATS // max(1, floats), most))


def _bias_splits(problem: Problem, operands: Operands, tiles: int) -> int:
    if operands.bias is None:
        return 1
    batch_rank = operands.query.ndim - problem.rank - 2
    samples = _samples(operands.query.shape[:batch_rank])
    own = _samples(operands.bias.shape[:batch_rank])
    tables = own * operands.query.shape[-2]
    most = tiles * max(1, samples // max(1, own))
    return _splits(tables, tables * math.prod(problem.bias_shape), most)


def _additional_splits(problem: Problem, operands: Operands) -> int:
    if operands.additional_key is None:
        return 1
    *batch, tokens, key_heads, head_dim = operands.additional_key.shape
    channels = head_dim + operands.additional_value.shape[-1]
    sums = _samples(tuple(batch)) * key_heads
    queries = math.prod(operands.query.shape[-problem.rank - 2 : -2])
    return _splits(sums * -(-tokens // 64), sums * tokens * channels, -(-queries // 64))
