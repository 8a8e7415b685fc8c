"""Differentiation rules: both modes, every order.

The forward primitive has a JVP rule that emits the *linear* tangent primitive, whose
transpose is the backward primitive, i.e. the native backward kernels: first-order
reverse mode costs one forward and one backward call and nothing else. Higher orders
differentiate the portable implementation, as functions of the operands alone: ``out``
and ``lse`` are functions of them too, so their own tangents are dropped there.

A field whose tangent is a symbolic zero never reaches the tangent primitive, and so its
gradient is never computed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_na import _xla
from jax_na._primitives import (
    backward_p,
    forward_p,
    residual_names,
    tangent_p,
    unpack,
)
from jax_na._problem import DIFFERENTIABLE, Operands, Problem
from jax_na._sharding import automatic

#: Names of the residuals for ``jax.checkpoint`` policies.
OUT_NAME, LSE_NAME = "jax_na_out", "jax_na_lse"


def _replace(operands: Operands, names: tuple[str, ...], arrays: Any) -> Operands:
    return operands._replace(**dict(zip(names, arrays, strict=True)))


# ---- The primitives as functions of the operands alone, for any order ----------------


def tangent_reference(
    *arrays: Any, tangents: tuple[str, ...], present: tuple[str, ...], problem: Problem
) -> list[jax.Array]:
    """``tangent_p`` without its residuals: ``(*tangents, *operands) -> [tout, tlse]``."""
    moving, arrays = arrays[: len(tangents)], arrays[len(tangents) :]
    operands = unpack(arrays, present)

    def forward(*fields: Any) -> Any:
        return _xla.forward(_replace(operands, tangents, fields), problem)

    primals = tuple(getattr(operands, name) for name in tangents)
    return list(jax.jvp(forward, primals, tuple(moving))[1])


def backward_reference(
    *arrays: Any,
    present: tuple[str, ...],
    has_dlse: bool,
    wrt: tuple[str, ...],
    problem: Problem,
) -> list[jax.Array]:
    """``backward_p`` without its residuals: ``(dout, [dlse,] *operands) -> gradients``."""
    cotangents, arrays = arrays[: 1 + has_dlse], arrays[1 + has_dlse :]
    operands = unpack(arrays, present)

    def forward(*fields: Any) -> Any:
        outputs = _xla.forward(_replace(operands, wrt, fields), problem)
        return outputs[: 1 + has_dlse]

    _, vjp = jax.vjp(forward, *(getattr(operands, name) for name in wrt))
    return list(vjp(tuple(cotangents)))


# ---- Rules ---------------------------------------------------------------------------


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _forward_jvp(
    primals: Any,
    tangents: Any,
    *,
    present: tuple[str, ...],
    problem: Problem,
    implementation: str | None,
) -> Any:
    params = dict(present=present, problem=problem, implementation=implementation)
    out, lse = forward_p.bind(*primals, **params)
    # Named here, so that a remat policy that saves both spares the second forward call.
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    moving = {
        name: tangent
        for name, tangent in zip(present, tangents, strict=True)
        if name in DIFFERENTIABLE and not _is_zero(tangent)
    }
    if not moving:
        zeros = [ad.Zero(jax.typeof(output).to_tangent_aval()) for output in (out, lse)]
        return [out, lse], zeros
    tangents_out = tangent_p.bind(
        *moving.values(), *primals, out, lse, tangents=tuple(moving), **params
    )
    return [out, lse], tangents_out


def _tangent_transpose(
    cotangents: Any,
    *arrays: Any,
    tangents: tuple[str, ...],
    present: tuple[str, ...],
    problem: Problem,
    implementation: str | None,
) -> list[Any]:
    dout, dlse = cotangents
    fields, residuals = arrays[len(tangents) : -2], arrays[-2:]
    wanted = [ad.is_undefined_primal(array) for array in arrays[: len(tangents)]]
    if _is_zero(dout) and _is_zero(dlse):
        gradients = [
            ad.Zero(array.aval) if want else None for array, want in zip(arrays, wanted)
        ]
        return [*gradients, *[None] * (len(arrays) - len(tangents))]
    has_dlse = not _is_zero(dlse)
    wrt = tuple(name for name, want in zip(tangents, wanted) if want)
    gradients = iter(
        backward_p.bind(
            ad.instantiate_zeros(dout),
            *([dlse] if has_dlse else []),
            *residuals,
            *fields,
            present=present,
            has_dlse=has_dlse,
            wrt=wrt,
            problem=problem,
            implementation=implementation,
        )
    )
    return [
        *(next(gradients) if want else None for want in wanted),
        *[None] * (len(arrays) - len(tangents)),
    ]


def _differentiate_reference(
    reference: Any, outputs: list[Any], primals: list[Any], tangents: list[Any]
) -> list[Any]:
    """Tangents of ``outputs = reference(*primals)`` along the non-zero tangents."""
    reference = automatic(reference, [jax.typeof(output) for output in outputs])
    moving = [i for i, tangent in enumerate(tangents) if not _is_zero(tangent)]

    def function(*fields: Any) -> Any:
        arrays = list(primals)
        for i, field in zip(moving, fields):
            arrays[i] = field
        return list(reference(*arrays))

    return jax.jvp(
        function,
        tuple(primals[i] for i in moving),
        tuple(tangents[i] for i in moving),
    )[1]


def _tangent_jvp(primals: Any, tangents_in: Any, **params: Any) -> Any:
    outputs = tangent_p.bind(*primals, **params)
    reference = functools.partial(
        tangent_reference,
        tangents=params["tangents"],
        present=params["present"],
        problem=params["problem"],
    )
    return outputs, _differentiate_reference(
        reference, outputs, list(primals[:-2]), list(tangents_in[:-2])
    )


def _backward_jvp(primals: Any, tangents_in: Any, **params: Any) -> Any:
    outputs = backward_p.bind(*primals, **params)
    reference = functools.partial(
        backward_reference,
        present=params["present"],
        has_dlse=params["has_dlse"],
        wrt=params["wrt"],
        problem=params["problem"],
    )
    names = residual_names(params["has_dlse"])
    kept = [i for i in range(len(primals)) if i >= len(names) or names[i][0] == "d"]
    return outputs, _differentiate_reference(
        reference,
        outputs,
        [primals[i] for i in kept],
        [tangents_in[i] for i in kept],
    )


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
