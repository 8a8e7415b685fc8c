"""Times neighborhood attention on the CPU against how else JAX users compute it.

    python benchmarks/cpu.py          # tables
    python benchmarks/cpu.py --json   # the same numbers for programs

All candidates of a table are timed in turn in every round, so that a slow moment of the
machine meets all of them; the numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers

import jax_na

jax.config.update("jax_platforms", "cpu")  # whatever else there is

WINDOW = {"kernel_size": (7, 7)}
HEADS, HEAD_DIM = 4, 32
IMPLEMENTATIONS = ("fused", "naive", "xla")
PASSES = ("forward", "forward+backward")
SIDES = (64, 128, 256, 512)  # of square grids, for the growth of the cost
SAMPLE_SECONDS = 0.1  # a sample repeats a faster call until it lasts this long

Attention = peers.Attention
Run = Callable[[], Any]


# ---- Candidates ----------------------------------------------------------------------


def neighborhood(implementation: str) -> Attention:
    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax_na.na2d(query, key, value, **WINDOW, implementation=implementation)

    return attention


def inputs(side: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Query, key, value and the output's cotangent, ``[1, side, side, N, D]``."""
    # NumPy's numbers: making JAX's takes memory that peak_memory would miss later.
    shape, generator = (1, side, side, HEADS, HEAD_DIM), np.random.default_rng(0)
    arrays = [generator.standard_normal(shape, np.float32) for _ in range(4)]
    return [jax.device_put(array.astype(dtype)) for array in arrays]


def compiled(attention: Attention, name: str, arrays: list[jax.Array]) -> Any:
    """The executable of one pass, a function of ``arrays``."""

    def forward(*arrays: jax.Array) -> Any:
        return attention(*arrays[:3])

    def both(*arrays: jax.Array) -> Any:
        out, backward = jax.vjp(attention, *arrays[:3])
        return out, backward(arrays[3])

    function = forward if name == "forward" else both
    return jax.jit(function).lower(*arrays).compile()


def bound(attention: Attention, name: str, arrays: list[jax.Array]) -> Run:
    executable = compiled(attention, name, arrays)
    return lambda: executable(*arrays)


# ---- Measurement ---------------------------------------------------------------------


def _seconds(run: Run, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls


def medians(runs: Mapping[Any, Run], rounds: int) -> dict[Any, float]:
    """Median seconds of one call of every run, timed in turn."""
    calls = {}
    for name, run in runs.items():
        _seconds(run)  # the first call also touches fresh memory
        calls[name] = math.ceil(SAMPLE_SECONDS / _seconds(run))
    samples: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            jax.block_until_ready(run())  # its data back into the caches
            samples[name].append(_seconds(run, calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _status(field: str) -> int:
    """Bytes of a field of this process's memory accounting (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}.")


def peak_memory(implementation: str, name: str, side: int) -> dict[str, int]:
    """Bytes that one call needs beyond its inputs and outputs.

    ``resident`` is what the process's peak shows, for which it must be a fresh one;
    ``planned`` is what XLA itself allocates, kernels' own buffers not included.
    """
    arrays = inputs(side)
    executable = compiled(neighborhood(implementation), name, arrays)
    jax.block_until_ready(arrays)
    before = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak = current
    outputs = jax.block_until_ready(executable(*arrays))
    written = sum(array.nbytes for array in jax.tree.leaves(outputs))
    return {
        "resident": _status("VmHWM") - before - written,
        "planned": executable.memory_analysis().temp_size_in_bytes,
    }


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# ---- What is measured ----------------------------------------------------------------


def measure_peers(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per pass of the implementations and of their peers, 64x64."""
    grid, arrays = (64, 64), inputs(64)
    attentions = {name: neighborhood(name) for name in IMPLEMENTATIONS}
    attentions["dense+mask"] = peers.dense(grid, **WINDOW)
    attentions["gather"] = peers.gather(grid, **WINDOW)
    table = {}
    for name in PASSES:
        runs = {key: bound(a, name, arrays) for key, a in attentions.items()}
        times = medians(runs, rounds)
        table[name] = {key: seconds * 1e3 for key, seconds in times.items()}
    return table


def measure_rates(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """GFLOP/s of 'fused' in useful operations, and of XLA's matrix product."""
    work = jax_na.explain(*inputs(64)[:3], WINDOW["kernel_size"])
    flops = {"forward": work.forward_flops}
    flops["forward+backward"] = work.forward_flops + work.backward_flops
    matrix = jax.random.normal(jax.random.key(0), (1024, 1024))
    product = jax.jit(jnp.matmul)
    seconds = medians({"": lambda: product(matrix, matrix)}, 5)[""]
    rates = {name: flops[name] / table[name]["fused"] / 1e6 for name in PASSES}
    return rates | {"matrix product": 2 * 1024**3 / seconds / 1e9}


def measure_bfloat16(rounds: int) -> dict[str, float]:
    """Time of 'fused' in bfloat16 over that in float32, 64x64."""
    ratios = {}
    for name in PASSES:
        runs = {
            dtype: bound(neighborhood("fused"), name, inputs(64, dtype))
            for dtype in ("bfloat16", "float32")
        }
        times = medians(runs, rounds)
        ratios[name] = times["bfloat16"] / times["float32"]
    return ratios


def measure_growth(rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of 'fused' by grid, and the power of the tokens they grow with."""
    table = {}
    for name in PASSES:
        runs = {s: bound(neighborhood("fused"), name, inputs(s)) for s in SIDES}
        times = medians(runs, rounds)
        tokens = np.log([side**2 for side in SIDES])
        slope, _ = np.polyfit(tokens, np.log(list(times.values())), 1)
        milliseconds = {f"{s}x{s}": seconds * 1e3 for s, seconds in times.items()}
        table[name] = {"milliseconds": milliseconds, "slope": float(slope)}
    return table


def measure_memory() -> dict[str, dict[str, dict[str, float]]]:
    """MiB beyond inputs and outputs, by case and pass."""
    table = {}
    for implementation, side in (("fused", 512), ("xla", 256)):
        passes = table.setdefault(f"{implementation!r} at {side}x{side}", {})
        for name in PASSES:
            used = in_fresh_process(peak_memory, implementation, name, side)
            passes[name] = {key: size / 2**20 for key, size in used.items()}
    return table


# ---- Output --------------------------------------------------------------------------


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, padded to read well as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        )
        print(f"| {' | '.join(cells)} |")
    print()


def report(results: Mapping[str, Any]) -> None:
    machine = results["machine"]
    print(
        f"{machine['cores']} cores, {machine['instruction_set']}, "
        f"jax {machine['jax']}, jax_na {machine['jax_na']}\n"
    )
    for name, times in results["peers"].items():
        print(f"{name}, 64x64, window 7x7, {HEADS} heads of {HEAD_DIM}, float32\n")
        rows = [
            [
                key,
                f"{milliseconds:.2f}",
                f"{times['dense+mask'] / milliseconds:.1f}x",
                f"{times['gather'] / milliseconds:.1f}x",
            ]
            for key, milliseconds in times.items()
        ]
        print_table(["", "ms", "over dense+mask", "over gather"], rows)

    rates = results["gflops"]
    print_table(
        ["'fused'", *PASSES],
        [
            ["useful GFLOP/s", *(f"{rates[name]:.1f}" for name in PASSES)],
            [
                "of XLA's matrix product",
                *(f"{rates[name] / rates['matrix product']:.0%}" for name in PASSES),
            ],
            [
                "bfloat16 / float32",
                *(f"{results['bfloat16'][name]:.2f}" for name in PASSES),
            ],
        ],
    )

    growth = results["growth"]
    print("'fused', ms by grid, and the power of the number of tokens they grow with\n")
    grids = list(growth["forward"]["milliseconds"])
    rows = [
        [
            name,
            *(f"{growth[name]['milliseconds'][grid]:.2f}" for grid in grids),
            f"{growth[name]['slope']:.3f}",
        ]
        for name in PASSES
    ]
    print_table(["", *grids, "power"], rows)

    print("MiB beyond inputs and outputs: peak of the process (planned by XLA)\n")
    rows = [
        [
            case,
            *(
                f"{passes[name]['resident']:.1f} ({passes[name]['planned']:.1f})"
                for name in PASSES
            ),
        ]
        for case, passes in results["memory"].items()
    ]
    print_table(["", *PASSES], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON, no tables")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each time")
    args = parser.parse_args()
    table = measure_peers(args.rounds)
    results = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "instruction_set": jax_na.support().cpu_instruction_set,
            "jax": jax.__version__,
            "jax_na": jax_na.__version__,
        },
        "peers": table,
        "gflops": measure_rates(table),
        "bfloat16": measure_bfloat16(args.rounds),
        "growth": measure_growth(args.rounds),
        "memory": measure_memory(),
    }
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        report(results)


if __name__ == "__main__":
    main()
