"""The plan of a native call: what its kernels get beyond the problem itself."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from jax_na import _support, _tiling, _tiling_sm90
from jax_na._native import Attributes
from jax_na._problem import Operands, Problem

#: How many CTAs keep a large GPU busy, twelve for each multiprocessor where their shares of
#: the bias's gradient should end at the same time, and the most memory for partial sums.
_WANTED_CTAS, _WANTED_BIAS_CTAS = 528, 1584
_WORKSPACE_FLOATS = (16 << 20) // 4

#: What portable kernels take over their estimate for tiles that are cut to the stride, and
#: short: 1.9 times with windows of 7x7 as strides, which an H200 showed.
_TILES_OF_BLOCKS = 1.5

#: Of a workspace, for every sample and head of keys: as in ``cuda/sm90/backward.cu``.
_TILE_COUNTER = 4


#: Boxes by launch, or why there are none: what the kernels for Hopper do on such a device.
HopperTilings: TypeAlias = Mapping[str, _tiling_sm90.Tiling] | str


def _hopper_attributes(tilings: HopperTilings) -> Attributes:
    """As ``ffi/hopper.h`` reads them."""
    if isinstance(tilings, str):
        return ()
    return tuple(
        (f"sm90_{launch}_{name}", value)
        for launch, tiling in tilings.items()
        for name, value in (
            ("row_box", tiling.row_box),
            ("column_box", tiling.column_box),
            ("kernel", (tiling.kernel.columns, tiling.kernel.groups)),
            ("masks_by_product", (int(tiling.masks_by_product),)),
        )
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the tensor-core kernels cut a call.

    A program is lowered once for all devices of a platform, so that a call carries a plan
    for every kind of them.

    Attributes:
        forward: boxes of the forward pass, whose tiles own queries.
        dquery: the same of the query's gradient.
        dbias: the same of the bias's gradient; None without a bias.
        dkey: boxes of the gradients of key and value, whose tiles own keys.
        bias_splits: CTAs that share one table of the bias's gradient.
        additional_splits: CTAs that share the queries of 64 additional keys.
        hopper_forward: boxes ``"forward"``; or why the portable kernels run there too.
        hopper_backward: the same of the gradients of query, key and value, boxes
            ``"dquery"`` and ``"dkey_dvalue"``.
        hopper_gradients: boxes ``"gradients"`` of the kernel that makes all three at once,
            with sums in any order; or why those of ``hopper_backward`` make them always.
    """

    forward: _tiling.Tiling
    dquery: _tiling.Tiling
    dbias: _tiling.Tiling | None
    dkey: _tiling.Tiling
    bias_splits: int
    additional_splits: int
    hopper_forward: HopperTilings
    hopper_backward: HopperTilings
    hopper_gradients: HopperTilings

    def hopper_gradients_of(
        self, wrt: Collection[str], deterministic: bool
    ) -> HopperTilings:
        """What makes the gradients of query, key and value on Hopper GPUs.

        Args:
            wrt: names of the operands whose gradients are asked for.
            deterministic: whether sums must have a fixed order.
        """
        if (
            makes_all(wrt)
            and not deterministic
            and not isinstance(self.hopper_gradients, str)
        ):
            return self.hopper_gradients
        return self.hopper_backward

    @property
    def forward_attributes(self) -> Attributes:
        """What the custom call of the forward pass carries of it."""
        return (
            ("query_tile", self.forward.row_tile),
            ("key_box", self.forward.column_box),
            *_hopper_attributes(self.hopper_forward),
        )

    def backward_attributes(
        self, wrt: Collection[str], deterministic: bool
    ) -> Attributes:
        """The same of the backward pass; see :meth:`hopper_gradients_of`."""
        bias: Attributes = ()
        if self.dbias is not None:
            bias = (
                ("bias_query_tile", self.dbias.row_tile),
                ("bias_key_box", self.dbias.column_box),
            )
        return (
            ("query_tile", self.dquery.row_tile),
            ("key_box", self.dquery.column_box),
            *bias,
            ("query_box", self.dkey.column_box),
            ("key_tile", self.dkey.row_tile),
            ("bias_splits", self.bias_splits),
            ("additional_splits", self.additional_splits),
            *_hopper_attributes(self.hopper_gradients_of(wrt, deterministic)),
        )


def make_plan(
    implementation: str, platform: str, problem: Problem, operands: Operands
) -> Plan | None:
    """The plan of a call; None for kernels that need none."""
    if platform != "cuda" or implementation not in ("fused", "gemm"):
        return None
    variant = _tiling.variant_of(_channels(operands), operands.query.dtype.itemsize)
    model = _tiling.CostModel(wide=variant.wide)
    query, key = operands.query, operands.key
    queries, keys = _axes(problem, query, key), _axes(problem, key, query)
    forward = _tiling.plan_rows_are_queries(queries, variant.forward, model)
    dquery = _tiling.plan_rows_are_queries(queries, variant.dquery, model)
    dbias = None
    if operands.bias is not None:
        dbias = _tiling.plan_rows_are_queries(queries, variant.dbias, model)
    dkey = _tiling.plan_rows_are_keys(keys, variant.dkey, model)
    hopper_forward: HopperTilings = f"{implementation!r} has no kernels for Hopper"
    hopper_backward = hopper_gradients = hopper_forward
    if implementation == "fused":
        hopper_forward = _hopper_tilings(
            "forward", problem, operands, model, {_tiling_sm90.FORWARD: forward}
        )
        hopper_backward = _hopper_tilings(
            "backward",
            problem,
            operands,
            model,
            {_tiling_sm90.DQUERY: dquery, _tiling_sm90.DKEY_DVALUE: dkey},
        )
        hopper_gradients = _gradients_tilings(problem, operands, hopper_backward)
    return Plan(
        forward,
        dquery,
        dbias,
        dkey,
        _bias_splits(problem, operands, dbias),
        _additional_splits(problem, operands),
        hopper_forward,
        hopper_backward,
        hopper_gradients,
    )


def _hopper_tilings(
    function: str,
    problem: Problem,
    operands: Operands,
    model: _tiling.CostModel,
    portable: Mapping[_tiling_sm90.Pass, _tiling.Tiling],
) -> HopperTilings:
    """What the kernels for Hopper do instead of ``portable`` ones, of cost ``model``."""
    query, key, channels = operands.query, operands.key, _channels(operands)
    group = query.shape[-2] // key.shape[-2]
    bias = 0
    if operands.bias is not None:
        bias = math.prod(problem.bias_shape) * (group if function == "backward" else 1)
    refusal = _support.hopper_refusal(
        function, query.dtype, channels, problem.dilation, bias
    )
    if refusal is not None:
        return refusal
    tilings, own_cycles, portable_cycles = {}, 0.0, 0.0
    for which, other in portable.items():
        rows, columns, members = query, key, 1
        if which.rows_are_keys:
            rows, columns, members = key, query, group
        axes, copies = _axes(problem, rows, columns), _copies(problem, rows)
        tiling = _tiling_sm90.plan(
            which, channels, axes, copies, members, operands.bias is not None
        )
        tilings[which.name] = tiling
        own_cycles += which.cycles_of(tiling, copies) / members
        cost = model.cost(other)
        if max(problem.stride) > 1 and math.prod(other.row_tile) < 0.9 * other.rows:
            cost *= _TILES_OF_BLOCKS
        portable_cycles += which.portable_cycles_of(other, cost, channels, copies)
    if is_faster(own_cycles, portable_cycles):
        return tilings
    return (
        f"by the planner's estimate they take {own_cycles / portable_cycles:.2f} times as "
        "long as the portable kernels"
    )


def makes_all(wrt: Collection[str]) -> bool:
    """Whether gradients on both sides, queries and keys, are asked for."""
    return "query" in wrt and ("key" in wrt or "value" in wrt)


def is_faster(cycles: float, portable_cycles: float) -> bool:
    """Whether kernels for Hopper make up for what they cannot fill."""
    return cycles <= portable_cycles


def _gradients_tilings(
    problem: Problem, operands: Operands, apart: HopperTilings
) -> HopperTilings:
    """All three gradients at once, instead of ``apart`` in two launches."""
    if isinstance(apart, str):
        return apart
    if operands.additional_key is not None:
        return "they do not take additional keys"
    query, key, channels = operands.query, operands.key, _channels(operands)
    members = query.shape[-2] // key.shape[-2]
    if not _tiling_sm90.GRADIENTS.takes(channels):
        return f"they do not take head dimension {channels}"
    axes, copies = _axes(problem, key, query), _copies(problem, key)
    tiling = _tiling_sm90.plan(
        _tiling_sm90.GRADIENTS,
        channels,
        axes,
        copies,
        members,
        operands.bias is not None,
    )
    queries = math.prod(query.shape[-problem.rank - 2 : -2])
    cycles = _tiling_sm90.GRADIENTS.cycles_of(tiling, copies)
    cycles += members * _tiling_sm90.cycles_beside_gradients(queries, channels)
    apart_cycles = members * _tiling_sm90.DQUERY.cycles_of(
        apart["dquery"], _copies(problem, query)
    ) + _tiling_sm90.DKEY_DVALUE.cycles_of(apart["dkey_dvalue"], copies)
    fills = _tiling_sm90.fills_device(tiling, copies)
    if is_faster_at_once(cycles, apart_cycles, fills):
        return {"gradients": tiling}
    if not fills:
        return "so small a call takes fewer launches without sums in memory"
    return (
        f"by the planner's estimate it takes {cycles / apart_cycles:.2f} times as long "
        "to make all gradients at once"
    )


def is_faster_at_once(cycles: float, apart_cycles: float, fills_device: bool) -> bool:
    """Whether fewer products make up for sums in memory, and for launches more."""
    return fills_device and cycles <= apart_cycles


def is_deterministic(problem: Problem) -> bool:
    """Whether gradients must not use atomics, resolved when the program is lowered."""
    if problem.deterministic_grads is not None:
        return problem.deterministic_grads
    flags = os.environ.get("XLA_FLAGS", "").split()
    options = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")
    return any(
        flag in (f"--{option}", f"--{option}=true", f"--{option}=1")
        for flag in flags
        for option in options
    )


def workspace_shape(
    plan: Plan,
    problem: Problem,
    operands: Operands,
    wrt: tuple[str, ...],
    deterministic: bool,
) -> tuple[Any, ...] | None:
    """``[B or 1, K, elements]`` of the backward pass's partial sums; None for none."""
    *rows, key_heads, _ = operands.key.shape
    batch = tuple(rows[: -problem.rank])
    bias = samples = 0
    hopper = plan.hopper_gradients_of(wrt, deterministic)
    if not isinstance(hopper, str) and makes_all(wrt):
        samples += _TILE_COUNTER
        if "gradients" in hopper:
            group = operands.query.shape[-2] // key_heads
            queries = math.prod(operands.query.shape[len(batch) : -2])
            samples += group * _tiling_sm90.sums(queries, _channels(operands))
    if "bias" in wrt and plan.bias_splits > 1:
        group = operands.query.shape[-2] // key_heads
        bias = plan.bias_splits * group * math.prod(problem.bias_shape)
        bias = -(-bias // 4) * 4  # what follows it is written in vectors
    if plan.additional_splits > 1:
        channels = sum(
            getattr(operands, name).shape[-1]
            for name in ("additional_key", "additional_value")
            if name in wrt
        )
        if channels:
            tokens = operands.additional_key.shape[-3]
            samples += plan.additional_splits * tokens * channels
    if bias == samples == 0:
        return None
    if not bias or operands.bias.shape[: len(batch)] == batch:
        return (*batch, key_heads, bias + samples)
    ones = (1,) * len(batch)
    return (*ones, key_heads, bias + samples * math.prod(batch))


def _channels(operands: Operands) -> int:
    return max(operands.query.shape[-1], operands.value.shape[-1])


def _axes(problem: Problem, rows: Any, columns: Any) -> tuple[_tiling.Axis, ...]:
    """The grid; that of a frame is known when the program runs, and at least the arrays."""
    grid = slice(-problem.rank - 2, -2)
    return tuple(
        _tiling.Axis(max(lengths), *window, *lengths)
        for lengths, window in zip(
            zip(rows.shape[grid], columns.shape[grid], strict=True),
            zip(
                problem.kernel_size,
                problem.stride,
                problem.dilation,
                problem.is_causal,
                strict=True,
            ),
            strict=True,
        )
    )


def _copies(problem: Problem, array: Any) -> int | None:
    """Heads of all samples; None where a batch size is symbolic."""
    sizes = (*array.shape[: -problem.rank - 2], array.shape[-2])
    return math.prod(sizes) if all(isinstance(n, int) for n in sizes) else None


def _samples(shape: tuple[Any, ...]) -> int:
    """Product of batch sizes; a symbolic one counts as 1, the smallest it may be."""
    return math.prod(size for size in shape if isinstance(size, int))


def _splits(ctas: int, sums: int, floats: int, most: int) -> int:
    """Into how many partial sums to split ``sums`` sums, ``floats`` numbers in all."""
    wanted = -(-ctas // max(1, sums))
    return max(1, min(wanted, _WORKSPACE_FLOATS // max(1, floats), most))


def _bias_splits(
    problem: Problem, operands: Operands, tiling: _tiling.Tiling | None
) -> int:
    if tiling is None:
        return 1
    batch_rank = operands.query.ndim - problem.rank - 2
    samples = _samples(operands.query.shape[:batch_rank])
    own = _samples(operands.bias.shape[:batch_rank])
    tables = own * operands.query.shape[-2]
    most = tiling.boxes * max(1, samples // max(1, own))
    floats = tables * math.prod(problem.bias_shape)
    return _splits(_WANTED_BIAS_CTAS, tables, floats, most)


def _additional_splits(problem: Problem, operands: Operands) -> int:
    if operands.additional_key is None:
        return 1
    *batch, tokens, key_heads, head_dim = operands.additional_key.shape
    channels = head_dim + operands.additional_value.shape[-1]
    sums = _samples(tuple(batch)) * key_heads
    queries = math.prod(operands.query.shape[-problem.rank - 2 : -2])
    ctas, floats = sums * -(-tokens // 64), sums * tokens * channels
    return _splits(_WANTED_CTAS, ctas, floats, -(-queries // 64))
