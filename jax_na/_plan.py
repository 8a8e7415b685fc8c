"""The plan of a native call: what its kernels get beyond the problem itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax_na import _tiling
from jax_na._native import Attributes
from jax_na._problem import Operands, Problem

#: How many CTAs keep a large GPU busy, and the most memory for partial sums.
_WANTED_CTAS = 528
_WORKSPACE_FLOATS = (16 << 20) // 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the tensor-core kernels cut a call.

    Attributes:
        forward: boxes of the forward pass, whose tiles own queries.
        dquery: the same of the query's and the bias's gradient.
        dkey: boxes of the gradients of key and value, whose tiles own keys.
        bias_splits: CTAs that share one table of the bias's gradient.
        additional_splits: CTAs that share the queries of 64 additional keys.
    """

    forward: _tiling.Tiling
    dquery: _tiling.Tiling
    dkey: _tiling.Tiling
    bias_splits: int
    additional_splits: int

    @property
    def forward_attributes(self) -> Attributes:
        """What the custom call of the forward pass carries of it."""
        return (
            ("query_tile", self.forward.row_tile),
            ("key_box", self.forward.column_box),
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
    dquery = _tiling.plan_rows_are_queries(queries, variant.dquery, model)
    return Plan(
        _tiling.plan_rows_are_queries(queries, variant.forward, model),
        dquery,
        _tiling.plan_rows_are_keys(keys, variant.dkey, model),
        _bias_splits(problem, operands, dquery.tiles),
        _additional_splits(problem, operands),
    )


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
