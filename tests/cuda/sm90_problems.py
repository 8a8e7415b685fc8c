"""Problems for ``sm90_check``: random ones, or the cases of the benchmarks.

    python tests/cuda/sm90_problems.py random COUNT [SEED]
    python tests/cuda/sm90_problems.py cases [PLANS_PER_KERNEL] [CASES.json]

Random ones try the compiled kernels with boxes that no planner would choose; those of the
cases, which are those of the benchmarks unless a file is named, are the planner's best for
every kernel.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jax_na import _tiling_sm90
from jax_na._tiling import Axis
from jax_na._tiling_sm90 import (
    DKEY_DVALUE,
    DQUERY,
    FORWARD,
    GRADIENTS,
    Kernel,
    Pass,
)

CASES = pathlib.Path(__file__).parents[2] / "benchmarks" / "cases.json"
MAX_RANK = 3


def _three(values: Sequence[int], missing: int = 1) -> str:
    """One number per axis, of grids of any rank."""
    return ",".join(map(str, [missing] * (MAX_RANK - len(values)) + list(values)))


def _line(words: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in words.items())


def _tiling(
    which: Pass,
    kernel: Kernel,
    row_box: Sequence[int],
    column_box: Sequence[int],
    masks_by_product: bool,
) -> dict[str, Any]:
    return {
        f"{which.name}_groups": kernel.groups,
        f"{which.name}_columns": kernel.columns,
        f"{which.name}_row_box": _three(row_box),
        f"{which.name}_column_box": _three(column_box),
        f"{which.name}_masks_by_product": int(masks_by_product),
    }


# ---- Random problems -----------------------------------------------------------------


def _random_box(
    choice: random.Random, limit: int, grid: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    box = [1] * len(grid)
    for _ in range(30):
        axis = choice.randrange(len(grid))
        larger = list(box)
        larger[axis] = choice.choice([box[axis] + 1, box[axis] * 2])
        spanned = (larger[axis] - 1) * dilation[axis] + 1
        if math.prod(larger) <= limit and spanned <= _tiling_sm90.MOST_SPANNED:
            box = larger
    return box


def _random_window(choice: random.Random, length: int) -> tuple[int, int, int, int]:
    dilation = min(choice.choice([1, 1, 1, 2, 3, 8]), length)
    size = choice.randint(1, max(1, length // dilation))
    if choice.random() < 0.5:
        size = min(size, choice.randint(1, 13))
    stride = choice.randint(1, size) if choice.random() < 0.4 else 1
    return size, stride, dilation, int(choice.random() < 0.3)


def _random_problem(choice: random.Random, passes: Sequence[Pass]) -> dict[str, Any]:
    rank = choice.choice([1, 2, 3])
    dims = [8, 16, 24, 32, 40, 64, 72, 80, 96, 128]
    if passes == (FORWARD,):
        dims += [160, 192, 256]
    head_dim = choice.choice(dims)
    value_dim = choice.choice([head_dim, head_dim, head_dim, 8, 32, 64, 128])
    grid = [choice.randint(1, (300, 40, 14)[rank - 1]) for _ in range(rank)]
    windows = [_random_window(choice, length) for length in grid]
    size, stride, dilation, is_causal = zip(*windows)
    key_heads, group = choice.choice([1, 2]), choice.choice([1, 2, 3])
    query_grid, frame = grid, {}
    if choice.random() < 0.3:
        lengths = [choice.randint(max(1, n - 5), n + 20) for n in grid]
        query_grid = [choice.randint(1, n) for n in grid]
        frame = {
            "length": _three(lengths),
            "query_origin": _three([choice.randint(-4, n - 1) for n in lengths], 0),
            "key_origin": _three([choice.randint(-4, 4) for _ in grid], 0),
        }
    entries = group * math.prod(2 * k - 1 for k in size)
    bias = entries <= _tiling_sm90.LARGEST_BIAS and choice.random() < 0.5
    problem = {
        "type": choice.choice(["bf16", "bf16", "f16"]),
        # Many samples of a small grid make pipelines stay where they are.
        "batch": choice.choice([1, 2, 3, 700 if math.prod(query_grid) <= 64 else 1]),
        "heads": key_heads * group,
        "key_heads": key_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "additional": choice.choice([0, 0, 0, 1, 5, 150]),
        "rank": rank,
        "scale": choice.choice([head_dim**-0.5, head_dim**-0.5, 0.3, -0.5, 0.0]),
        "query_grid": _three(query_grid),
        "key_grid": _three(grid),
        "kernel_size": _three(size),
        "stride": _three(stride),
        "dilation": _three(dilation),
        "is_causal": _three(is_causal, 0),
        "bias": int(bias),
        **frame,
    }
    for which in passes:
        channels = max(head_dim, value_dim)
        if which is GRADIENTS and (problem["additional"] or not which.takes(channels)):
            continue
        kernel = choice.choice(which.kernels[which.padded(channels)])
        rows, columns = query_grid, grid
        if which.rows_are_keys:
            rows, columns = grid, query_grid
        problem |= _tiling(
            which,
            kernel,
            _random_box(choice, _tiling_sm90.ROWS, rows, dilation),
            _random_box(choice, kernel.columns, columns, dilation),
            choice.random() < 0.7,
        )
    return problem


def random_problems(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """As many forward as backward ones."""
    choice = random.Random(seed)
    for i in range(count):
        if i % 2 == 0:
            name, passes = "forward", (FORWARD,)
        else:
            name, passes = "backward", (DQUERY, DKEY_DVALUE, GRADIENTS)
        yield {
            "name": f"random_{seed}_{i}",
            "pass": name,
            **_random_problem(choice, passes),
        }


# ---- Cases of the benchmarks ---------------------------------------------------------


def _tilings(
    which: Pass,
    channels: int,
    axes: tuple[Axis, ...],
    copies: int,
    has_bias: bool,
    most: int,
) -> list[dict[str, Any]]:
    if not which.takes(channels):
        return []
    found = []
    for kernel in which.kernels[which.padded(channels)]:
        best = _tiling_sm90.best_tilings(
            which, kernel, axes, copies, has_bias=has_bias, most=most
        )
        cuts = [(t.row_box, t.column_box, t.masks_by_product) for _, t in best]
        # The best one with masks of the other kind, too, where there is one.
        *boxes, by_product = cuts[0]
        other = _tiling_sm90.count(
            axes, which.interval, kernel, *boxes, masks_by_product=not by_product
        )
        if other.masks_by_product != by_product:
            cuts.append((*boxes, not by_product))
        found += [_tiling(which, kernel, *cut) for cut in cuts]
    return found


def _name(case: dict[str, Any], tiling: dict[str, Any]) -> str:
    """Of a case and the plan of every pass; without spaces."""
    return "/".join(map(str, (case["name"].replace(" ", "_"), *tiling.values())))


def case_problems(most: int, path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """For every pass and case the ``most`` cheapest boxes of every kernel."""
    for case in json.loads(path.read_text()):
        grid, size, heads = case["shape"], case["window"], case["H"]
        stride = case.get("stride", [1] * len(grid))
        dilation = case.get("dilation", [1] * len(grid))
        causal = case.get("causal", [False] * len(grid))
        axes = tuple(map(Axis, grid, size, stride, dilation, causal))
        problem = {
            "type": "bf16",
            "batch": case["B"],
            "heads": heads,
            "key_heads": heads,
            "head_dim": case["hd"],
            "value_dim": case["hd"],
            "additional": 0,
            "rank": len(grid),
            "scale": case["hd"] ** -0.5,
            "query_grid": _three(grid),
            "key_grid": _three(grid),
            "kernel_size": _three(size),
            "stride": _three(stride),
            "dilation": _three(dilation),
            "is_causal": _three([int(c) for c in causal], 0),
            "bias": int(case.get("bias", False)),
        }
        forward, *backward = (
            _tilings(
                which,
                case["hd"],
                axes,
                case["B"] * heads,
                case.get("bias", False),
                most,
            )
            for which in (FORWARD, DQUERY, DKEY_DVALUE, GRADIENTS)
        )
        for tiling in forward:
            yield {"name": _name(case, tiling), "pass": "forward", **problem, **tiling}
        backward = [tilings for tilings in backward if tilings]
        for tilings in itertools.zip_longest(*backward):
            tiling = {}
            for own, (first, *_) in zip(tilings, backward):
                tiling |= own or first
            yield {"name": _name(case, tiling), "pass": "backward", **problem, **tiling}


def main(arguments: Sequence[str]) -> None:
    kind, *numbers = arguments
    if kind == "random":
        count, seed = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
        problems = random_problems(count, seed)
    else:
        path = pathlib.Path(numbers[1]) if len(numbers) > 1 else CASES
        problems = case_problems(int(numbers[0]) if numbers else 2, path)
    for problem in problems:
        print(_line(problem))


if __name__ == "__main__":
    main(sys.argv[1:])
