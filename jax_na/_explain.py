"""What one call does: the implementation, why not the others, and its work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from jax_na import _ops, _primitives, _support, _tiling, _tiling_sm90, _window
from jax_na._launches import Launch, hopper_launches, launches
from jax_na._plan import Plan, is_deterministic, make_plan
from jax_na._problem import DIFFERENTIABLE, Operands, Problem


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What runs a call on one kind of NVIDIA GPU.

    Attributes:
        boxes: of rows and columns that they work on, and the work that this makes, of
            ``"forward"``, ``"dquery"`` and ``"dkey_dvalue"``, or ``"gradients"`` in place
            of these two, and ``"dbias"`` where there is a bias; empty for kernels that do
            not plan.
        visited_over_useful: pairs that the forward kernel computes for each visible one,
            None likewise.
        forward: launches of the forward pass in their order, each with its shared memory.
            What XLA computes between them, softmax for ``'gemm'``, is not among them.
        backward: the same of all gradients that the call can have; before those of
            ``'naive'`` and ``'gemm'`` XLA computes ``sum(dout * out)``.
    """

    boxes: Mapping[str, _tiling.Tiling | _tiling_sm90.Tiling]
    visited_over_useful: float | None
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]

    def __str__(self) -> str:
        lines = [f"  boxes of {name}: {tiling}" for name, tiling in self.boxes.items()]
        if self.visited_over_useful is not None:
            lines.append(f"  visited/useful {self.visited_over_useful:.2f}")
        for kind in ("forward", "backward"):
            kernels = ", ".join(map(str, getattr(self, kind)))
            lines.append(f"  {kind} launches, with shared memory: {kernels}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The plan of one call.

    A lowered program runs on every device of its platform, and what runs there depends on
    the device: on Hopper GPUs (compute capability 9.0) ``'fused'`` has kernels of its own.

    Attributes:
        platform: for which the call was planned.
        implementation: the one that runs it.
        refusals: why each of the others that cannot run it does not.
        visible_pairs: pairs of a query and a key that it sees, of one head and sample;
            an upper bound where a frame decides them at run time.
        forward_flops: useful floating-point operations of the forward pass,
            ``2 (D + Dv)`` for every visible pair, head and sample.
        backward_flops: the same of the backward pass for query, key and value.
        plan: how the kernels cut the call, None for those that do not plan.
        compute_capability: that of the default CUDA device, None where there is none.
        portable: the kernels that any NVIDIA GPU can run; None on other platforms and
            for ``'xla'``.
        hopper: those that run the call on Hopper GPUs, where they differ from ``portable``.
        hopper_refusals: by function, ``"forward"`` or ``"backward"``: why the kernels for
            Hopper do not run it even there.
    """

    platform: str
    implementation: str
    refusals: Mapping[str, str]
    visible_pairs: int
    forward_flops: int
    backward_flops: int
    plan: Plan | None
    compute_capability: tuple[int, int] | None
    portable: Kernels | None
    hopper: Kernels | None
    hopper_refusals: Mapping[str, str]

    @property
    def kernels(self) -> Kernels | None:
        """Those of the default CUDA device; the portable ones where there is none."""
        on_hopper = self.compute_capability == (9, 0) and self.hopper is not None
        return self.hopper if on_hopper else self.portable

    @property
    def visited_over_useful(self) -> float | None:
        """Pairs that the forward kernel computes for each visible one, if known."""
        return None if self.kernels is None else self.kernels.visited_over_useful

    def _kernels_by_device(self) -> Iterator[tuple[str, Kernels]]:
        """What may run the call: those of all devices where there is none at hand."""
        if self.portable is None:
            return
        if self.compute_capability is not None:
            major, minor = self.compute_capability
            assert self.kernels is not None
            yield f"compute capability {major}.{minor}", self.kernels
        elif self.hopper is None:
            yield "NVIDIA GPUs", self.portable
        else:
            yield "Hopper GPUs", self.hopper
            yield "other NVIDIA GPUs", self.portable

    def __str__(self) -> str:
        lines = [
            f"{self.implementation!r} on {self.platform}",
            f"useful work: {self.forward_flops / 1e9:.4g} GFLOP forward, "
            f"{self.backward_flops / 1e9:.4g} GFLOP backward",
        ]
        for device, kernels in self._kernels_by_device():
            lines += [f"on {device}:", str(kernels)]
        for function, reason in self.hopper_refusals.items():
            lines.append(f"no {function} kernels for Hopper: {reason}")
        for implementation, reason in self.refusals.items():
            lines.append(f"not {implementation!r}: {reason}")
        return "\n".join(lines)


def explain(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sequence[int],
    *,
    platform: str | None = None,
    **options: Unpack[_ops.Options],
) -> Explanation:
    """What :func:`jax_na.neighborhood_attention` would do with the same arguments.

    Computes nothing: ``query``, ``key`` and ``value`` may be ``jax.ShapeDtypeStruct``.

    Args:
        query: ``[*batch, *grid, N, D]``; this and the other arguments are those of
            :func:`jax_na.neighborhood_attention`.
        key: ``[*batch, *grid, K, D]``.
        value: ``[*batch, *grid, K, Dv]``.
        kernel_size: one entry per grid axis.
        platform: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``, ... Default: that of the
            default backend.
        **options: keyword arguments of :func:`jax_na.neighborhood_attention`.

    Raises:
        TypeError, ValueError, NotImplementedError: as the call itself would.
    """
    if platform is None:
        backend = jax.default_backend()
        platform = "cuda" if backend == "gpu" else backend
    call: dict[str, Any] = dict(options)
    implementation = call.pop("implementation", None)
    _support.check_implementation(implementation)
    call.pop("return_lse", None)
    problem: Any = None

    def canonical(query: Any, key: Any, value: Any) -> Operands:
        nonlocal problem
        problem, operands = _ops.canonical_call(
            _ops.rank_of(kernel_size), query, key, value, kernel_size, **call
        )
        return operands

    operands = jax.eval_shape(canonical, query, key, value)
    traits = _primitives.traits(operands)
    refusals = {
        name: reason
        for name in _support.IMPLEMENTATIONS
        if (reason := _support.refusal(name, platform, traits)) is not None
    }
    pairs = _visible_pairs(problem, operands)
    *batch_and_grid, heads, head_dim = operands.query.shape
    copies = heads * math.prod(batch_and_grid[: -problem.rank])
    flops = 2 * pairs * copies * (head_dim + operands.value.shape[-1])
    chosen = _support.choose(implementation, platform, traits)
    plan = make_plan(chosen, platform, problem, operands)
    portable = hopper = None
    hopper_refusals: dict[str, str] = {}
    if platform == "cuda" and chosen != "xla":
        portable = _portable_kernels(chosen, problem, operands, plan, pairs)
    if chosen == "fused" and plan is not None:
        hopper, hopper_refusals = _hopper_kernels(problem, operands, plan, pairs)
    return Explanation(
        platform,
        chosen,
        refusals,
        pairs,
        flops,
        flops * 5 // 2,
        plan,
        _compute_capability() if platform == "cuda" else None,
        portable,
        hopper,
        hopper_refusals,
    )


def _compute_capability() -> tuple[int, int] | None:
    """Of the default CUDA device, if there is one."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def _portable_kernels(
    implementation: str,
    problem: Problem,
    operands: Operands,
    plan: Plan | None,
    visible_pairs: int,
) -> Kernels:
    found = launches(implementation, problem, operands, plan)
    if plan is None:
        return Kernels({}, None, *found)
    return Kernels(
        _portable_boxes(plan), plan.forward.visited_pairs / visible_pairs, *found
    )


def _portable_boxes(plan: Plan) -> dict[str, Any]:
    boxes = {"forward": plan.forward, "dquery": plan.dquery, "dkey_dvalue": plan.dkey}
    return boxes if plan.dbias is None else {**boxes, "dbias": plan.dbias}


def _hopper_kernels(
    problem: Problem, operands: Operands, plan: Plan, visible_pairs: int
) -> tuple[Kernels | None, dict[str, str]]:
    """What runs on Hopper GPUs, if it is not portable, and why what is portable is."""
    boxes, refusals = _portable_boxes(plan), {}
    backward = plan.hopper_gradients_of(DIFFERENTIABLE, is_deterministic(problem))
    functions = {"forward": plan.hopper_forward, "backward": backward}
    for function, tilings in functions.items():
        if isinstance(tilings, str):
            refusals[function] = tilings
            continue
        if "gradients" in tilings:
            del boxes["dquery"], boxes["dkey_dvalue"]
        boxes.update(tilings)
    if len(refusals) == len(functions):
        return None, refusals
    ratio = boxes["forward"].visited_pairs / visible_pairs
    launches = hopper_launches(problem, operands, plan, backward)
    return Kernels(boxes, ratio, *launches), refusals


def _visible_pairs(problem: Problem, operands: Operands) -> int:
    """Of one head and sample; every axis counts on its own."""
    grid = operands.query.shape[-problem.rank - 2 : -2]
    pairs = 1
    for axis, length in enumerate(grid):
        if operands.frame is not None:
            pairs *= length * problem.kernel_size[axis]
            continue
        _, lo, hi = _window.key_interval(
            np.arange(length),
            length,
            problem.kernel_size[axis],
            problem.stride[axis],
            problem.dilation[axis],
            problem.is_causal[axis],
        )
        pairs *= int(np.sum(hi - lo))
    return pairs
