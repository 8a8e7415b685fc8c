"""Draws the pictures of the documentation, as small SVG texts.

    python docs/figures.py           # writes docs/figures/*.svg
    python docs/figures.py --check   # fails if a committed picture is out of date

What a query sees comes from ``jax_na.window_mask``, so that the pictures cannot
disagree with the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import jax_na

FOLDER = pathlib.Path(__file__).parent / "figures"

QUERY, VISIBLE, HIDDEN, OUTSIDE = "#e8590c", "#74c0fc", "#f1f3f5", "#ced4da"
MARGIN = 16
TITLE_HEIGHT = 40


@dataclasses.dataclass(frozen=True)
class Panel:
    """A grid of cells with two lines of text above it.

    Attributes:
        title: first line, set as code.
        note: second line.
        layers: ``(colour, mask)`` pairs painted in turn; masks are ``[rows, columns]``.
        axes: labels of the rows and of the columns, if any.
    """

    title: str
    note: str
    layers: Sequence[tuple[str, np.ndarray]]
    axes: tuple[str, str] | None = None


# ---- Panels --------------------------------------------------------------------------


def matrix(title: str, note: str, length: int, **window: Any) -> Panel:
    """A 1-D window for all queries: one row per query, one column per key."""
    mask = np.asarray(jax_na.window_mask((length,), **window))
    layers = [(VISIBLE, mask), (QUERY, np.eye(length, dtype=bool))]
    return Panel(title, note, layers, ("query", "key"))


def grid(
    title: str, note: str, size: int, query: tuple[int, int], **window: Any
) -> Panel:
    """What ``query`` sees of a 2-D grid, and the queries of its stride group."""
    mask = np.asarray(jax_na.window_mask((size, size), **window))
    queries = np.zeros((size, size), bool)
    queries[_group(query, size, window.get("stride", 1))] = True
    return Panel(title, note, [(VISIBLE, mask[query]), (QUERY, queries)])


def _group(query: tuple[int, int], size: int, stride: int) -> tuple[slice, ...]:
    """The tokens that share the window of ``query`` where the dilation is 1."""
    starts = [index // stride * stride for index in query]
    return tuple(slice(start, min(start + stride, size)) for start in starts)


# ---- SVG -----------------------------------------------------------------------------


def _text(x: int, y: int, style: str, text: str, transform: str = "") -> str:
    rotated = f' transform="{transform}"' if transform else ""
    return f'<text class="{style}" x="{x}" y="{y}"{rotated}>{text}</text>'


def _cells(colour: str, mask: np.ndarray, x: int, y: int, cell: int) -> str:
    side = cell - 1  # one pixel apart
    moves = (f"M{x + j * cell} {y + i * cell}" for i, j in np.argwhere(mask))
    path = "".join(f"{move}h{side}v{side}h-{side}z" for move in moves)
    return f'<path fill="{colour}" d="{path}"/>'


def _panel(panel: Panel, x: int, y: int, cell: int) -> list[str]:
    rows, columns = panel.layers[0][1].shape
    top = y + TITLE_HEIGHT
    elements = [
        _text(x, y + 12, "code", panel.title),
        _text(x, y + 29, "note", panel.note),
        f'<rect fill="{HIDDEN}" x="{x}" y="{top}" width="{columns * cell - 1}" '
        f'height="{rows * cell - 1}"/>',
    ]
    elements += [_cells(colour, mask, x, top, cell) for colour, mask in panel.layers]
    if panel.axes is not None:
        row_label, column_label = panel.axes
        bottom = top + rows * cell
        elements.append(_text(x, bottom + 13, "note", f"{column_label} →"))
        turn = f"rotate(-90 {x - 5} {bottom})"
        elements.append(_text(x - 5, bottom, "note", f"← {row_label}", turn))
    return elements


def draw(panels: Sequence[Panel], cell: int, gap: int = 28) -> str:
    """The panels in one row."""
    elements, x, height = [], MARGIN, 0
    for panel in panels:
        rows, columns = panel.layers[0][1].shape
        label = 14 if panel.axes is not None else 0
        elements += _panel(panel, x + label, MARGIN, cell)
        x += label + columns * cell + gap
        height = max(height, rows * cell + label)
    width, height = x - gap + MARGIN, height + TITLE_HEIGHT + 2 * MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">'
    )
    style = (
        "<style>text{fill:#343a40;font-family:sans-serif;font-size:12px}"
        ".code{font-family:monospace}.note{fill:#868e96}</style>"
    )
    # Its own background, so that the text is legible on a dark page too.
    background = f'<rect fill="#fff" width="{width}" height="{height}" rx="6"/>'
    return "\n".join([head, style, background, *elements, "</svg>\n"])


# ---- Figures -------------------------------------------------------------------------


def overview() -> str:
    """The picture of the README."""
    middle, corner, size = (7, 7), (0, 14), 15
    everything = [
        (VISIBLE, np.ones((size, size), bool)),
        (QUERY, np.eye(size, dtype=bool)[:, 7:8] & np.eye(size, dtype=bool)[7:8]),
    ]
    panels = [
        Panel("self-attention", "every query sees n keys", everything),
        grid("kernel_size=7", "only neighbors: 49", size, middle, kernel_size=(7, 7)),
        grid("kernel_size=7", "at a corner too: 49", size, corner, kernel_size=(7, 7)),
        grid(
            "dilation=2", "further for the same cost", size, middle,
            kernel_size=(7, 7), dilation=2,
        ),
        grid(
            "stride=3", "groups share a window", size, middle,
            kernel_size=(7, 7), stride=3,
        ),
        grid(
            "is_causal=True", "no later key, per axis", size, middle,
            kernel_size=(5, 7), is_causal=(True, False),
        ),
    ]  # fmt: skip
    return draw(panels, cell=10, gap=22)


def _window_figure(
    title: str, length: int, kernel_size: int, notes: Sequence[str], **options: Any
) -> str:
    """All queries of an axis, then two queries of a grid."""
    window = {"kernel_size": (kernel_size,) * 2, **options}
    panels = [
        matrix(title, notes[0], length, kernel_size=(kernel_size,), **options),
        grid(title, notes[1], length, (length // 2, length // 2), **window),
        grid(title, notes[2], length, (1, length - 1), **window),
    ]
    return draw(panels, cell=13)


def window_odd() -> str:
    notes = ("as many keys before as after", "in the middle", "near an edge")
    return _window_figure("kernel_size=5", 13, 5, notes)


def window_even() -> str:
    notes = ("one more key before", "in the middle", "near an edge")
    return _window_figure("kernel_size=4", 13, 4, notes)


def window_dilated() -> str:
    notes = ("every third token", "in the middle", "near an edge")
    return _window_figure("kernel_size=3, dilation=3", 13, 3, notes, dilation=3)


def window_strided() -> str:
    notes = ("three queries share a window", "in the middle", "near an edge")
    return _window_figure("kernel_size=5, stride=3", 13, 5, notes, stride=3)


def window_edge() -> str:
    """The same window in the middle, at an edge and in a corner."""
    window = {"kernel_size": (5, 5)}
    panels = [
        grid("query (6, 6)", "25 keys", 13, (6, 6), **window),
        grid("query (6, 12)", "25 keys, shifted left", 13, (6, 12), **window),
        grid("query (1, 12)", "25 keys, shifted twice", 13, (1, 12), **window),
    ]
    return draw(panels, cell=13)


def window_causal() -> str:
    """Causal on one axis of one, on the first of two, and on both."""
    middle = (6, 6)
    panels = [
        matrix("is_causal=True", "kernel_size=4", 13, kernel_size=(4,), is_causal=True),
        grid(
            "is_causal=(True, False)", "kernel_size=(4, 5)", 13, middle,
            kernel_size=(4, 5), is_causal=(True, False),
        ),
        grid(
            "is_causal=True", "kernel_size=(4, 4)", 13, middle,
            kernel_size=(4, 4), is_causal=True,
        ),
    ]  # fmt: skip
    return draw(panels, cell=13)


def window_causal_strided() -> str:
    """What a stride adds to a causal window."""
    panels = [
        matrix(
            f"kernel_size=5, stride={stride}", note, 13,
            kernel_size=(5,), stride=stride, is_causal=True,
        )
        for stride, note in [(1, "causal"), (3, "causal"), (5, "causal: blocks")]
    ]  # fmt: skip
    return draw(panels, cell=13)


def frames() -> str:
    """Three uses of a frame; grey cells lie outside the arrays or the true grid."""
    window, size = {"kernel_size": (5,)}, 12
    diagonal = np.eye(size, dtype=bool)

    shard = np.zeros((size, size), bool)
    shard[4:8, 2:10] = True
    seen = np.zeros((size, size), bool)
    frame = jax_na.Frame(length=size, query_origin=4, key_origin=2)
    seen[4:8, 2:10] = jax_na.window_mask((4,), key_grid=(8,), frame=frame, **window)

    sample = np.zeros((size, size), bool)
    sample[:7, :9] = True
    query = (6, 4)
    frame = jax_na.Frame(length=np.array([7, 9]))
    mask = np.asarray(jax_na.window_mask((size, size), (5, 5), frame=frame))
    token = np.zeros((size, size), bool)
    token[query] = True

    chunk = np.zeros((size, size), bool)
    chunk[7:10] = True
    frame = jax_na.Frame(length=size, query_origin=7)
    decoded = np.zeros((size, size), bool)
    decoded[7:10] = jax_na.window_mask(
        (3,), key_grid=(size,), frame=frame, is_causal=True, **window
    )
    axes = ("query", "key")
    panels = [
        Panel(
            "query_origin=4, key_origin=2",
            "a shard and its halo",
            [(OUTSIDE, ~shard), (VISIBLE, seen), (QUERY, diagonal & shard)],
            axes,
        ),
        Panel(
            "length=[7, 9]",
            "a padded sample",
            [(OUTSIDE, ~sample), (VISIBLE, mask[query]), (QUERY, token)],
        ),
        Panel(
            "query_origin=7",
            "new tokens and a cache",
            [(OUTSIDE, ~chunk), (VISIBLE, decoded), (QUERY, diagonal & chunk)],
            axes,
        ),
    ]
    return draw(panels, cell=14, gap=64)


FIGURES = {
    "overview": overview,
    "frames": frames,
    "window_odd": window_odd,
    "window_even": window_even,
    "window_edge": window_edge,
    "window_dilated": window_dilated,
    "window_strided": window_strided,
    "window_causal": window_causal,
    "window_causal_strided": window_causal_strided,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args()
    stale = []
    for name, figure in FIGURES.items():
        path, content = FOLDER / f"{name}.svg", figure()
        if not args.check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(path.name)
    if stale:
        sys.exit(f"out of date, run python docs/figures.py: {', '.join(stale)}")


if __name__ == "__main__":
    main()
