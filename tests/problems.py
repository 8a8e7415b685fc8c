"""Attention problems for the tests: chosen ones, random ones, and their arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies

from jax_na import _reference, _support

#: Head dimensions that every implementation takes.
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256)

#: Names of the arrays that have gradients, in the order of the public functions.
DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "rel_pos_bias",
    "additional_keys",
    "additional_values",
)


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """Fields of ``jax_na.Frame`` as (nested) tuples; the oracle takes it as it is."""

    length: Any
    query_origin: Any = 0
    key_origin: Any = 0

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            field.name: np.asarray(getattr(self, field.name), np.int32)
            for field in dataclasses.fields(self)
        }


@dataclasses.dataclass(frozen=True)
class ProblemSpec:
    """One call of ``jax_na.neighborhood_attention`` up to the numbers in its arrays.

    Attributes:
        key_grid: None means ``grid``; another needs a frame.
        key_heads, value_dim: None means ``heads`` and ``head_dim``.
        bias: whether there is a relative positional bias.
        additional: number of additional keys; 0 means the arguments are absent.
        amplitude: standard deviation of the scores, without bias.
        lse_cotangent: whether gradients start from the output and lse, or the output
            alone.
    """

    name: str
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    batch: tuple[int, ...] = (2,)
    heads: int = 2
    key_heads: int | None = None
    head_dim: int = 8
    value_dim: int | None = None
    bias: bool = False
    additional: int = 0
    key_grid: tuple[int, ...] | None = None
    frame: FrameSpec | None = None
    scale: float | None = None
    amplitude: float = 1.0
    lse_cotangent: bool = True

    def static_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the public functions that are no arrays."""
        names = ("kernel_size", "stride", "dilation", "is_causal", "scale")
        return {name: getattr(self, name) for name in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the differentiable arrays, out and lse."""
        key_heads = self.heads if self.key_heads is None else self.key_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        query_tokens = (*self.batch, *self.grid, self.heads)
        key_tokens = (*self.batch, *(self.key_grid or self.grid), key_heads)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (*query_tokens, self.head_dim),
            "key": (*key_tokens, self.head_dim),
            "value": (*key_tokens, value_dim),
        }
        if self.bias:
            shapes["rel_pos_bias"] = (
                self.heads,
                *(2 * k - 1 for k in self.kernel_size),
            )
        if self.additional:
            extra = (*self.batch, self.additional, key_heads)
            shapes["additional_keys"] = (*extra, self.head_dim)
            shapes["additional_values"] = (*extra, value_dim)
        return shapes | {"out": (*query_tokens, value_dim), "lse": query_tokens}

    def outside(self, origin: str) -> np.ndarray:
        """Which tokens lie outside the frame's grid: bool ``[*batch, *grid]``.

        Args:
            origin: "query_origin" or "key_origin", whose tokens are meant.
        """
        grid = self.grid
        if origin == "key_origin" and self.key_grid is not None:
            grid = self.key_grid
        rank = len(grid)
        result = np.zeros((*self.batch, *grid), bool)
        if self.frame is None:
            return result
        shape = (*self.batch, rank)
        length = np.broadcast_to(self.frame.length, shape)
        start = np.broadcast_to(getattr(self.frame, origin), shape)
        for axis, size in enumerate(grid):
            position = start[..., axis, None] + np.arange(size)
            outside = (position < 0) | (position >= length[..., axis, None])
            ones = [1] * rank
            ones[axis] = size
            result |= outside.reshape(*self.batch, *ones)
        return result


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The numbers of one problem, NumPy.

    Attributes:
        inputs: the differentiable arrays by argument name. The bias has the type in
            which gradients accumulate.
        dout, dlse: cotangents; ``dlse`` is None where lse has none.
    """

    spec: ProblemSpec
    inputs: dict[str, np.ndarray]
    dout: np.ndarray
    dlse: np.ndarray | None

    def oracle(self) -> dict[str, _reference.Result]:
        """Every result of the problem."""
        with np.errstate(invalid="ignore"):
            return _reference.attention_results(
                **self.inputs,
                **self.spec.static_arguments(),
                frame=self.spec.frame,
                dout=self.dout,
                dlse=self.dlse,
            )


def make_arrays(
    spec: ProblemSpec, dtype: Any, seed: int = 0, poison: bool = True
) -> Arrays:
    """Random numbers for a problem, rounded to ``dtype``.

    Args:
        poison: puts NaN into every token outside the frame's grid, cotangents included:
            they must not matter.
    """
    generator = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    accumulation = np.dtype("float64" if dtype == "float64" else "float32")
    shapes = spec.shapes()
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    unit = abs(scale) * math.sqrt(spec.head_dim)
    factors = {"query": spec.amplitude / unit if unit else 1.0}
    numbers = {
        name: factors.get(name, 1.0) * generator.standard_normal(shape)
        for name, shape in shapes.items()
    }
    if spec.additional:  # as likely to be seen as the keys of the window
        numbers["additional_keys"] *= 0.7
    if poison:
        queries, keys = spec.outside("query_origin"), spec.outside("key_origin")
        for name in ("query", "out", "lse"):
            numbers[name][queries] = np.nan
        for name in ("key", "value"):
            numbers[name][keys] = np.nan
    types = {"rel_pos_bias": accumulation, "lse": accumulation}
    rounded = {n: a.astype(types.get(n, dtype)) for n, a in numbers.items()}
    return Arrays(
        spec,
        {name: rounded[name] for name in DIFFERENTIABLE if name in rounded},
        rounded["out"],
        rounded["lse"] if spec.lse_cotangent else None,
    )


# ---- Chosen --------------------------------------------------------------------------

P, F = ProblemSpec, FrameSpec

CHOSEN: tuple[ProblemSpec, ...] = (
    # Windows of one axis.
    P("odd", (13,), (3,)),
    P("even", (12,), (4,), heads=3, batch=()),
    P("k=1", (9,), (1,), lse_cotangent=False),
    P("k=1, bias, lse", (3, 5), (1, 1), bias=True),
    P("full", (9,), (9,), batch=(3,), bias=True),
    P("full, even, large scores", (10,), (10,), amplitude=15.0),
    P("ragged dilation", (17,), (3,), dilation=5, heads=1),
    P("stride", (19,), (5,), stride=2, bias=True, lse_cotangent=False),
    P("stride = k", (14,), (4,), stride=4, batch=(2, 2), heads=1),
    P("stride, dilation", (29,), (5,), stride=3, dilation=3, bias=True),
    P("causal", (13,), (4,), is_causal=True, bias=True),
    P("causal, stride", (15,), (5,), stride=3, is_causal=True),
    P("causal, all", (23,), (4,), stride=4, dilation=3, is_causal=True, bias=True),
    P("long", (203,), (127,), heads=1, batch=(1,), head_dim=32),
    P("long, dilation", (300,), (65,), dilation=2, heads=1, batch=(), bias=True),
    P("long, causal", (259,), (96,), stride=8, is_causal=True, heads=1, batch=()),
    # Two axes.
    P("7x7", (14, 14), (7, 7), heads=2, batch=(1,), head_dim=32, bias=True),
    P("mixed", (11, 8), (3, 4), dilation=(3, 2), stride=(2, 3), bias=True),
    P("causal rows", (7, 9), (3, 5), is_causal=(True, False), bias=True),
    P("causal both", (6, 8), (4, 3), is_causal=True, stride=(2, 1), dilation=(1, 2)),
    P("thin", (1, 21), (1, 5), bias=True, additional=1),
    P("tall", (33, 3), (9, 3), heads=1, batch=(), head_dim=16),
    P("global", (5, 6), (5, 6), key_heads=1, lse_cotangent=False),
    P("13x13", (17, 19), (13, 13), heads=1, batch=(), head_dim=16, bias=True),
    # Three axes.
    P("3x3x3", (4, 5, 6), (3, 3, 3), heads=1, batch=(2,), bias=True),
    P(
        "video",
        (5, 6, 7),
        (2, 3, 3),
        dilation=(2, 1, 2),
        stride=(1, 3, 2),
        is_causal=(True, False, False),
        heads=4,
        key_heads=2,
        batch=(1,),
        bias=True,
        additional=3,
    ),
    P("3-D even", (3, 4, 8), (2, 4, 6), heads=1, batch=(), amplitude=3.0),
    # Channels: every head dimension, with another value dimension.
    P("8, 16", (6, 7), (3, 3), head_dim=8, value_dim=16, heads=4),
    P("16, 8", (18,), (7,), head_dim=16, value_dim=8, heads=4, key_heads=2),
    P("24, 40", (6, 7), (5, 3), head_dim=24, value_dim=40, bias=True),
    P("40, 24", (18,), (6,), head_dim=40, value_dim=24, heads=3, key_heads=1),
    P("64, 64", (9, 10), (5, 5), head_dim=64, batch=(1,), additional=2),
    P("72, 80", (20,), (7,), head_dim=72, value_dim=80, batch=(1,), bias=True),
    P("80, 72", (20,), (7,), head_dim=80, value_dim=72, batch=(1,)),
    P("96, 128", (6, 6), (3, 3), head_dim=96, value_dim=128, batch=(), additional=4),
    P("128, 96", (6, 6), (3, 4), head_dim=128, value_dim=96, batch=(1,), key_heads=1),
    P("160, 32", (15,), (5,), head_dim=160, value_dim=32, batch=(1,), dilation=2),
    P("192, 256", (15,), (5,), head_dim=192, value_dim=256, batch=(), bias=True),
    P("256, 192", (3, 3, 4), (3, 2, 3), head_dim=256, value_dim=192, batch=()),
    # Batch axes.
    P("empty batch", (6,), (3,), batch=(0,), bias=True, additional=2),
    P("empty inner batch", (4, 4), (3, 3), batch=(2, 0)),
    P("two batch axes", (5, 6), (3, 3), batch=(2, 3), heads=1, bias=True, additional=2),
    # Additional keys.
    P("many additional", (8, 8), (3, 3), additional=70, heads=4, key_heads=2, batch=()),
    # Scales and sizes of scores.
    P("scale 0", (12,), (5,), scale=0.0, bias=True),
    P("negative scale", (12,), (5,), scale=-0.7, additional=2),
    P("large scores", (9, 9), (5, 5), amplitude=15.0, head_dim=32, bias=True),
    P("large scores, additional", (31,), (7,), amplitude=15.0, additional=3),
    # Frames.
    P(
        "shard with halo",
        (8,),
        (5,),
        key_grid=(12,),
        frame=F(32, 8, 6),
        bias=True,
    ),
    P(
        "first shard, negative key origin",
        (6, 7),
        (3, 5),
        key_grid=(8, 11),
        frame=F((24, 26), (0, 0), (-1, -2)),
    ),
    P(
        "last shard, dilation",
        (9,),
        (3,),
        dilation=3,
        key_grid=(20,),
        frame=F(29, 22, 13),
        bias=True,
        additional=2,
    ),
    P(
        "origin is no multiple of the dilation",
        (5, 7),
        (3, 2),
        dilation=(3, 2),
        stride=(2, 2),
        key_grid=(16, 13),
        frame=F((31, 20), (7, 5), (1, 1)),
    ),
    P(
        "a length per sample",
        (7, 8),
        (3, 5),
        batch=(3,),
        frame=F(((7, 8), (5, 3), (2, 8))),
        bias=True,
        lse_cotangent=False,
    ),
    P(
        "class shorter than the window",
        (9,),
        (7,),
        batch=(3,),
        dilation=2,
        frame=F(((4,), (9,), (1,))),
        bias=True,
        amplitude=3.0,
    ),
    P(
        "causal, class shorter than the window",
        (8,),
        (5,),
        stride=3,
        is_causal=True,
        frame=F(3),
    ),
    P("empty grid", (6,), (3,), frame=F(0), bias=True),
    P("empty sample, additional", (6,), (3,), frame=F(((0,), (4,))), additional=3),
    P(
        "nothing visible here",
        (6,),
        (3,),
        key_grid=(4,),
        frame=F(40, ((0,), (10,)), ((20,), (9,))),
    ),
    P(
        "nothing visible but additional keys",
        (6,),
        (3,),
        key_grid=(4,),
        frame=F(40, ((0,), (10,)), ((20,), (9,))),
        additional=2,
    ),
    P(
        "queries partly before the grid",
        (8, 5),
        (3, 3),
        batch=(2, 2),
        heads=1,
        key_grid=(9, 6),
        frame=F(
            (12, 11),
            (((-2, 0), (6, 8)), ((0, -1), (-9, 3))),
            (((-3, 0), (5, 7)), ((-1, -2), (0, 2))),
        ),
        additional=1,
    ),
    P(
        "decode one token",
        (1,),
        (4,),
        stride=3,
        is_causal=True,
        key_grid=(10,),
        heads=4,
        key_heads=2,
        frame=F(16, ((9,), (7,)), 0),
    ),
    P(
        "3-D shard",
        (3, 4, 3),
        (3, 3, 2),
        is_causal=(True, False, False),
        key_grid=(5, 6, 5),
        frame=F((9, 12, 8), (2, 0, 6), (0, -1, 4)),
        bias=True,
    ),
)


# ---- Random --------------------------------------------------------------------------

T = TypeVar("T")


class Chooser(Protocol):
    """A source of decisions."""

    def integer(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``; ``low`` is the simplest."""


@dataclasses.dataclass
class SeededChooser:
    """Decisions from a seed."""

    generator: np.random.Generator

    def integer(self, low: int, high: int) -> int:
        return int(self.generator.integers(low, high, endpoint=True))


@dataclasses.dataclass
class _DrawnChooser:
    """Decisions that hypothesis makes, and can simplify."""

    draw: Any

    def integer(self, low: int, high: int) -> int:
        return self.draw(strategies.integers(low, high))


def _one_of(chooser: Chooser, options: Sequence[T]) -> T:
    return options[chooser.integer(0, len(options) - 1)]


def _chance(chooser: Chooser, percent: int) -> bool:
    return chooser.integer(0, 99) >= 100 - percent


def _random_frame(
    chooser: Chooser, spec: ProblemSpec, per_sample: bool
) -> dict[str, Any]:
    """A frame, and key grid, that need not fit each other."""
    rank = len(spec.grid)
    key_grid = tuple(max(1, size + chooser.integer(-2, 6)) for size in spec.grid)

    def field(low: list[int], high: list[int]) -> Any:
        samples = math.prod(spec.batch) if per_sample else 1
        rows = [
            [chooser.integer(a, b) for a, b in zip(low, high)] for _ in range(samples)
        ]
        if not per_sample:
            return tuple(rows[0])
        return _nested(np.reshape(rows, (*spec.batch, rank)).tolist())

    largest = [2 * size + 4 for size in spec.grid]
    return {
        "key_grid": key_grid,
        "frame": FrameSpec(
            field([0] * rank, largest),
            field([-3] * rank, list(spec.grid)),
            field([-4] * rank, list(spec.grid)),
        ),
    }


def _nested(rows: Any) -> Any:
    return tuple(map(_nested, rows)) if isinstance(rows, list) else rows


def random_spec(chooser: Chooser, name: str = "random") -> ProblemSpec:
    """A small valid problem; every feature occurs, and occurs together with others."""
    rank = chooser.integer(1, 3)
    largest = {1: 48, 2: 12, 3: 6}[rank]
    grid = tuple(chooser.integer(1, largest) for _ in range(rank))
    framed = _chance(chooser, 35)
    dilation, kernel_size, stride = [], [], []
    for length in grid:
        room = length + 3 if framed else length
        d = chooser.integer(1, min(4, room)) if _chance(chooser, 50) else 1
        k = chooser.integer(1, max(1, room // d))
        dilation.append(d)
        kernel_size.append(k)
        stride.append(chooser.integer(1, k) if _chance(chooser, 50) else 1)
    key_heads = chooser.integer(1, 3)
    group = chooser.integer(2, 3) if _chance(chooser, 40) else 1
    head_dim = _one_of(chooser, HEAD_DIMS[: 13 if _chance(chooser, 25) else 5])
    value_dim = None
    if _chance(chooser, 35):
        value_dim = _one_of(chooser, HEAD_DIMS[: 13 if _chance(chooser, 25) else 5])
    batch: tuple[int, ...] = _one_of(chooser, ((), (1,), (2,), (3,), (2, 2)))
    spec = ProblemSpec(
        name,
        grid,
        tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(_chance(chooser, 35) for _ in range(rank)),
        batch=batch,
        heads=key_heads * group,
        key_heads=key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        bias=_chance(chooser, 50),
        additional=chooser.integer(1, 9) if _chance(chooser, 35) else 0,
        scale=_one_of(chooser, (0.3, -0.2, 0.0)) if _chance(chooser, 20) else None,
        amplitude=_one_of(chooser, (4.0, 15.0)) if _chance(chooser, 30) else 1.0,
        lse_cotangent=not _chance(chooser, 40),
    )
    if framed:
        per_sample = bool(batch) and _chance(chooser, 60)
        spec = dataclasses.replace(spec, **_random_frame(chooser, spec, per_sample))
    return spec


@strategies.composite
def specs(draw: Any) -> ProblemSpec:
    """Hypothesis strategy for :func:`random_spec`."""
    return random_spec(_DrawnChooser(draw))


def visibility(spec: ProblemSpec) -> np.ndarray:
    """Which query sees which key: bool ``[samples, query tokens, key tokens]``."""
    window = zip(
        spec.kernel_size,
        *(
            value if isinstance(value, tuple) else (value,) * len(spec.grid)
            for value in (spec.stride, spec.dilation, spec.is_causal)
        ),
        strict=True,
    )
    shape = (math.prod(spec.batch), len(spec.grid))
    frame = spec.frame or FrameSpec(spec.grid)
    length, query_origin, key_origin = (
        np.broadcast_to(field, (*spec.batch, len(spec.grid))).reshape(shape)
        for field in (frame.length, frame.query_origin, frame.key_origin)
    )
    key_grid = spec.key_grid or spec.grid
    result = np.ones((shape[0], 1, 1), bool)
    for axis, parameters in enumerate(window):
        mask = np.zeros((shape[0], spec.grid[axis], key_grid[axis]), bool)
        for sample, query in np.ndindex(*mask.shape[:2]):
            for key in _reference.visible_keys(
                query + int(query_origin[sample, axis]),
                int(length[sample, axis]),
                *parameters,
            ):
                local = key - key_origin[sample, axis]
                if 0 <= local < mask.shape[2]:
                    mask[sample, query, local] = True
        tokens = (
            shape[0],
            result.shape[1] * mask.shape[1],
            result.shape[2] * mask.shape[2],
        )
        outer = result[:, :, None, :, None] & mask[:, None, :, None, :]
        result = outer.reshape(tokens)
    return result


# ---- What this machine runs ----------------------------------------------------------


def platform() -> str:
    """The default backend, as JAX names it in lowering rules."""
    backend = jax.default_backend()
    return {"gpu": "cuda"}.get(backend, backend)


def implementations() -> tuple[str, ...]:
    """The implementations that run on the default backend, best first."""
    return tuple(
        name
        for name in _support.IMPLEMENTATIONS
        if _support.refusal(name, platform()) is None
    )


def on_tensor_cores(implementation: str) -> bool:
    """Whether products are not those of plain float arithmetic here."""
    return platform() != "cpu" and implementation not in ("naive", "xla")


def dtypes(implementation: str) -> tuple[str, ...]:
    """The dtypes that an implementation takes on the default backend."""
    small = ("float32", "bfloat16", "float16")
    return small if on_tensor_cores(implementation) else ("float64", *small)


def chosen_dtypes(implementation: str) -> tuple[str, ...]:
    """The dtypes for problems picked by hand; random ones take all.

    The code of ``'xla'`` is the same for all: its widest and its narrowest.
    """
    return (
        ("float64", "bfloat16") if implementation == "xla" else dtypes(implementation)
    )
