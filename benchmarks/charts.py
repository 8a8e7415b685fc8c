"""Bar charts of measurements."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

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
