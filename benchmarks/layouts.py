"""Where a compiled program's time goes: attention, matrices, layout changes, the rest.

Joins the instructions of the optimised program, which tell what only moves data and what
touches jax_na's kernels, with the profiler's time of every instruction.
"""

from __future__ import annotations

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?:\([^)]*\)|\S+) (?P<op>[\w\-]+)"
    r"\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_MOVES = {"copy", "transpose", "concatenate", "slice"}
_VIEWS = {"bitcast", "get-tuple-element", "reshape", "tuple", "opt-barrier"}
_FREE = {*_MOVES, *_VIEWS, "parameter", "constant", "broadcast", "convert"}
_MATRIX = re.compile(r"\bdot\b|convolution|gemm|cublas|cudnn|matmul")


class Instruction(NamedTuple):
    """One instruction of a program; ``calls`` names the computations that it runs."""

    name: str
    op: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    text: str


class Shares(NamedTuple):
    """Shares of the profiled time, which add up to 1.

    Attributes:
        attention: jax_na's kernels.
        matrix: matrix products and convolutions, with what XLA fused into them.
        layout: what only moves an operand or result of jax_na's kernels: copies,
            transposes, and the way into and out of a packed array.
        layout_and_more: fusions beside jax_na's kernels that move data and also
            compute: an upper bound of what more there is.
        rest: everything else.
    """

    attention: float
    matrix: float
    layout: float
    layout_and_more: float
    rest: float

    def __str__(self) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')} {share:.1%}"
            for name, share in self._asdict().items()
        )


class Profile(NamedTuple):
    """What ran.

    Attributes:
        milliseconds: of all instructions of one call.
        instructions: name, field of :class:`Shares`, and share of the time.
    """

    milliseconds: float
    instructions: list[tuple[str, str, float]]

    @property
    def shares(self) -> Shares:
        totals = collections.Counter[str]()
        for _, kind, share in self.instructions:
            totals[kind] += share
        return Shares(*(totals[name] for name in Shares._fields))

    def __str__(self) -> str:
        return f"{self.milliseconds:.2f} ms: {self.shares}"


def instructions(text: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of every computation of a program, by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match["name"], {})
        elif match := _INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", match["operands"]))
            calls = tuple(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", match["rest"]))
            current[match["name"]] = Instruction(
                match["name"], match["op"], operands, calls, match["rest"]
            )
    return computations


def kinds(text: str) -> dict[str, str]:
    """The field of :class:`Shares` that each instruction counts for, by name."""
    computations = instructions(text)
    found = {}
    for computation in computations.values():
        near = _beside_attention(computation)
        for instruction in computation.values():
            inner = list(_inside(instruction, computations))
            ops = {i.op for i in inner}
            words = " ".join(f"{i.op} {_target(i)}" for i in inner)
            if _is_attention(instruction):
                kind = "attention"
            elif _MATRIX.search(f"{words} {_kind(instruction)}"):
                kind = "matrix"
            elif instruction.name in near and ops & _MOVES:
                kind = "layout" if ops <= {*_FREE, "fusion"} else "layout_and_more"
            else:
                kind = "rest"
            found[instruction.name] = kind
    return found


def _is_attention(instruction: Instruction) -> bool:
    return _target(instruction).startswith("jax_na_")


def _target(instruction: Instruction) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    return match[1] if match else ""


def _kind(instruction: Instruction) -> str:
    """What XLA says of a fusion that it gives to a library or to Triton."""
    match = re.search(r'"kind":"([^"]*)"', instruction.text)
    return match[1] if match else ""


def _inside(
    instruction: Instruction, computations: dict[str, dict[str, Instruction]]
) -> Iterator[Instruction]:
    """The instruction and all that it runs."""
    yield instruction
    for name in instruction.calls:
        for inner in computations.get(name, {}).values():
            yield from _inside(inner, computations)


def _beside_attention(computation: dict[str, Instruction]) -> set[str]:
    """What makes an operand of jax_na's kernels or reads a result, through views."""
    users = collections.defaultdict(list)
    for instruction in computation.values():
        for operand in instruction.operands:
            users[operand].append(instruction.name)

    def reach(name: str, step: Callable[[str], Any]) -> Iterator[str]:
        for other in step(name):
            if other in computation and computation[other].op in _VIEWS:
                yield from reach(other, step)
            else:
                yield other

    near = set()
    for name, instruction in computation.items():
        if _is_attention(instruction):
            near |= set(reach(name, lambda n: computation[n].operands))
            near |= set(reach(name, users.__getitem__))
    return near


# ---- Profile -------------------------------------------------------------------------


def _events(directory: str) -> Iterator[tuple[str, float]]:
    """Instruction and nanoseconds of everything that ran."""
    (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
    planes = list(jax.profiler.ProfileData.from_file(path).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # the same kernels again, by other groupings
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    yield str(name), event.duration_ns


def profile(text: str, run: Callable[[], Any], calls: int) -> Profile:
    """Profiles ``run``, a call of the program whose optimised text is given."""
    jax.block_until_ready(run())
    nanoseconds = collections.Counter[str]()
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory)
        for _ in range(calls):
            jax.block_until_ready(run())
        jax.profiler.stop_trace()
        for name, duration in _events(directory):
            nanoseconds[name] += duration
    whole = sum(nanoseconds.values())
    if not whole:
        raise RuntimeError("the profiler saw no instruction of the program")
    kind_of = kinds(text)
    return Profile(
        milliseconds=whole / calls / 1e6,
        instructions=[
            (name, kind_of.get(name, "rest"), duration / whole)
            for name, duration in nanoseconds.most_common()
        ],
    )
