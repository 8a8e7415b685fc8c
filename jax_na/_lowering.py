"""Lowering rules: from the primitives to native kernels or to the portable code."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jax_na import _autodiff, _ffi, _gemm, _native, _support, _xla
from jax_na._native import Kind, Result
from jax_na._plan import is_deterministic, make_plan, workspace_shape
from jax_na._primitives import (
    BROADCASTABLE,
    backward_p,
    forward_p,
    residual_names,
    tangent_p,
    traits,
    unpack,
)
from jax_na._problem import (
    DIFFERENTIABLE,
    Operands,
    Problem,
    accumulation_dtype,
)
from jax_na._sharding import automatic

_KINDS = {
    "query": Kind.QUERY,
    "key": Kind.KEY,
    "value": Kind.KEY,
    "bias": Kind.BIAS,
    "additional_key": Kind.KEY,
    "additional_value": Kind.KEY,
    "frame": Kind.FRAME,
}


# ---- Portable, and composed of products ----------------------------------------------


def _forward_in_jax(
    *arrays: Any, module: types.ModuleType, present: tuple[str, ...], problem: Problem
) -> list[jax.Array]:
    return list(module.forward(unpack(arrays, present), problem))


def _tangent_portable(*arrays: Any, **params: Any) -> list[jax.Array]:
    return _autodiff.tangent_reference(*arrays[:-2], **params)


def _backward_in_jax(
    *arrays: Any,
    module: types.ModuleType,
    present: tuple[str, ...],
    has_dlse: bool,
    wrt: tuple[str, ...],
    problem: Problem,
) -> list[jax.Array]:
    names = residual_names(has_dlse)
    residuals = dict(zip(names, arrays))
    gradients = module.backward(
        unpack(arrays[len(names) :], present),
        problem,
        residuals["out"],
        residuals["lse"],
        residuals["dout"],
        residuals.get("dlse"),
        frozenset(wrt),
    )
    return [gradients[name] for name in wrt]


# ---- Native --------------------------------------------------------------------------


def _settled(array: jax.Array, batch: tuple[Any, ...], full: bool) -> jax.Array:
    """``array`` with batch axes that are all full or, unless ``full``, all of size 1."""
    own = array.shape[: len(batch)]
    if own == batch or (not full and all(size == 1 for size in own)):
        return array
    return jnp.broadcast_to(array, (*batch, *array.shape[len(batch) :]))


def _kernel_operands(
    operands: Operands, problem: Problem, partitionable: bool
) -> Operands:
    """The operands with bias and frame as the kernels take them."""
    batch = operands.query.shape[: -problem.rank - 2]
    return operands._replace(
        **{
            name: _settled(array, batch, full=partitionable)
            for name in BROADCASTABLE
            if (array := getattr(operands, name)) is not None
        }
    )


def _attributes(problem: Problem, present: tuple[str, ...]) -> _native.Attributes:
    return (
        ("kernel_size", problem.kernel_size),
        ("stride", problem.stride),
        ("dilation", problem.dilation),
        ("is_causal", tuple(map(int, problem.is_causal))),
        ("scale", problem.scale),
        ("highest_precision", problem.precision is jax.lax.Precision.HIGHEST),
        ("has_bias", "bias" in present),
        ("has_additional", "additional_key" in present),
        ("has_frame", "frame" in present),
    )


def _forward_native(
    *arrays: Any,
    present: tuple[str, ...],
    problem: Problem,
    implementation: str,
    platform: str,
    partitionable: bool,
) -> list[jax.Array]:
    operands = _kernel_operands(unpack(arrays, present), problem, partitionable)
    plan = make_plan(implementation, platform, problem, operands)
    query, rows = operands.query, operands.query.shape[:-1]
    return _native.call(
        _ffi.target_name("forward", implementation),
        [(_KINDS[name], getattr(operands, name)) for name in present],
        [
            Result(Kind.QUERY, (*rows, operands.value.shape[-1]), query.dtype),
            Result(Kind.ROW, rows, accumulation_dtype(query.dtype)),
        ],
        (
            *_attributes(problem, present),
            *(plan.forward_attributes if plan is not None else ()),
        ),
        batch_rank=query.ndim - problem.rank - 2,
        key_heads=operands.key.shape[-2],
        partitionable=partitionable,
    )


def _backward_native(
    *arrays: Any,
    present: tuple[str, ...],
    has_dlse: bool,
    wrt: tuple[str, ...],
    problem: Problem,
    implementation: str,
    platform: str,
    partitionable: bool,
) -> list[jax.Array]:
    names = residual_names(has_dlse)
    residuals = dict(zip(names, arrays))
    given = unpack(arrays[len(names) :], present)
    operands = _kernel_operands(given, problem, partitionable)
    dout, lse = residuals["dout"], residuals["lse"]
    # These kernels make delta by the way, where they can.
    makes_delta = platform == "cuda" and implementation == "fused"
    if makes_delta:
        rows = [(Kind.QUERY, residuals["out"])]
        if has_dlse:
            rows.append((Kind.ROW, residuals["dlse"]))
    else:
        accumulation = accumulation_dtype(dout.dtype)
        products = dout.astype(accumulation) * residuals["out"].astype(accumulation)
        delta = products.sum(axis=-1)
        if has_dlse:
            delta -= residuals["dlse"]
        rows = [(Kind.ROW, delta)]
    results = [
        Result(_KINDS[name], array.shape, array.dtype)
        for name in wrt
        for array in [getattr(operands, name)]
    ]
    plan = make_plan(implementation, platform, problem, operands)
    deterministic = is_deterministic(problem)
    workspace = None
    if plan is not None:
        workspace = workspace_shape(plan, problem, operands, wrt, deterministic)
    if makes_delta:
        results.append(Result(Kind.ROW, lse.shape, lse.dtype))
    if workspace is not None:
        results.append(Result(Kind.WORKSPACE, workspace, jnp.dtype("float32")))
    gradients = _native.call(
        _ffi.target_name("backward", implementation),
        [
            (Kind.QUERY, dout),
            (Kind.ROW, lse),
            *rows,
            *((_KINDS[name], getattr(operands, name)) for name in present),
        ],
        results,
        (
            *_attributes(problem, present),
            ("wrt", tuple(int(name in wrt) for name in DIFFERENTIABLE)),
            ("makes_delta", makes_delta),
            ("has_dlse", has_dlse),
            ("deterministic", deterministic),
            *(plan.backward_attributes(wrt, deterministic) if plan is not None else ()),
        ),
        batch_rank=dout.ndim - problem.rank - 2,
        key_heads=operands.key.shape[-2],
        partitionable=partitionable,
    )
    return [
        _summed_to(gradient, getattr(given, name).shape)
        for name, gradient in zip(wrt, gradients)  # delta and a workspace may follow
    ]


def _summed_to(gradient: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
    """Sums over the axes along which ``_settled`` broadcast the operand."""
    axes = tuple(
        axis
        for axis, (size, full) in enumerate(zip(shape, gradient.shape, strict=True))
        if size != full
    )
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


# ---- Rules ---------------------------------------------------------------------------


def _is_partitioned(ctx: Any) -> bool:
    """Whether XLA is to split this program over several devices.

    Not so where every axis of the mesh is manual (a ``shard_map`` over all of it): the
    program is that of one device then.
    """
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        automatic = set(mesh.axis_names) - set(context.manual_axes)
        return any(mesh.shape[axis] > 1 for axis in automatic)
    return (getattr(context, "num_devices", None) or 1) > 1


def _has_symbolic_sizes(ctx: Any) -> bool:
    return not all(
        isinstance(size, int) for aval in ctx.avals_in for size in aval.shape
    )


@functools.cache
def _warn_of_missing_kernels() -> None:
    """Once per process."""
    warnings.warn(
        "jax_na was installed without CUDA kernels, so neighborhood attention runs as "
        "portable JAX code on this GPU: correct, but slow. Reinstall it where a CUDA "
        "compiler is found, e.g. with JAX_NA_CUDA=ON; jax_na.support() tells more.",
        stacklevel=2,
    )


def _lower_function(ctx: Any, function: Any, operands: Any) -> Any:
    function = automatic(function, ctx.avals_out)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _rule(platform: str | None, native: Any, in_jax: Any) -> Any:
    """Lowering rule for one platform; None stands for any without kernels."""

    def lower(
        ctx: Any, *operands: Any, implementation: str | None, **params: Any
    ) -> Any:
        name = platform or ctx.module_context.platforms[0]
        avals = ctx.avals_in[-len(params["present"]) :]
        call = traits(unpack(avals, params["present"]))
        chosen = _support.choose(implementation, name, call)
        if chosen == "xla":
            if implementation is None and name == "cuda" and name not in _ffi.TARGETS:
                _warn_of_missing_kernels()
            function = functools.partial(in_jax, module=_xla, **params)
        elif chosen == "gemm":
            function = functools.partial(in_jax, module=_gemm, **params)
        else:
            # Shardy's rules take no symbolic sizes; such a program is that of one
            # device, or XLA gathers the operands of the call.
            partitionable = _is_partitioned(ctx) and not _has_symbolic_sizes(ctx)
            function = functools.partial(
                native,
                implementation=chosen,
                platform=name,
                partitionable=partitionable,
                **params,
            )
        return _lower_function(ctx, function, operands)

    return lower


for _platform in (None, *_support.NATIVE_PLATFORMS):
    for _primitive, _native_rule, _jax_rule in (
        (forward_p, _forward_native, _forward_in_jax),
        (backward_p, _backward_native, _backward_in_jax),
    ):
        mlir.register_lowering(
            _primitive,
            _rule(_platform, _native_rule, _jax_rule),
            platform=_platform,
        )


def _lower_tangent(
    ctx: Any, *operands: Any, implementation: str | None, **params: Any
) -> Any:
    """Forward mode is portable code on every platform."""
    del implementation
    return _lower_function(
        ctx, functools.partial(_tangent_portable, **params), operands
    )


mlir.register_lowering(tangent_p, _lower_tangent)
