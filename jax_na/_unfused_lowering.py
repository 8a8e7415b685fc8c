"""Lowering rules of the unfused products: native kernels or portable code."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_na import (
    _ffi,
    _lowering,
    _native,
    _slots,
    _support,
    _tiling,
    _unfused,
    _window,
    _xla,
)
from jax_na._native import Kind, Result
from jax_na._problem import Problem, accumulation_dtype
from jax_na._sharding import varying_like

# ---- Portable ------------------------------------------------------------------------


def _pair_portable(
    queries: jax.Array,
    keys: jax.Array,
    *frames: jax.Array,
    problem: Problem,
    dtype: Any,
) -> list[jax.Array]:
    frame = _unfused.frame_of(frames)
    first, last = _unfused.grid_axes(queries, problem)
    products = _xla.qk(queries.astype(dtype), keys.astype(dtype), None, frame, problem)
    held = _slots.held(
        problem, queries.shape[first:last], keys.shape[first:last], frame, first
    )
    return [products if held is None else jnp.where(held, products, 0)]


def _gather_portable(
    slots: jax.Array, keys: jax.Array, *frames: jax.Array, problem: Problem, dtype: Any
) -> list[jax.Array]:
    frame = _unfused.frame_of(frames)
    return [_xla.av(slots.astype(dtype), keys.astype(dtype), frame, problem)]


def _scatter_portable(
    slots: jax.Array,
    queries: jax.Array,
    *frames: jax.Array,
    problem: Problem,
    dtype: Any,
    key_shape: tuple[int, ...],
) -> list[jax.Array]:
    # The gradient of gather, which sums in the dtype of the keys: not in a short one.
    wide = accumulation_dtype(queries.dtype)
    frame = _unfused.frame_of(frames)
    first, _ = _unfused.grid_axes(slots, problem)
    keys = jnp.zeros((*slots.shape[:first], *key_shape, queries.shape[-1]), wide)
    # Else their gradient would be the sum over the devices of a shard_map.
    keys = varying_like(keys, slots)
    _, vjp = jax.vjp(
        lambda keys: _xla.av(slots.astype(wide), keys, frame, problem), keys
    )
    (result,) = vjp(queries.astype(wide))
    return [result.astype(dtype)]


def _spread(
    bias: jax.Array, *frames: jax.Array, problem: Problem, grid: tuple[int, ...]
) -> list[jax.Array]:
    return [_slots.spread_bias(bias, _unfused.frame_of(frames), problem, grid)]


def _collect(slots: jax.Array, *frames: jax.Array, problem: Problem) -> list[jax.Array]:
    return [_slots.collect_bias(slots, _unfused.frame_of(frames), problem)]


# ---- Native --------------------------------------------------------------------------

_KINDS = {"queries": Kind.QUERY, "slots": Kind.QUERY, "keys": Kind.KEY}


def _native_product(
    *arrays: jax.Array,
    function: str,
    implementation: str,
    partitionable: bool,
    problem: Problem,
    result: Any,
    key_shape: tuple[int, ...],
) -> list[jax.Array]:
    """``result`` is the aval of the one result, ``key_shape`` is ``(*key_grid, K)``."""
    names = _unfused.NAMES[function]
    queries = arrays[0]  # or slots
    first, last = _unfused.grid_axes(queries, problem)
    operands = [(_KINDS[n], array) for n, array in zip(names, arrays[:2])]
    for frame in arrays[2:]:
        frame = _lowering._settled(frame, queries.shape[:first], full=partitionable)
        operands.append((Kind.FRAME, frame))
    by_key = function == "scatter"
    attributes: _native.Attributes = (
        ("kernel_size", problem.kernel_size),
        ("stride", problem.stride),
        ("dilation", problem.dilation),
        ("is_causal", tuple(map(int, problem.is_causal))),
        ("has_frame", len(arrays) > 2),
    )
    if implementation == "gemm":
        channels = result.shape[-1] if function != "pair" else arrays[1].shape[-1]
        grid = key_shape[:-1] if by_key else queries.shape[first:last]
        attributes += _tiles(problem, grid, channels, arrays[1].dtype, by_key)
    return _native.call(
        _ffi.target_name(function, implementation),
        operands,
        [Result(Kind.KEY if by_key else Kind.QUERY, tuple(result.shape), result.dtype)],
        attributes,
        batch_rank=first,
        key_heads=key_shape[-1],
        partitionable=partitionable,
    )


def _tiles(
    problem: Problem, grid: tuple[int, ...], channels: int, dtype: Any, by_key: bool
) -> _native.Attributes:
    """The tile of a product whose rows are the tokens of ``grid``."""
    axes = tuple(
        _tiling.Axis(*parameters)
        for parameters in zip(
            grid,
            problem.kernel_size,
            problem.stride,
            problem.dilation,
            problem.is_causal,
            strict=True,
        )
    )
    # Longer rows of channels leave shared memory for half a tile (cuda/gemm/plans.cuh).
    rows = 64 if channels * dtype.itemsize <= 512 else 32
    most_spanned = 224 // dtype.itemsize if by_key else None
    return (
        ("row_tile", _row_tile(axes, rows, most_spanned)),
        ("highest_precision", problem.precision is jax.lax.Precision.HIGHEST),
    )


def _spanned(axes: tuple[_tiling.Axis, ...], tile: tuple[int, ...]) -> int:
    """Slots of a query from that of the first key of a tile to that of the last one."""
    last = 0
    for axis, extent in zip(axes, tile, strict=True):
        last = last * axis.kernel_size + min(extent, axis.kernel_size) - 1
    return last + 1


@functools.lru_cache(maxsize=1024)
def _row_tile(
    axes: tuple[_tiling.Axis, ...], rows: int, most_spanned: int | None
) -> tuple[int, ...]:
    """The cheapest tile of ``rows`` tokens or fewer.

    They are queries where ``most_spanned`` is None, else keys, and then it is what
    :func:`_spanned` may be: every query brings so many slots, be they of the tile or not.
    """
    interval = _window.key_interval if most_spanned is None else _window.query_interval
    lengths = [axis.longest_box[0] for axis in axes]

    def cost(tile: tuple[int, ...]) -> float:
        # In boxes of one column these are all columns that tiles visit.
        tiling = _tiling.count(axes, interval, tile, (1,) * len(axes), rows, 1)
        slots = 0 if most_spanned is None else _spanned(axes, tile)
        per_tile = _tiling.CostModel().tile
        return tiling.boxes / 64 * (1 + slots / 128) + tiling.tiles * per_tile

    def tiles() -> Iterator[tuple[int, ...]]:
        for inner in itertools.product(
            *(range(1, min(rows, n) + 1) for n in lengths[1:])
        ):
            longest = min(rows // math.prod(inner), lengths[0])
            for first in range(longest, 0, -1):
                tile = (first, *inner)
                if most_spanned is None or _spanned(axes, tile) <= most_spanned:
                    yield tile
                    break

    return min(tiles(), key=cost)


# ---- Rules ---------------------------------------------------------------------------

#: The 'gemm' kernels index the slots of one query with so many bits.
_SLOT_BITS = 24


def _refusal(
    implementation: str, platform: str, dtype: np.dtype, channels: int, slots: int
) -> str | None:
    """Why ``implementation`` cannot run a product on ``platform``; None if it can."""
    if implementation == "fused":
        return "'fused' never holds the scores of a window, it is for attention alone"
    traits = _support.Traits(dtype, channels, channels)
    reason = _support.refusal(implementation, platform, traits, function="pair")
    if reason is None and implementation == "gemm" and slots >= 2**_SLOT_BITS:
        return f"'gemm' takes windows of fewer than 2**{_SLOT_BITS} keys, got {slots}"
    return reason


def _rule(function: str, platform: str | None, portable: Any) -> Any:
    """Lowering rule for one platform; None stands for any without kernels."""

    def lower(
        ctx: Any, *operands: Any, implementation: str | None, **params: Any
    ) -> Any:
        name = platform or ctx.module_context.platforms[0]
        problem, first = params["problem"], ctx.avals_in[0]
        # Of the two arrays that are no slots, one is an operand.
        tokens = ctx.avals_in[1]
        chosen = _support.pick(
            implementation,
            lambda candidate: _refusal(
                candidate,
                name,
                tokens.dtype,
                tokens.shape[-1],
                math.prod(problem.kernel_size),
            ),
        )
        if chosen == "xla":
            if implementation is None and name == "cuda" and name not in _ffi.TARGETS:
                _lowering._warn_of_missing_kernels()
            call = functools.partial(portable, **params)
        else:
            start, _ = _unfused.grid_axes(first, problem)
            key_shape = params.get("key_shape", tokens.shape[start:-1])
            call = functools.partial(
                _native_product,
                function=function,
                implementation=chosen,
                partitionable=_lowering._is_partitioned(ctx)
                and not _lowering._has_symbolic_sizes(ctx),
                problem=problem,
                result=ctx.avals_out[0],
                key_shape=key_shape,
            )
        return _lowering._lower_function(ctx, call, operands)

    return lower


def _lower_linear(function: Any, ctx: Any, *operands: Any, **params: Any) -> Any:
    """The bias goes by portable code on every platform."""
    call = functools.partial(function, **params)
    return _lowering._lower_function(ctx, call, operands)


for _platform in (None, *_support.NATIVE_PLATFORMS):
    for _name, _portable in (
        ("pair", _pair_portable),
        ("gather", _gather_portable),
        ("scatter", _scatter_portable),
    ):
        mlir.register_lowering(
            _unfused.PRIMITIVES[_name],
            _rule(_name, _platform, _portable),
            platform=_platform,
        )
for _name, _function in (("spread", _spread), ("collect", _collect)):
    mlir.register_lowering(
        _unfused.PRIMITIVES[_name], functools.partial(_lower_linear, _function)
    )
