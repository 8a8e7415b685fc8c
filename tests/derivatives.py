"""Derivatives of attention, of first and second order, mode over mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Arrays = Any  # a tree
Function = Callable[[Arrays], tuple[jax.Array, jax.Array]]  # out and lse


def loss_of(function: Function) -> Callable[[Arrays], jax.Array]:
    """Not linear in out and lse, and of the same weight for both."""

    def loss(arrays: Arrays) -> jax.Array:
        out, lse = function(arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    return loss


def jvp(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    return jax.jvp(function, (arrays,), (tangents,))


def linearize(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    primals, linear = jax.linearize(function, arrays)
    return primals, linear(tangents), linear(jax.tree.map(jnp.cos, tangents))


def linear_transpose(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    (out, lse), linear = jax.linearize(function, arrays)
    return jax.linear_transpose(linear, tangents)((jnp.cos(out), jnp.sin(lse)))


def tangent_of_gradient(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    return jax.jvp(jax.grad(loss_of(function)), (arrays,), (tangents,))


def gradient_of_tangent(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    def slope(arrays: Arrays) -> jax.Array:
        return jax.jvp(loss_of(function), (arrays,), (tangents,))[1]

    return jax.value_and_grad(slope)(arrays)


def gradient_of_gradient(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    def slope(arrays: Arrays) -> jax.Array:
        gradients = jax.grad(loss_of(function))(arrays)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradients, tangents)))

    return jax.value_and_grad(slope)(arrays)


def tangent_of_tangent(function: Function, arrays: Arrays, tangents: Arrays) -> Any:
    def tangent(arrays: Arrays) -> Any:
        return jax.jvp(function, (arrays,), (tangents,))[1]

    return jax.jvp(tangent, (arrays,), (jax.tree.map(jnp.cos, tangents),))


#: Each is a function of a function, its arrays, and tangents of these.
DERIVATIVES: dict[str, Callable[[Function, Arrays, Arrays], Any]] = {
    "jit": lambda function, arrays, tangents: function(arrays),
    "grad": lambda function, arrays, tangents: jax.grad(loss_of(function))(arrays),
    "jvp": jvp,
    "linearize": linearize,
    "linear_transpose": linear_transpose,
    "jvp(grad)": tangent_of_gradient,
    "grad(jvp)": gradient_of_tangent,
    "grad(grad)": gradient_of_gradient,
    "jvp(jvp)": tangent_of_tangent,
}


def second_order(function: Function, arrays: Arrays) -> Any:
    """All of second order along one direction, in one program."""
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(arrays)))
    keys = jax.tree.unflatten(jax.tree.structure(arrays), list(keys))

    @jax.jit
    def evaluate(arrays: Arrays) -> Any:
        def draw(key: jax.Array, array: jax.Array) -> jax.Array:
            return jax.random.normal(key, array.shape, array.dtype)

        tangents = jax.tree.map(draw, keys, arrays)
        return {
            "jvp(grad)": tangent_of_gradient(function, arrays, tangents),
            "grad(jvp)": gradient_of_tangent(function, arrays, tangents),
            "grad(grad)": gradient_of_gradient(function, arrays, tangents),
            "jvp(jvp)": tangent_of_tangent(function, arrays, tangents),
        }

    return evaluate(arrays)
