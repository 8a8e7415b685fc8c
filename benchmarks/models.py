"""Times NAT and DiNAT models with each implementation of neighborhood attention.

    python benchmarks/models.py --profile --output results

Images per second of inference and of a training step (loss, gradients and AdamW), by
wall clock: everything that a user waits for is in it. All implementations of a case
are timed in turn in every round, and the numbers are medians over the rounds. Prints a
table with the gain of the fused kernels over the naive ones beside the paper's. On a
GPU the cases are those of the published tables, on a CPU smaller ones. ``--profile``
tells besides where the time of a training step goes, and how much of it layout changes
around the attention kernels take.

XLA compiles a training step of NAT-Mini for a GPU for a minute on one core, and there are
132 programs: processes compile them side by side (farm.py) and hold still while one is
timed. ``--minutes`` ends the run in time, the most telling cases being the first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import farm
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
from flax import nnx
from jax.experimental import serialize_executable

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
    """A model on a batch of images.

    Attributes:
        dense: whether it is a feature pyramid, without a classifier.
        shallow: whether it has one block a stage only.
    """

    model: str
    size: int
    batch: int
    dtype: str
    dense: bool = False
    shallow: bool = False

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

# On a GPU, those that tell most first: model, side and number of images, dense or not.
_GPU_CASES = (
    ("nat_mini", 224, 64, False),
    ("nat_base", 224, 64, False),
    ("dinat_base", 224, 64, False),
    ("nat_tiny", 512, 8, True),
    ("nat_tiny", 224, 64, False),
    ("dinat_tiny", 224, 64, False),
    ("nat_small", 224, 64, False),
    ("dinat_base", 512, 8, True),
    ("nat_tiny", 1024, 2, True),
    ("dinat_base", 1024, 2, True),
    ("dinat_large_384_11x11", 384, 16, False),  # the widest windows that are published
)
_PROFILED = ("nat_mini", "dinat_base")


def default_cases(platform: str) -> list[Case]:
    if platform == "cpu":
        return [
            Case("nat_mini", 112, 2, "float32"),
            Case("dinat_mini", 112, 2, "float32"),
            Case("nat_mini", 256, 1, "float32", dense=True),
        ]
    cases = [
        Case(model, size, batch, dtype, dense)
        for dtype in ("bfloat16", "float32")
        for model, size, batch, dense in _GPU_CASES
    ]
    return sorted(cases, key=lambda case: case.model != "nat_mini")


def is_profiled(case: Case) -> bool:
    usual = case.dtype == "bfloat16" or jax.default_backend() == "cpu"
    return case.model in _PROFILED and usual and not case.dense


# ---- Programs ------------------------------------------------------------------------


def with_implementation(model: nnx.Module, name: str) -> nnx.Module:
    """The model itself, whose attention runs as ``name`` from now on."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, NeighborhoodAttention2D):
            module.implementation = name
    return model


def abstract_model(case: Case) -> nnx.Module:
    """A model with shapes in place of parameters."""
    make = models.Backbone if case.dense else models.Classifier
    config = models.CONFIGS[case.model]
    if case.shallow:
        dilations = config.dilations and tuple(each[:1] for each in config.dilations)
        depths = (1,) * len(config.depths)
        config = dataclasses.replace(config, depths=depths, dilations=dilations)
    dtype = jnp.dtype(case.dtype)
    return nnx.eval_shape(
        lambda: make(config, rngs=nnx.Rngs(0), keep_rngs=False, dtype=dtype)
    )


class Program(NamedTuple):
    """A pass of a model, compiled, as one process gives it to another.

    Attributes:
        executable: what ``serialize_executable`` makes of it.
        params: shapes and dtypes of the parameters.
        optimizer: the same of the optimizer's state; none for inference.
        text: the optimised program, if it is for a profile.
    """

    executable: tuple[bytes, Any, Any]
    params: list[jax.ShapeDtypeStruct]
    optimizer: list[jax.ShapeDtypeStruct]
    text: str


def compile_program(
    case: Case,
    implementation: str,
    kind: str,
    *,
    profiled: bool = False,
    quick: bool = False,
) -> Program:
    """One pass, compiled.

    Args:
        case: the model and its images.
        implementation: of attention.
        kind: inference or training.
        profiled: without CUDA graphs, in which a profiler sees no single kernels.
        quick: training without the pass that takes most of the time to compile it, and
            makes one kernel of a normalisation.
    """
    graph, shapes = nnx.split(with_implementation(abstract_model(case), implementation))
    params, params_tree = jax.tree.flatten(shapes)
    shape = (case.batch, case.size, case.size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))

    def apply(params: Any, images: jax.Array, **mode: Any) -> Any:
        return nnx.merge(graph, params_tree.unflatten(params))(images, **mode)

    def inference(params: Any, images: jax.Array) -> Any:
        return apply(params, images, deterministic=True)

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        outputs = apply(params, images, deterministic=False, rngs=key)
        if case.dense:  # no task: any function of all maps
            return sum(
                jnp.square(m.astype(jnp.float32)).mean() for m in outputs.values()
            )
        labels = jnp.arange(case.batch) % outputs.shape[-1]
        outputs = outputs.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    adamw = optax.adamw(1e-4)
    optimizer, optimizer_tree = jax.tree.flatten(jax.eval_shape(adamw.init, params))

    def training(params: Any, optimizer: Any, images: jax.Array) -> Any:
        state = optimizer_tree.unflatten(optimizer)
        key = jax.random.fold_in(jax.random.key(0), optax.tree.get(state, "count"))
        value, gradients = jax.value_and_grad(loss)(params, images, key)
        updates, state = adamw.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return params, jax.tree.leaves(state), value

    if kind == "inference":
        optimizer = []
        lowered = jax.jit(inference).lower(params, images)
    else:
        step = jax.jit(training, donate_argnums=(0, 1))
        lowered = step.lower(params, optimizer, images)
    options = {}
    if profiled and jax.default_backend() != "cpu":
        options["xla_gpu_enable_command_buffer"] = ""
    if quick and kind == "training":
        options["xla_disable_hlo_passes"] = "triton-softmax-rewriter"
    compiled = lowered.compile(compiler_options=options)
    executable = serialize_executable.serialize(compiled)
    text = compiled.as_text() if profiled else ""
    return Program(executable, params, optimizer, text)


# ---- Measurement ---------------------------------------------------------------------


def random_arrays(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[np.ndarray]:
    """Random numbers of about unit gain in place of initial weights.

    To run every initialiser on a GPU takes longer than what is measured here.
    """
    generator = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        gain = math.sqrt(leaf.shape[-1] / math.prod(leaf.shape))
        numbers = generator.standard_normal(leaf.shape, np.float32)
        return (numbers * np.float32(gain)).astype(leaf.dtype)

    return [draw(leaf) for leaf in shapes]


def start(case: Case, program: Program, params: Sequence[np.ndarray]) -> Run:
    """Loads a program and its inputs; a call of the result runs one batch."""
    executable = serialize_executable.deserialize_and_load(*program.executable)
    shape = (case.batch, case.size, case.size, 3)
    numbers = np.random.default_rng(1).standard_normal(shape, np.float32)
    zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in program.optimizer]
    inputs = params, zeros, numbers.astype(jnp.dtype(case.dtype))
    params, optimizer, images = jax.device_put(inputs)
    if not optimizer:
        return lambda: executable(params, images)

    def step() -> jax.Array:
        nonlocal params, optimizer
        params, optimizer, value = executable(params, optimizer, images)
        return value

    return step


def _seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def medians(
    runs: Mapping[str, Run], rounds: int, seconds_per_round: float
) -> dict[str, float]:
    """Median seconds of one call of every run, timed in turn."""
    calls = {
        name: math.ceil(seconds_per_round / _seconds(run, 2))
        for name, run in runs.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_seconds(run, calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def measure_case(
    case: Case,
    programs: Mapping[tuple[str, str], Program | str],
    workers: farm.Farm,
    rounds: int,
    seconds_per_round: float,
) -> list[Measurement]:
    """Loads and warms up what compiled, then times it while the workers hold still."""
    results = {name: Measurement(case, name) for name, _ in programs}
    runs: dict[str, dict[str, Run]] = {kind: {} for kind in PASSES}
    params = None
    for (name, kind), program in programs.items():
        refusal = program if isinstance(program, str) else None
        try:
            if isinstance(program, Program):
                params = params or random_arrays(program.params)
                run = start(case, program, params)
                jax.block_until_ready(run())
                runs[kind][name] = run
        except jax.errors.JaxRuntimeError as error:
            # One that lacks memory must not end the comparison.
            refusal = str(error).splitlines()[0]
        if refusal is not None:
            results[name] = dataclasses.replace(results[name], refusal=refusal)
    with workers.still():
        for kind in PASSES:
            for name, seconds in medians(runs[kind], rounds, seconds_per_round).items():
                rate = {kind: case.batch / seconds}
                results[name] = dataclasses.replace(results[name], **rate)
    return list(results.values())


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


# ---- Order of work -------------------------------------------------------------------


class Job(NamedTuple):
    """A case to time or to profile, and its programs by implementation and pass."""

    case: Case
    profiled: bool
    futures: dict[tuple[str, str], concurrent.futures.Future]

    @property
    def programs(self) -> dict[tuple[str, str], Program | str]:
        """The programs; errors in place of those that do not compile."""
        return {choice: farm.result(future) for choice, future in self.futures.items()}


def choose_algorithms(case: Case, passes: Sequence[str]) -> None:
    """Compiles the case's convolutions and matrix products, in a model that is shallow.

    For a GPU, XLA times the algorithms that there are for each, and notes what it chose in
    the folder that XLA_FLAGS names: other programs find it there.
    """
    for kind in passes:
        shallow = dataclasses.replace(case, shallow=True)
        compile_program(shallow, "naive", kind, quick=True)


def tune(case: Case, passes: Sequence[str], workers: farm.Farm) -> None:
    """Makes those choices while no other process uses the GPU."""
    began = time.monotonic()
    future = workers.submit(choose_algorithms, case, passes)
    workers.wait([future])
    error = farm.result(future) or ""
    passed = time.monotonic() - began
    print(f"{case}: algorithms in {passed:.0f} s {error}", file=sys.stderr, flush=True)


def jobs(
    cases: Sequence[Case],
    implementations: Sequence[str],
    passes: Sequence[str],
    workers: farm.Farm,
    *,
    ahead: int,
    profiled: bool,
    quick: bool,
) -> Iterator[Job]:
    """What is compiled, the first first, while up to ``ahead`` others are compiled."""
    todo = [
        (case, profile)
        for case in cases
        for profile in ((False, True) if profiled and is_profiled(case) else (False,))
    ]
    running: list[Job] = []
    tuned = set()
    while todo or running:
        while todo and len(running) < ahead:
            case, profile = todo.pop(0)
            sizes = models.CONFIGS[case.model].embed_dim, case.size, case.dtype
            if sizes not in tuned and jax.default_backend() != "cpu":
                tune(case, passes, workers)
                tuned.add(sizes)
            choices = itertools.product(implementations, passes)
            if profile:
                choices = itertools.product(("naive", "fused"), ("training",))
            build = functools.partial(
                compile_program, profiled=profile, quick=quick and not profile
            )
            futures = {
                choice: workers.submit(build, case, *choice) for choice in choices
            }
            running.append(Job(case, profile, futures))
        pending = [
            [future for future in job.futures.values() if not future.done()]
            for job in running
        ]
        if all(pending):
            workers.wait(itertools.chain(*pending))
        else:
            yield running.pop(pending.index([]))


def profile_case(job: Job, workers: farm.Farm) -> Iterator[tuple[str, layouts.Profile]]:
    """Where the time of training steps goes, by implementation."""
    for (name, _), program in job.programs.items():
        if isinstance(program, str):
            raise RuntimeError(program)
        run = start(job.case, program, random_arrays(program.params))
        with workers.still():
            found = layouts.profile(program.text, run, calls=5)
        yield name, found


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
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=PASSES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="of each program in a round"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that compile"
    )
    parser.add_argument("--minutes", type=float, help="ends after so long")
    parser.add_argument("--profile", action="store_true", help="some models besides")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="training steps without XLA's pass triton-softmax-rewriter, which takes "
        "most of the time that XLA compiles them",
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder for results")
    args = parser.parse_args()

    deadline = None
    if args.minutes is not None:
        deadline = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of timeout(1)
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    if jax.default_backend() != "cpu":
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_gpu_per_fusion_autotune_cache_dir={folder.name}"
        )
    cases = [
        dataclasses.replace(case, batch=args.batch or case.batch)
        for case in default_cases(jax.default_backend())
        if case.model in (args.models or [case.model])
        and case.size in (args.sizes or [case.size])
        and case.dtype in (args.dtypes or [case.dtype])
    ]
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    lines, records = [], []

    def tell(*texts: str) -> None:
        """Prints and saves at once: a run that is cut short has told what it found."""
        lines.extend(texts)
        print(*texts, sep="\n", flush=True)
        if args.output is not None:
            (args.output / "models.txt").write_text("\n".join(lines) + "\n")
            saved = "".join(json.dumps(record) + "\n" for record in records)
            (args.output / "models.jsonl").write_text(saved)

    tell(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    header = "".join(f"{name:>9}" for name in args.implementations)
    tell(f"{'images per second':54}{header}{'gain':>9}")
    measured = []
    programs = len(args.implementations) * len(args.passes)  # of a case
    with folder, farm.Farm(args.workers, deadline) as workers:
        try:
            for job in jobs(
                cases,
                args.implementations,
                args.passes,
                workers,
                ahead=max(1, args.workers // programs),
                profiled=args.profile,
                quick=args.quick,
            ):
                if job.profiled:
                    for name, found in profile_case(job, workers):
                        case = dataclasses.asdict(job.case)
                        records.append(
                            {"case": case, "implementation": name, **found._asdict()}
                        )
                        tell(f"{job.case} training, {name}: {found}")
                    continue
                results = measure_case(
                    job.case, job.programs, workers, args.rounds, args.seconds
                )
                measured.append(results)
                records.extend(map(dataclasses.asdict, results))
                tell(*rows(results))
        except (TimeoutError, KeyboardInterrupt):
            tell("Stopped before the last case.")
        finally:
            tell(*summary(measured))


if __name__ == "__main__":
    main()
