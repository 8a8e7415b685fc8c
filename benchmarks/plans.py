"""Measures plans of the kernels for Hopper, and fits what the planner believes of them.

    python benchmarks/plans.py measure plans.jsonl   # on a Hopper GPU
    python benchmarks/plans.py read plans.jsonl < times.txt
    python benchmarks/plans.py fit plans.jsonl       # anywhere; needs SciPy

``measure`` times the plans that the planner likes best of every compiled kernel, for each
of the problems in ``plan_cases.json``, and appends a JSON line for each. ``read`` makes
such lines of what ``sm90_check time`` says, which takes a tenth of the time. ``fit`` prints
the numbers of ``jax_na/_tiling_sm90.py`` that explain the times best, and how far from the
best measured plan the plan is that the present numbers choose.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import cases
import jax
import numpy as np
import timing

import jax_na
from jax_na import _lowering, _tiling_sm90
from jax_na._plan import is_faster_at_once
from jax_na._tiling import Axis
from jax_na._tiling_sm90 import (
    DKEY_DVALUE,
    DQUERY,
    FORWARD,
    GRADIENTS,
    Pass,
    Tiling,
)

PASSES = {which.name: which for which in (FORWARD, DQUERY, DKEY_DVALUE, GRADIENTS)}

#: Passes that one step launches; the kernels for Hopper are launched in this order.
STEPS = (("forward", "dquery", "dkey_dvalue"), ("forward", "gradients"))

#: Cycles of all multiprocessors of an H200 in a millisecond, at the clock that it keeps.
CYCLES = 1.755e6 * 132


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One plan of one pass, and the milliseconds that its kernel took."""

    name: str
    case: cases.Case
    tiling: Tiling
    ms: float

    @property
    def which(self) -> Pass:
        return PASSES[self.name]

    @property
    def copies(self) -> int:
        return self.case.batch * self.case.heads

    @property
    def estimate(self) -> float:
        """Milliseconds, by the planner."""
        return self.which.cycles_of(self.tiling, self.copies) * self.copies / CYCLES

    @property
    def preference(self) -> Any:
        """The planner takes the plan whose preference is least."""
        boxes = (self.tiling.column_box, self.tiling.row_box)
        return self.estimate, *(tuple(-n for n in reversed(box)) for box in boxes)

    def to_json(self) -> str:
        return json.dumps(
            {
                "case": self.case.name,
                "pass": self.name,
                "kernel": [self.tiling.kernel.columns, self.tiling.kernel.groups],
                "row_box": self.tiling.row_box,
                "column_box": self.tiling.column_box,
                "masks_by_product": self.tiling.masks_by_product,
                "ms": self.ms,
            }
        )


def axes_of(case: cases.Case) -> tuple[Axis, ...]:
    parameters = (case.shape, case.window, case.stride, case.dilation, case.is_causal)
    return tuple(Axis(*axis) for axis in zip(*parameters, strict=True))


def planned(
    name: str,
    case: cases.Case,
    kernel: tuple[int, int],
    row_box: tuple[int, ...],
    column_box: tuple[int, ...],
    masks_by_product: bool,
    ms: float,
) -> Measurement | None:
    """Of the kernel with these columns and groups; None if it is not compiled any more."""
    which = PASSES[name]
    for compiled in which.kernels[which.padded(case.head_dim)]:
        if (compiled.columns, compiled.groups) == kernel:
            cut = (compiled, row_box, column_box, masks_by_product)
            tiling = _tiling_sm90.count(axes_of(case), which.interval, *cut)
            return Measurement(name, case, tiling, ms)
    return None


def load(path: pathlib.Path, problems: Iterable[cases.Case]) -> list[Measurement]:
    """Those of kernels that are still compiled."""
    by_name = {case.name: case for case in problems}
    found = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        lists = (tuple(entry[name]) for name in ("kernel", "row_box", "column_box"))
        rest = (entry["masks_by_product"], entry["ms"])
        found.append(planned(entry["pass"], by_name[entry["case"]], *lists, *rest))
    return [measurement for measurement in found if measurement is not None]


# ---- Measuring -----------------------------------------------------------------------


def candidates(which: Pass, case: cases.Case, per_kernel: int) -> list[Tiling]:
    """The plans of every kernel that the planner likes best; best first."""
    copies = case.batch * case.heads
    best = [
        found
        for kernel in which.kernels[which.padded(case.head_dim)]
        for found in _tiling_sm90.best_tilings(
            which, kernel, axes_of(case), copies, most=per_kernel
        )
    ]
    return [tiling for _, tiling in sorted(best, key=lambda found: found[0])]


def _kernel_milliseconds(
    case: cases.Case, tilings: dict[str, Tiling]
) -> dict[str, float]:
    """Of every pass, with these plans; those of the backward pass may be missing."""
    make_plan = _lowering.make_plan

    def with_tilings(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        assert plan is not None
        backward = {name: t for name, t in tilings.items() if name != "forward"}
        at_once = "gradients" in backward
        return dataclasses.replace(
            plan,
            hopper_forward={"forward": tilings["forward"]},
            hopper_backward="not measured" if at_once else backward or "not measured",
            hopper_gradients=backward if at_once else "not measured",
        )

    def attend(*arrays: jax.Array) -> jax.Array:
        return jax_na.neighborhood_attention(
            *arrays, implementation="fused", **case.window_arguments
        )

    query, key, value, cotangent = case.operands()

    def step(*arrays: jax.Array) -> Any:
        out, vjp = jax.vjp(attend, *arrays)
        return out, vjp(cotangent) if len(tilings) > 1 else ()

    with mock.patch.object(_lowering, "make_plan", with_tilings):
        call = jax.jit(step).lower(query, key, value).compile()
    kernels = timing.jax_kernels(lambda: call(query, key, value))
    # The kernels for Hopper are launched in the order of the passes.
    own = [ms for kernel, ms in kernels if "pass_kernel" in kernel]
    return dict(zip(tilings, own, strict=True))


def measure(case: cases.Case, per_kernel: int) -> Iterator[Measurement]:
    done: set[str] = set()
    for step in STEPS:
        passes = {
            name: candidates(PASSES[name], case, per_kernel)
            for name in step
            if PASSES[name].takes(case.head_dim)
        }
        new = passes.keys() - done
        done |= new
        for index in range(max((len(passes[name]) for name in new), default=0)):
            # A pass with fewer plans goes on with its first.
            tilings = {
                name: plans[index if index < len(plans) else 0]
                for name, plans in passes.items()
            }
            for name, ms in _kernel_milliseconds(case, tilings).items():
                if name in new and index < len(passes[name]):
                    yield Measurement(name, case, tilings[name], ms)


def read(lines: Iterable[str], problems: Iterable[cases.Case]) -> Iterator[Measurement]:
    """Of a line of ``sm90_check time``, whose problem ``sm90_problems.py cases`` named."""
    by_name = {case.name.replace(" ", "_"): case for case in problems}
    for line in lines:
        name, *words = line.split()
        name, *plans = name.split("/")
        if name not in by_name:
            continue
        case = by_name[name]
        times = {words[i]: float(words[i + 1]) for i in range(0, len(words), 3)}
        if "apart" in times:  # as in a backward pass, where tiles of keys are counted
            times["dkey_dvalue"] = round(times.pop("apart") - times["dquery"], 4)
        if "gradients" in times:  # sums in memory have an estimate of their own
            queries = _tiling_sm90.sums(case.tokens, case.head_dim)
            cycles = _tiling_sm90.SUM_CYCLES * queries * case.batch * case.heads
            times["gradients"] = round(times["gradients"] - cycles / CYCLES, 4)
        for (which, ms), start in zip(
            times.items(), range(0, len(plans), 5), strict=True
        ):
            groups, columns, *boxes, product = plans[start : start + 5]
            row_box, column_box = (
                tuple(int(n) for n in box.split(",")[-len(case.shape) :])
                for box in boxes
            )
            kernel = (int(columns), int(groups))
            cut = (row_box, column_box, product == "1")
            measurement = planned(which, case, kernel, *cut, ms)
            if measurement is not None:
                yield measurement


# ---- Fitting -------------------------------------------------------------------------


def _terms(measurement: Measurement) -> dict[Any, float]:
    """What the cycles per copy are a sum of, each times a number to be found."""
    tiling = measurement.tiling
    kernel = tiling.kernel
    rounds = _tiling_sm90.imbalance(tiling.tiles, kernel.pipelines, measurement.copies)
    dim = measurement.which.padded(measurement.case.head_dim)
    visits = "product_cycles" if tiling.masks_by_product else "cycles"
    masked = 0 if tiling.masks_by_product else tiling.masked_visits
    return {
        (visits, dim, kernel.columns, kernel.groups): rounds * tiling.visits,
        ("mask",): rounds * masked * kernel.columns,
        ("tile",): rounds * tiling.tiles * kernel.groups,
        ("skip",): rounds * (tiling.loads * kernel.groups - tiling.visits),
    }


def fit(measurements: list[Measurement]) -> dict[Any, float]:
    """Numbers that make the relative errors of the estimates least; none is negative."""
    from scipy.optimize import nnls

    terms = [_terms(measurement) for measurement in measurements]
    names = sorted({name for term in terms for name in term}, key=str)
    matrix = np.array([[term.get(name, 0.0) for name in names] for term in terms])
    cycles = np.array([m.ms * CYCLES / m.copies for m in measurements])
    numbers, _ = nnls(matrix / cycles[:, None], np.ones(len(cycles)))
    return dict(zip(names, numbers))


def losses(measurements: Iterable[Measurement]) -> dict[tuple[str, str], float]:
    """By pass and case: the time of the plan that the planner takes of those that were
    measured, over that of the best of them, less 1."""
    groups = collections.defaultdict(list)
    for m in measurements:
        groups[m.name, m.case.name].append(m)
    return {
        group: min(found, key=lambda m: m.preference).ms / min(m.ms for m in found) - 1
        for group, found in groups.items()
    }


def step_losses(measurements: Iterable[Measurement]) -> dict[str, float]:
    """By case: a forward and a backward pass as the planner has them, over the best that
    the measured plans allow, less 1."""
    groups = collections.defaultdict(list)
    for m in measurements:
        groups[m.case, m.name].append(m)
    found = {}
    for case in {case: None for case, _ in groups}:
        plans = [groups[case, name] for name in PASSES]
        forward, *apart = [min(p, key=lambda m: m.preference) for p in plans[:3] if p]
        best_forward, *best = [min(m.ms for m in p) for p in plans[:3] if p]
        backward, best_backward = sum(m.ms for m in apart), sum(best)
        if plans[3]:
            at_once, copies = min(plans[3], key=lambda m: m.preference), forward.copies
            beside = _tiling_sm90.cycles_beside_gradients(case.tokens, case.head_dim)
            beside *= copies / CYCLES
            best_backward = min(best_backward, beside + min(m.ms for m in plans[3]))
            fills = _tiling_sm90.fills_device(at_once.tiling, copies)
            estimate = sum(m.estimate for m in apart)
            if is_faster_at_once(at_once.estimate + beside, estimate, fills):
                backward = at_once.ms + beside
        found[case.name] = (forward.ms + backward) / (best_forward + best_backward) - 1
    return found


def report(measurements: list[Measurement]) -> None:
    for name in PASSES:
        own = [m for m in measurements if m.name == name]
        if not own:
            continue
        print(f"{name}: {len(own)} plans")
        for key, number in fit(own).items():
            print("   ", *key, f"{number:.3g}")
        errors = np.array([m.estimate / m.ms - 1 for m in own])
        print(
            f"    estimates of the planner are off by {np.sqrt(np.mean(errors**2)):.1%}"
        )
    found = losses(measurements)
    for (name, case), loss in found.items():
        print(f"{name:12} {case:40} {loss:6.1%} above the best plan")
    steps = step_losses(measurements)
    for case, loss in steps.items():
        print(f"{'both passes':12} {case:40} {loss:6.1%} above the best plans")
    forward = {name: loss for name, loss in found.items() if name[0] == "forward"}
    for what, losses_of in (
        ("launches", found),
        ("forward passes", forward),
        ("problems, forward and backward", steps),
    ):
        close = sum(loss <= 0.05 for loss in losses_of.values())
        print(f"within 5% of the best: {close} of {len(losses_of)} {what}")


def main() -> None:
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("measure", "read", "fit"))
    parser.add_argument("file", type=pathlib.Path, help="JSON lines")
    parser.add_argument("--cases", default=here / "plan_cases.json", help="JSON list")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--per-kernel", type=int, default=4, help="plans to measure")
    arguments = parser.parse_args()
    problems = cases.load(arguments.cases)
    if arguments.command == "fit":
        report(load(arguments.file, problems))
        return
    if arguments.command == "read":
        # Plans were paired, so that some were timed more than once.
        best: dict[tuple[Any, ...], Measurement] = {}
        for m in read(sys.stdin, problems):
            plan = (m.name, m.case, m.tiling)
            best[plan] = min(m, best.get(plan, m), key=lambda m: m.ms)
        lines = [m.to_json() for m in best.values()]
        arguments.file.write_text("".join(line + "\n" for line in lines))
        return
    with arguments.file.open("a") as file:
        for case in problems:
            if arguments.only and case.name not in arguments.only:
                continue
            for measurement in measure(case, arguments.per_kernel):
                print(measurement.to_json(), file=file, flush=True)


if __name__ == "__main__":
    main()
