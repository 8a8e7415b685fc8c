"""The paper's comparison of the three kernel families, forward passes on one GPU.

    python benchmarks/paper.py --output results

Sweeps 1-D, 2-D and 3-D problems over sizes, windows from 3 to a third of the grid, head
dimensions and dtypes, and prints the average, least and largest improvement of GEMM over
naive (float32) and of fused over naive (float16), beside those that "Faster Neighborhood
Attention" (arXiv 2403.04690, tables 1 and 2) reports. Improvement is naive time over other
time, less one.

How good the naive kernels are tells whether an improvement is one: their useful TFLOP/s,
and their speed over the gather formulation (peers.py) in 2-D where its copies fit. With
``--natten`` also their speed over the naive kernels of the paper, and the improvement over
those: natten_naive.cu says how to time them.

Problems are taken in an order of which every beginning is a spread of the sweep. With
``--minutes`` it ends early, and started again it goes on: what ``paper.jsonl`` in the
output folder holds is not measured again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import cases
import jax
import jax.numpy as jnp
import peers
import timing

import jax_na

# Grids with batch and heads that make about the same number of tokens each.
GRIDS = {
    1: (((256,), 32, 8), ((1024,), 8, 8), ((4096,), 4, 4), ((16384,), 1, 4)),
    2: (((16, 16), 32, 8), ((32, 32), 8, 8), ((64, 64), 4, 4), ((128, 128), 1, 4)),
    3: (((8, 8, 8), 16, 8), ((16, 16, 16), 4, 4), ((16, 32, 32), 1, 4)),
}
HEAD_DIMS = (32, 64, 128)

# (contender, dtype) and the paper's average improvement over naive by rank, in percent.
COMPARISONS = {
    ("gemm", "float32"): {1: 895, 2: 272, 3: None},
    ("fused", "float16"): {1: 1759, 2: 958, 3: None},
}


def windows(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Odd windows, geometrically from 3 to a third of the shortest axis."""
    largest = max(3, min(grid) // 3)
    size = 3
    while size <= largest:
        yield (size,) * len(grid)
        size = 2 * size + 1


def problems(dtype: str) -> Iterator[cases.Case]:
    for rank, head_dim in itertools.product(GRIDS, HEAD_DIMS):
        for grid, batch, heads in GRIDS[rank]:
            for window in windows(grid):
                name = f"{'x'.join(map(str, grid))} w{window[0]} D{head_dim}"
                ones = (1,) * rank
                yield cases.Case(
                    name,
                    grid,
                    window,
                    batch,
                    heads,
                    head_dim,
                    ones,
                    ones,
                    (False,) * rank,
                    dtype,
                )


def attention(case: cases.Case, implementation: str) -> peers.Attention:
    return functools.partial(
        jax_na.neighborhood_attention,
        implementation=implementation,
        **case.window_arguments,
    )


def forward_milliseconds(
    case: cases.Case, attend: peers.Attention, calls: int
) -> float:
    query, key, value, _ = case.operands()
    attend = jax.jit(attend)
    return timing.jax_milliseconds(lambda: attend(query, key, value), calls)


def is_gatherable(case: cases.Case) -> bool:
    """Whether the copies of keys and values of all windows are of a moderate size."""
    numbers = math.prod((*case.operand_shape, *case.window))
    return 2 * numbers * jnp.dtype(case.dtype).itemsize <= 8 << 30


def spread(values: Sequence[float], unit: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    shown = (
        f"{name} {value:{sign}8.4g}{unit}"
        for name, value in (
            ("average", statistics.mean(values)),
            ("least", min(values)),
            ("largest", max(values)),
        )
    )
    return f"{len(values):3} problems: {'  '.join(shown)}"


def spread_order(count: int) -> list[int]:
    """All indices below ``count``, every beginning about evenly spread over them."""
    golden = (5**0.5 - 1) / 2
    return sorted(range(count), key=lambda index: (index + 1) * golden % 1)


def measure(case: cases.Case, contender: str, calls: int) -> dict[str, float]:
    """Milliseconds of the naive kernels, the contender, and gather where it fits."""
    attentions = {name: attention(case, name) for name in ("naive", contender)}
    if len(case.shape) == 2 and is_gatherable(case):
        attentions["gather"] = peers.gather(case.shape, **case.window_arguments)
    return {
        name: forward_milliseconds(case, attend, calls)
        for name, attend in attentions.items()
    }


def words(case: cases.Case) -> str:
    """The line that stands for a problem in natten_naive.cu."""
    sizes = (len(case.shape), *case.shape, case.window[0], case.batch, case.heads)
    return " ".join(map(str, (*sizes, case.head_dim, case.dtype)))


def report(
    measured: Sequence[tuple[cases.Case, dict[str, float]]],
    contender: str,
    paper: Mapping[int, int | None],
    natten: Mapping[str, float],
) -> None:
    improvements = collections.defaultdict(list)
    rates = collections.defaultdict(list)
    over_gather = []
    for case, times in measured:
        rank = len(case.shape)
        improvements[rank].append(100 * (times["naive"] / times[contender] - 1))
        rates[rank].append(case.flops(backward=False) / times["naive"] / 1e9)
        if "gather" in times:
            over_gather.append(times["gather"] / times["naive"])
    for rank in sorted(improvements):
        beside = f"  (paper: +{paper[rank]}%)" if paper[rank] else ""
        print(f"  {rank}-D, {spread(improvements[rank], '%', signed=True)}{beside}")
    print("naive, useful TFLOP/s")
    for rank in sorted(rates):
        print(f"  {rank}-D, {spread(rates[rank], '')}")
    others = [
        (len(case.shape), natten[words(case)], times)
        for case, times in measured
        if words(case) in natten
    ]
    if others:
        print("naive kernels of the paper: naive over them, improvement over them")
    for rank in sorted({rank for rank, *_ in others}):
        of_rank = [(other, times) for own, other, times in others if own == rank]
        faster = [other / times["naive"] for other, times in of_rank]
        over = [100 * (other / times[contender] - 1) for other, times in of_rank]
        print(f"  {rank}-D, {spread(faster, 'x')}\n       {spread(over, '%', True)}")
    if over_gather:
        print(f"naive over gather\n  2-D, {spread(over_gather, 'x')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20, help="timed calls each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then it ends")
    parser.add_argument("--output", type=pathlib.Path, help="folder for results")
    parser.add_argument("--natten", type=pathlib.Path, help="output of natten_naive.cu")
    parser.add_argument(
        "--list", action="store_true", help="prints the problems for it, nothing else"
    )
    args = parser.parse_args()

    if args.list:
        for _, dtype in COMPARISONS:
            print(*map(words, problems(dtype)), sep="\n")
        return
    natten: dict[str, float] = {}  # milliseconds by problem
    if args.natten is not None:
        for line in args.natten.read_text().splitlines():
            problem, milliseconds = line.rsplit(maxsplit=1)
            natten[problem] = float(milliseconds)
    deadline = time.monotonic() + 60 * args.minutes
    known: dict[tuple[str, str], dict[str, float]] = {}  # by name and dtype
    file = None
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        file = (args.output / "paper.jsonl").open("a+")
        file.seek(0)
        for record in map(json.loads, file):
            known[record["name"], record["dtype"]] = record["milliseconds"]
    sweeps = {key: list(problems(key[1])) for key in COMPARISONS}
    (count,) = {len(sweep) for sweep in sweeps.values()}
    for index, ((contender, dtype), sweep) in itertools.product(
        spread_order(count), sweeps.items()
    ):
        case = sweep[index]
        if (case.name, dtype) in known or time.monotonic() > deadline:
            continue
        times = measure(case, contender, args.calls)
        known[case.name, dtype] = times
        if file is not None:
            record = dataclasses.asdict(case) | {"milliseconds": times}
            print(json.dumps(record), file=file, flush=True)
    for (contender, dtype), sweep in sweeps.items():
        measured = [
            (case, known[case.name, dtype])
            for case in sweep
            if (case.name, dtype) in known
        ]
        print(f"\n{contender} over naive, {dtype}, forward: ", end="")
        print(f"{len(measured)} of {count} problems")
        report(measured, contender, COMPARISONS[contender, dtype], natten)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
