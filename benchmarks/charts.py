"""Charts of measurements."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def bars(results: Sequence[Any], folder: pathlib.Path) -> None:
    """Draws ``forward.png`` and ``backward.png``: milliseconds by case and contender."""
    names = list(dict.fromkeys(result.case for result in results))
    contenders = list(
        dict.fromkeys(r.contender for r in results if r.forward_ms is not None)
    )
    for kind in ("forward", "backward"):
        figure = Figure(figsize=(3 + 2.2 * len(names), 5), layout="constrained")
        axes = figure.subplots()
        width = 0.85 / max(1, len(contenders))
        for index, contender in enumerate(contenders):
            times = {
                r.case: getattr(r, f"{kind}_ms")
                for r in results
                if r.contender == contender and r.forward_ms is not None
            }
            positions = [i + index * width for i, n in enumerate(names) if n in times]
            axes.bar(positions, list(times.values()), width, label=contender)
        axes.set_xticks([i + 0.4 for i in range(len(names))], names, rotation=20)
        axes.set(yscale="log", ylabel="ms", title=f"{kind}, lower is better")
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{kind}.png", dpi=110)


def limits(
    results: Sequence[Any],
    head_dims: Mapping[str, int],
    dense: Collection[str],
    folder: pathlib.Path,
) -> None:
    """Draws ``limits.svg``: ``'fused'``, useful and visited, under dense attention.

    Args:
        results: measurements of ``run.py``.
        head_dims: of every case, by name.
        dense: names of the cases whose windows are the grid: the limits.
        folder: where to.
    """
    own = {
        r.case: r
        for r in results
        if r.contender == "jax_na fused" and r.forward_ms is not None
    }
    names = [name for name in own if name not in dense]
    figure = Figure(figsize=(3 + 1.5 * len(names), 8), layout="constrained")
    for axes, kind in zip(figure.subplots(2, sharex=True), ("forward", "backward")):
        useful = [getattr(own[name], f"{kind}_tflops") for name in names]
        places = range(len(names))
        # The plan of the forward pass tells what it visits; that of the other does not.
        if kind == "forward":
            visited = [
                rate * (own[name].visited_over_useful or 1)
                for name, rate in zip(names, useful)
            ]
            axes.bar(places, visited, 0.6, label="visited", color="lightsteelblue")
        axes.bar(places, useful, 0.6, label="useful", color="steelblue")
        limit = {
            head_dims[name]: getattr(own[name], f"{kind}_tflops")
            for name in dense
            if name in own
        }
        for place, name in zip(places, names):
            rate = limit.get(head_dims[name])
            if rate is not None:
                axes.hlines(rate, place - 0.45, place + 0.45, color="firebrick")
        axes.plot([], [], color="firebrick", label="dense, same head dimension")
        axes.set_xticks(places, names, rotation=20, ha="right")
        axes.set(ylabel="TFLOP/s", title=kind)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    # Of the same measurements the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "limits"}):
        figure.savefig(folder / "limits.svg", metadata={"Date": None})
