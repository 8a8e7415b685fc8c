"""Times NAT and DiNAT models with each implementation of neighborhood attention.

    python benchmarks/models.py --output results
    python benchmarks/models.py --profile --output results

Images per second of inference and of a training step (loss, gradients and AdamW), by
wall clock: everything that a user waits for is in it. All implementations of a case
are timed in turn in every round, and the numbers are medians over the rounds. Prints a
table with the gain of the fused kernels over the naive ones beside the paper's. On a
GPU the cases are those of the published tables, on a CPU smaller ones. ``--profile``
tells instead where the time of a training step goes, and how much of it layout changes
around the attention kernels take.

For a GPU XLA compiles a training step of NAT-Mini for a minute on one core. The programs of
a case, and with ``--together 4`` those of four cases, are compiled at the same time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
from flax import nnx

from jax_na import models
from jax_na.nnx import NeighborhoodAttention2D

IMPLEMENTATIONS = ("naive", "gemm", "fused")
PASSES = ("inference", "training")

# The gain of fused over naive kernels on whole models, at most, of Faster Neighborhood
# Attention (arXiv 2403.04690).
PAPER = {"inference": 1.04, "training": 0.39}

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a batch of images; if ``dense`` its feature pyramid, no classifier."""

    model: str
    size: int
    batch: int
    dtype: str
    dense: bool = False

    def __str__(self) -> str:
        kind = " pyramid" if self.dense else ""
        return f"{self.model}{kind} {self.size}x{self.size} {self.dtype} x{self.batch}"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Images per second of one implementation; None where it did not run."""

    case: Case
    implementation: str
    inference: float | None = None
    training: float | None = None
    refusal: str | None = None


# ---- Cases ---------------------------------------------------------------------------

_CLASSIFIERS = (
    "nat_mini",
    "nat_tiny",
    "nat_small",
    "nat_base",
    "dinat_tiny",
    "dinat_base",
)
_PYRAMIDS = ("nat_tiny", "dinat_base")


def default_cases(platform: str) -> list[Case]:
    if platform == "cpu":
        return [
            Case("nat_mini", 112, 2, "float32"),
            Case("dinat_mini", 112, 2, "float32"),
            Case("nat_mini", 256, 1, "float32", dense=True),
        ]
    dtypes = ("bfloat16", "float32")
    classifiers = [
        Case(model, 224, 64, dtype) for model in _CLASSIFIERS for dtype in dtypes
    ]
    pyramids = [
        Case(model, size, batch, dtype, dense=True)
        for model in _PYRAMIDS
        for size, batch in ((512, 8), (1024, 2))
        for dtype in dtypes
    ]
    return [*classifiers, *pyramids]


# ---- Programs ------------------------------------------------------------------------


def with_implementation(model: nnx.Module, name: str) -> nnx.Module:
    """The model itself, whose attention runs as ``name`` from now on."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, NeighborhoodAttention2D):
            module.implementation = name
    return model


def make_model(case: Case) -> nnx.Module:
    """A model with random numbers of about unit gain in place of its initial weights.

    To run every initialiser on a GPU takes longer than what is measured here.
    """
    make = models.Backbone if case.dense else models.Classifier
    dtype = jnp.dtype(case.dtype)
    graph, shapes = nnx.split(
        nnx.eval_shape(
            lambda: make(case.model, rngs=nnx.Rngs(0), keep_rngs=False, dtype=dtype)
        )
    )
    generator = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        gain = math.sqrt(leaf.shape[-1] / math.prod(leaf.shape))
        numbers = generator.standard_normal(leaf.shape, np.float32) * np.float32(gain)
        return jnp.asarray(numbers, leaf.dtype)

    return nnx.merge(graph, jax.tree.map(draw, shapes))


class Program(NamedTuple):
    """A pass of a model, lowered; ``start`` makes a call of it from the executable."""

    lowered: Any
    start: Callable[[Any], Run]


def make_program(case: Case, model: nnx.Module, kind: str) -> Program:
    graph, params = nnx.split(model)
    shape = (case.batch, case.size, case.size, 3)
    images = jax.random.normal(jax.random.key(0), shape, jnp.dtype(case.dtype))

    def inference(params: Any, images: jax.Array) -> Any:
        return nnx.merge(graph, params)(images, deterministic=True)

    if kind == "inference":
        lowered = jax.jit(inference).lower(params, images)
        return Program(lowered, lambda run: lambda: run(params, images))

    adamw = optax.adamw(1e-4)

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        outputs = nnx.merge(graph, params)(images, deterministic=False, rngs=key)
        if case.dense:  # no task: any function of all maps
            return sum(
                jnp.square(m.astype(jnp.float32)).mean() for m in outputs.values()
            )
        labels = jnp.arange(case.batch) % outputs.shape[-1]
        outputs = outputs.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def training(state: Any, images: jax.Array) -> Any:
        params, optimizer, key = state
        key, drop_key = jax.random.split(key)
        value, gradients = jax.value_and_grad(loss)(params, images, drop_key)
        updates, optimizer = adamw.update(gradients, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer, key), value

    # Copies of the parameters, since a step overwrites what it is given.
    own = jax.tree.map(jnp.copy, params)
    state = own, adamw.init(own), jax.random.key(1)

    def start(executable: Any) -> Run:
        def step() -> jax.Array:
            nonlocal state
            state, value = executable(state, images)
            return value

        return step

    return Program(jax.jit(training, donate_argnums=0).lower(state, images), start)


# ---- Measurement ---------------------------------------------------------------------


def _seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def medians(runs: Mapping[str, Run], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of one call of every run, timed in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_seconds(run, calls))
    return {name: statistics.median(times) for name, times in samples.items()}


class Contest:
    """One case by every implementation: compiled in the background, then timed."""

    def __init__(
        self,
        case: Case,
        implementations: Sequence[str],
        pool: concurrent.futures.Executor,
    ) -> None:
        self.case = case
        self.results = {name: Measurement(case, name) for name in implementations}
        self._programs: dict[tuple[str, str], Program] = {}
        self._executables: dict[tuple[str, str], concurrent.futures.Future] = {}
        model = make_model(case)
        for name, kind in itertools.product(implementations, PASSES):
            own = with_implementation(model, name)
            program = self._attempt(
                name, functools.partial(make_program, case, own, kind)
            )
            if program is not None:
                self._programs[kind, name] = program
                self._executables[kind, name] = pool.submit(program.lowered.compile)

    def _attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """One that lacks support or memory must not end the comparison."""
        try:
            return action()
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            refusal = str(error).splitlines()[0]
            result = dataclasses.replace(self.results[name], refusal=refusal)
            self.results[name] = result

    def wait(self) -> None:
        concurrent.futures.wait(self._executables.values())

    def measure(self, rounds: int, calls: int) -> list[Measurement]:
        for kind in PASSES:
            runs = {}
            for name in self.results:
                if (kind, name) not in self._programs:
                    continue
                executable = self._attempt(name, self._executables[kind, name].result)
                if executable is None:
                    continue
                run = self._programs[kind, name].start(executable)
                warm = functools.partial(lambda run: jax.block_until_ready(run()), run)
                if self._attempt(name, warm) is not None:
                    runs[name] = run
            for name, seconds in medians(runs, rounds, calls).items():
                rate = {kind: self.case.batch / seconds}
                self.results[name] = dataclasses.replace(self.results[name], **rate)
        return list(self.results.values())


def measure_all(
    cases: Sequence[Case],
    implementations: Sequence[str],
    rounds: int,
    calls: int,
    together: int,
) -> Iterator[list[Measurement]]:
    """Case by case; while any is timed, XLA compiles nothing."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(cases), together):
            group = cases[first : first + together]
            contests = [Contest(case, implementations, pool) for case in group]
            for contest in contests:
                contest.wait()
            while contests:
                yield contests.pop(0).measure(rounds, calls)


# ---- Report --------------------------------------------------------------------------


def gain(results: Sequence[Measurement], kind: str) -> float | None:
    """By how much fused exceeds naive, 1.04 being +104%."""
    rates = {result.implementation: getattr(result, kind) for result in results}
    if not rates.get("fused") or not rates.get("naive"):
        return None
    return rates["fused"] / rates["naive"] - 1


def rows(results: Sequence[Measurement]) -> list[str]:
    """Lines of one case: a row per pass, and why implementations are missing."""
    lines = []
    for kind in PASSES:
        rates = [getattr(result, kind) for result in results]
        cells = [f"{rate:9.1f}" if rate else f"{'-':>9}" for rate in rates]
        more = gain(results, kind)
        cells.append(f"{more:+9.0%}" if more is not None else f"{'-':>9}")
        lines.append(f"{results[0].case!s:44}{kind:10}{''.join(cells)}")
    lines += [
        f"  {result.implementation}: {result.refusal}"
        for result in results
        if result.refusal is not None
    ]
    return lines


def summary(results: Sequence[Sequence[Measurement]]) -> list[str]:
    """The gains of fused over naive, least and most, beside the paper's."""
    lines = [
        "",
        f"{'fused over naive':20}{'least':>9}{'most':>9}{'paper, at most':>16}",
    ]
    for kind in PASSES:
        gains = [more for case in results if (more := gain(case, kind)) is not None]
        if gains:
            found = f"{min(gains):+9.0%}{max(gains):+9.0%}"
            lines.append(f"{kind:20}{found}{PAPER[kind]:+16.0%}")
    return lines


def profile(case: Case, implementation: str, calls: int) -> layouts.Shares:
    """Where the time of a training step goes."""
    options = None
    if jax.default_backend() != "cpu":
        # A profiler does not see the single kernels of a CUDA graph.
        options = {"xla_gpu_enable_command_buffer": ""}
    model = with_implementation(make_model(case), implementation)
    program = make_program(case, model, "training")
    executable = program.lowered.compile(compiler_options=options)
    return layouts.shares(executable.as_text(), program.start(executable), calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="*", help="names; default: all of the platform"
    )
    parser.add_argument(
        "--sizes", nargs="*", type=int, help="sides of images; likewise"
    )
    parser.add_argument("--dtypes", nargs="*", help="likewise")
    parser.add_argument(
        "--batch", type=int, help="images at a time; default: the case's"
    )
    parser.add_argument("--implementations", nargs="*", default=IMPLEMENTATIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, help="per round; default 10, on a CPU 1")
    parser.add_argument(
        "--together", type=int, default=1, help="cases that are compiled at once"
    )
    parser.add_argument("--profile", action="store_true", help="of fused, instead")
    parser.add_argument("--output", type=pathlib.Path, help="folder for results")
    args = parser.parse_args()

    platform = jax.default_backend()
    calls = args.calls or (1 if platform == "cpu" else 10)
    cases = [
        dataclasses.replace(case, batch=args.batch or case.batch)
        for case in default_cases(platform)
        if case.model in (args.models or [case.model])
        and case.size in (args.sizes or [case.size])
        and case.dtype in (args.dtypes or [case.dtype])
    ]
    files = None
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        files = args.output / ("models-profile" if args.profile else "models")
    lines, records = [], []

    def tell(text: str) -> None:
        """Prints and saves at once: a run that is cut short has told what it found."""
        lines.append(text)
        print(text, flush=True)
        if files is not None:
            files.with_suffix(".txt").write_text("\n".join(lines) + "\n")
            saved = "".join(json.dumps(record) + "\n" for record in records)
            files.with_suffix(".jsonl").write_text(saved)

    tell(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    if args.profile:
        for case in cases:
            found = profile(case, "fused", calls)
            records.append({"case": dataclasses.asdict(case), **found._asdict()})
            tell(f"{case!s:44}{found}")
        return
    header = "".join(f"{name:>9}" for name in args.implementations)
    tell(f"{'images per second':54}{header}{'gain':>9}")
    measured = []
    options = args.implementations, args.rounds, calls, args.together
    for results in measure_all(cases, *options):
        measured.append(results)
        records += map(dataclasses.asdict, measured[-1])
        tell("\n".join(rows(measured[-1])))
    tell("\n".join(summary(measured)))


if __name__ == "__main__":
    main()
