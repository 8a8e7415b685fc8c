"""What one call does: the implementation, why not the others, and its work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from jax_na import _ops, _primitives, _support, _window
from jax_na._launches import Launch, launches
from jax_na._plan import Plan, make_plan
from jax_na._problem import Operands, Problem


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The plan of one call.

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
        forward_launches: the CUDA kernels of the forward pass in their order, each with
            its shared memory; None on other platforms and for ``'xla'``. What XLA
            computes between them, softmax for ``'gemm'``, is not among them.
        backward_launches: the same of all gradients that the call can have; XLA
            computes ``sum(dout * out)`` before them.
    """

    platform: str
    implementation: str
    refusals: Mapping[str, str]
    visible_pairs: int
    forward_flops: int
    backward_flops: int
    plan: Plan | None
    forward_launches: tuple[Launch, ...] | None
    backward_launches: tuple[Launch, ...] | None

    @property
    def visited_over_useful(self) -> float | None:
        """Pairs that the forward kernel computes for each visible one, if known."""
        if self.plan is None:
            return None
        return self.plan.forward.visited_pairs / self.visible_pairs

    def __str__(self) -> str:
        lines = [
            f"{self.implementation!r} on {self.platform}",
            f"useful work: {self.forward_flops / 1e9:.4g} GFLOP forward, "
            f"{self.backward_flops / 1e9:.4g} GFLOP backward",
        ]
        if self.plan is not None:
            lines.append(f"visited/useful {self.visited_over_useful:.2f}, {self.plan}")
        for kind in ("forward", "backward"):
            found = getattr(self, f"{kind}_launches")
            if found is not None:
                kernels = ", ".join(map(str, found))
                lines.append(f"{kind} launches, with shared memory: {kernels}")
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
    forward = backward = None
    if platform == "cuda" and chosen != "xla":
        forward, backward = launches(chosen, problem, operands, plan)
    return Explanation(
        platform,
        chosen,
        refusals,
        pairs,
        flops,
        flops * 5 // 2,
        plan,
        forward,
        backward,
    )


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
