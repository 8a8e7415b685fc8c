"""What only a GPU can show: captured kernels, copies around them, failing launches."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import CHOSEN, ProblemSpec, implementations, make_arrays, platform
from programs import custom_calls
from tiers import TIERS, force_tier
from tolerance import TOLERANCES, assert_results_close

import jax_na
from jax_na import _lowering, _tiling_sm90

pytestmark = pytest.mark.skipif(platform() != "cuda", reason="needs an NVIDIA GPU")

KERNELS = tuple(name for name in implementations() if name != "xla")
GRID, HEADS, CHANNELS = (12, 10), 4, 32


def _tokens(seed: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (2, *GRID, HEADS, CHANNELS)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]


def _assert_close(found: jax.Array, expected: jax.Array) -> None:
    error = jnp.sqrt(jnp.mean(jnp.square(found.astype(jnp.float32) - expected)))
    scale = jnp.sqrt(jnp.mean(jnp.square(expected)))
    assert error <= TOLERANCES["bfloat16"] * scale


def _step(implementation: str, deterministic: bool) -> Any:
    def loss(*arrays: jax.Array) -> jax.Array:
        out = jax_na.na2d(
            *arrays,
            5,
            implementation=implementation,
            deterministic_grads=deterministic,
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def _print_steps(implementation: str, deterministic: bool) -> None:
    """The steps of three batches, in arrays at three addresses, as hexadecimal bytes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        force_tier(monkeypatch, "at_once")
        step = (
            jax.jit(_step(implementation, deterministic)).lower(*_tokens(0)).compile()
        )
    batches = [_tokens(seed) for seed in range(3)]
    for _ in range(2):  # captured, and played again
        for batch in batches:
            for leaf in jax.tree.leaves(step(*batch)):
                print(np.asarray(leaf).tobytes().hex())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("implementation", KERNELS)
def test_captured_in_graphs(implementation: str, deterministic: bool) -> None:
    """Kernels played from CUDA graphs write the same bits as those launched one by one, or
    the same up to the order of sums."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    outputs = []
    for commands in ("", "FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"):
        environment = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XLA_FLAGS": flags + commands,
        }
        result = subprocess.run(
            [sys.executable, __file__, implementation, str(int(deterministic))],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    launched, captured = (output.split() for output in outputs)
    assert len(launched) == len(captured) == 24
    if deterministic:
        assert launched == captured
    for own, other in zip(map(_numbers, launched), map(_numbers, captured)):
        scale = np.sqrt(np.mean(np.square(own)))
        np.testing.assert_allclose(own, other, rtol=0, atol=0.03 * scale)


def _numbers(text: str) -> np.ndarray:
    """The loss in float32, or a gradient."""
    data = bytes.fromhex(text)
    dtype = np.float32 if len(data) == 4 else jnp.bfloat16
    return np.frombuffer(data, dtype).astype(np.float32)


# 'gemm' is several calls, with portable code between them.
@pytest.mark.parametrize("implementation", [n for n in KERNELS if n != "gemm"])
def test_no_copies_around_the_kernel(implementation: str) -> None:
    """Projections, attention and the way back, as a transformer block has them."""

    def block(tokens: jax.Array, qkv: jax.Array, back: jax.Array) -> jax.Array:
        heads = jnp.einsum("...c,csnd->s...nd", tokens, qkv)
        out = jax_na.na2d(*heads, 5, implementation=implementation)
        return jnp.einsum("...nd,ndc->...c", out, back)

    width = HEADS * CHANNELS
    shapes = ((2, *GRID, width), (width, 3, HEADS, CHANNELS), (HEADS, CHANNELS, width))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = jax.jit(block).lower(*arrays).compile().as_text()
    assert custom_calls(text)
    entry = text[text.index("ENTRY") :]
    moved = re.findall(r"= (\S+) (?:copy|transpose)\(", entry)
    tokens = 2 * GRID[0] * GRID[1] * width
    sizes = [np.prod([int(n) for n in re.findall(r"\d+", s)[1:]]) for s in moved]
    assert all(size < tokens for size in sizes), moved


HOPPER = getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _has_hopper_kernels(spec: ProblemSpec) -> bool:
    """Large tables of bias do not fit in their shared memory."""
    return not spec.bias or (
        math.prod(2 * size - 1 for size in spec.kernel_size)
        <= _tiling_sm90.LARGEST_BIAS
    )


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "spec", [spec for spec in CHOSEN if _has_hopper_kernels(spec)], ids=lambda s: s.name
)
def test_both_tiers(
    spec: ProblemSpec, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for Hopper and portable ones: both are right, and they are not the same."""
    arrays = make_arrays(spec, dtype)
    frame = None if spec.frame is None else jax_na.Frame(**spec.frame.arrays())
    oracle = arrays.oracle()
    expected = {name: oracle[name] for name in ("out", "lse")}
    results = {}
    for tier in TIERS:

        def attend(inputs: Any) -> Any:
            return jax_na.neighborhood_attention(
                **inputs,
                **spec.static_arguments(),
                frame=frame,
                return_lse=True,
                implementation="fused",
            )

        with monkeypatch.context() as patched:
            force_tier(patched, tier)
            lowered = jax.jit(attend).lower(arrays.inputs)
        assert ("sm90_forward" in lowered.as_text()) == (tier != "portable")
        out, lse = lowered.compile()(arrays.inputs)
        results[tier] = {"out": np.asarray(out), "lse": np.asarray(lse)}
        assert_results_close(results[tier], expected, dtype, f"{tier}, {spec}")
    if max(spec.grid) > 100:  # sums in different orders
        assert (results["hopper"]["lse"] != results["portable"]["lse"]).any()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_many_tiles_in_few_places(head_dim: int, has_bias: bool) -> None:
    """Kernels stay in a place of the grid while heads and samples change. One of these has
    queries that see nothing but minus infinity, of which the others must not know."""
    shape = (96, 14, 14, 16, head_dim)
    query, key, value, cotangent = (
        jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        for seed in range(4)
    )
    query = jnp.abs(query) + 0.5
    bias = jax.random.normal(jax.random.key(4), (16, 9, 9)) if has_bias else None

    def attend(*arrays: jax.Array, implementation: str) -> tuple[jax.Array, jax.Array]:
        result = jax_na.neighborhood_attention(
            *arrays,
            kernel_size=(5, 5),
            rel_pos_bias=bias,
            return_lse=True,
            implementation=implementation,
        )
        assert isinstance(result, tuple)
        return result

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradients(*arrays: jax.Array, implementation: str) -> Any:
        (out, _), vjp = jax.vjp(
            functools.partial(attend, implementation=implementation), *arrays
        )
        zeros = jnp.zeros(out.shape[:-1], jnp.float32)
        return vjp((cotangent.astype(out.dtype), zeros))

    def wide(*arrays: jax.Array) -> list[jax.Array]:
        return [array.astype(jnp.float32) for array in arrays]

    expected = gradients(*wide(query, key, value), implementation="naive")
    for found, right in zip(
        gradients(query, key, value, implementation="fused"), expected, strict=True
    ):
        _assert_close(found, right)

    sick = key.at[5, :, :, 3].set(-jnp.inf)
    out, lse = attend(query, sick, value, implementation="fused")
    assert not out[5, :, :, 3].any() and (lse[5, :, :, 3] == -jnp.inf).all()
    healthy = attend(*wide(query, key, value), implementation="naive")
    for found, right in zip((out, lse), healthy, strict=True):
        right = right.at[5, :, :, 3].set(0)
        _assert_close(found.at[5, :, :, 3].set(0), right)


def test_a_launch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises what CUDA says; the process and its device live on."""
    make_plan = _lowering.make_plan

    def too_large(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        assert plan is not None
        boxes = dataclasses.replace(plan.forward, row_tile=(12, 100))
        hopper = plan.hopper_forward
        if not isinstance(hopper, str):
            tiling = dataclasses.replace(hopper["forward"], row_box=(12, 100))
            hopper = {"forward": tiling}
        return dataclasses.replace(plan, forward=boxes, hopper_forward=hopper)

    arrays = _tokens(0)

    def attend() -> np.ndarray:
        """Lowered anew by every call."""
        function = jax.jit(lambda *a: jax_na.na2d(*a, 5, implementation="fused"))
        return np.asarray(function(*arrays))

    expected = attend()
    monkeypatch.setattr(_lowering, "make_plan", too_large)
    with pytest.raises(jax.errors.JaxRuntimeError, match="cudaErrorInvalidValue"):
        attend()
    monkeypatch.undo()
    np.testing.assert_array_equal(attend(), expected)


def test_a_bias_and_tiles_that_hang_over_the_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows outside of the grid read no bias: theirs lay beyond all shared memory."""
    make_plan = _lowering.make_plan

    def hanging(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        assert plan is not None
        hopper = plan.hopper_forward
        if not isinstance(hopper, str):
            boxes = {"row_box": (3, 21), "column_box": (32, 2)}
            hopper = {"forward": dataclasses.replace(hopper["forward"], **boxes)}
        return dataclasses.replace(plan, hopper_forward=hopper)

    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (
        jax.random.normal(k, (2, 31, 33, 2, 160), jnp.bfloat16) for k in keys[:3]
    )
    bias = jax.random.normal(keys[3], (2, 3, 61))

    def attend(implementation: str, dtype: Any) -> jax.Array:
        return jax_na.na2d(
            *(array.astype(dtype) for array in (query, key, value)),
            (2, 31),
            stride=(1, 25),
            dilation=(8, 1),
            rel_pos_bias=bias,
            implementation=implementation,
        )

    expected = attend("naive", jnp.float32)
    monkeypatch.setattr(_lowering, "make_plan", hanging)
    _assert_close(attend("fused", jnp.bfloat16), expected)


if __name__ == "__main__":
    _print_steps(sys.argv[1], bool(int(sys.argv[2])))
