"""Benchmark cases: one attention problem each, read from a JSON list."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import jax_na


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem; its JSON has the keys of ``cases.json``.

    Attributes:
        name: of the case.
        shape: the grid.
        window: kernel size per axis.
        batch, heads, head_dim: sizes B, N, D.
        stride, dilation: per axis, default 1.
        is_causal: per axis, default False.
        dtype: of the operands, default bfloat16.
        bias: whether there is a relative positional bias, default False.
    """

    name: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    batch: int
    heads: int
    head_dim: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    dtype: str = "bfloat16"
    bias: bool = False

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Case:
        rank = len(entry["shape"])
        return cls(
            entry["name"],
            tuple(entry["shape"]),
            tuple(entry["window"]),
            entry["B"],
            entry["H"],
            entry["hd"],
            tuple(entry.get("stride", [1] * rank)),
            tuple(entry.get("dilation", [1] * rank)),
            tuple(entry.get("causal", [False] * rank)),
            entry.get("dtype", "bfloat16"),
            entry.get("bias", False),
        )

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def window_arguments(self) -> dict[str, Any]:
        return {
            "kernel_size": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
        }

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.shape, self.heads, self.head_dim)

    @property
    def bias_table(self) -> jax.Array | None:
        """A random one of unit variance, float32, if the case has a bias."""
        if not self.bias:
            return None
        shape = (self.heads, *(2 * size - 1 for size in self.window))
        return jax.random.normal(jax.random.key(1), shape)

    def flops(self, backward: bool) -> int:
        """Useful floating-point operations."""
        operand = jax.ShapeDtypeStruct(self.operand_shape, jnp.dtype(self.dtype))
        plan = jax_na.explain(operand, operand, operand, **self.window_arguments)
        return plan.backward_flops if backward else plan.forward_flops

    def operands(self) -> list[jax.Array]:
        """Random query, key, value and cotangent."""
        return [
            jax.random.normal(key, self.operand_shape, jnp.dtype(self.dtype))
            for key in jax.random.split(jax.random.key(0), 4)
        ]


def load(path: str | pathlib.Path) -> list[Case]:
    return [
        Case.from_json(entry) for entry in json.loads(pathlib.Path(path).read_text())
    ]
