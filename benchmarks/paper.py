"""The paper's comparison of the three kernel families, forward passes on one GPU.

    python benchmarks/paper.py --output results

Sweeps 1-D, 2-D and 3-D problems over sizes, windows from 3 to a third of the grid, head
dimensions and dtypes, and prints the average, least and largest improvement of GEMM over
naive (float32) and of fused over naive (float16), beside those that "Faster Neighborhood
Attention" (arXiv 2403.04690, tables 1 and 2) reports. Improvement is naive time over other
time, less one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterator

import cases
import jax
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


def forward_milliseconds(case: cases.Case, implementation: str, calls: int) -> float:
    query, key, value, _ = case.operands()
    attend = jax.jit(
        functools.partial(
            jax_na.neighborhood_attention,
            implementation=implementation,
            **case.window_arguments,
        )
    )
    return timing.jax_milliseconds(lambda: attend(query, key, value), calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20, help="timed calls each")
    parser.add_argument("--every", type=int, default=1, help="take every n-th problem")
    parser.add_argument("--output", type=pathlib.Path, help="folder for results")
    args = parser.parse_args()

    records = []
    for (contender, dtype), paper in COMPARISONS.items():
        improvements: dict[int, list[float]] = {rank: [] for rank in GRIDS}
        for case in itertools.islice(problems(dtype), None, None, args.every):
            naive = forward_milliseconds(case, "naive", args.calls)
            own = forward_milliseconds(case, contender, args.calls)
            improvements[len(case.shape)].append(100 * (naive / own - 1))
            record = dataclasses.asdict(case)
            records.append(
                record | {"contender": contender, "naive": naive, "own": own}
            )
        print(f"\n{contender} over naive, {dtype}, forward")
        for rank, values in improvements.items():
            beside = f"  (paper: +{paper[rank]}%)" if paper[rank] else ""
            print(
                f"  {rank}-D, {len(values):3} problems: average "
                f"{statistics.mean(values):+6.0f}%  least {min(values):+6.0f}%  largest "
                f"{max(values):+6.0f}%{beside}",
                flush=True,
            )
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(map(json.dumps, records))
        (args.output / "paper.jsonl").write_text(lines + "\n")
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
