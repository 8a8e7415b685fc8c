"""What a call becomes on each platform, and calls side by side."""

from __future__ import annotations

import concurrent.futures
import functools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import implementations, platform
from programs import attributes, custom_calls, functions_called
from tiers import force_tier

import jax_na
from jax_na import _ffi, _lowering

WINDOW: dict[str, Any] = {
    "kernel_size": (3, 2),
    "stride": (2, 1),
    "dilation": (1, 3),
    "is_causal": (False, True),
}
KERNELS = {
    "cpu": ("fused", "naive"),
    "cuda": ("fused", "gemm", "naive"),
}
native = pytest.mark.skipif(
    implementations() == ("xla",), reason="needs native kernels"
)


def _shapes(dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    tokens = jax.ShapeDtypeStruct((2, 6, 7, 4, 8), dtype)
    keys = jax.ShapeDtypeStruct((2, 6, 7, 2, 8), dtype)
    return tokens, keys, keys


def _attend(implementation: str | None = None, **options: Any) -> Callable[..., Any]:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax_na.neighborhood_attention(
            query,
            key,
            value,
            **{**WINDOW, **options},
            implementation=implementation,
        )

    return attend


def _gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), (0, 1, 2))


def _lowered(function: Any, target: str, *arguments: Any) -> str:
    """StableHLO for a platform that this machine need not have."""
    traced = jax.jit(function).trace(*(arguments or _shapes()))
    return traced.lower(lowering_platforms=(target,)).as_text()


@pytest.fixture
def no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a wheel without CUDA kernels that has not warned yet."""
    monkeypatch.delitem(_ffi.TARGETS, "cuda", raising=False)
    _lowering._warn_of_missing_kernels.cache_clear()
    yield
    _lowering._warn_of_missing_kernels.cache_clear()


# ---- Kernels by platform -------------------------------------------------------------


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("target", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("implementation", [None, "fused", "gemm", "naive", "xla"])
def test_kernels_by_platform(target: str, implementation: str | None) -> None:
    """The best, the named one, portable code, or an error that says what can run."""
    gradient = _gradient(_attend(implementation))
    kernels = KERNELS.get(target, ())
    if implementation not in (None, "xla", *kernels):
        with pytest.raises(NotImplementedError) as error:
            _lowered(gradient, target)
        text = str(error.value)
        assert f"implementation={implementation!r}" in text and repr(target) in text
        for able in (*kernels, "xla"):
            assert repr(able) in text.split("these can:")[1]
        return
    calls = custom_calls(_lowered(gradient, target))
    if implementation == "xla" or not kernels:
        assert not calls
    else:
        name = implementation or kernels[0]
        if name == "gemm":  # composed of its products
            assert {"jax_na_pair_gemm", "jax_na_gather_gemm"} < set(calls)
            assert all(target.endswith("_gemm") for target in calls)
        else:
            assert calls == {f"jax_na_forward_{name}": 1, f"jax_na_backward_{name}": 1}


@pytest.mark.usefixtures("every_kernel")
def test_kernels_by_dtype() -> None:
    """Those with tensor cores take no float64; the best of the others is taken."""
    with jax.enable_x64(True):
        shapes = _shapes(jnp.float64)
        text = _lowered(_attend(), "cuda", *shapes)
        assert custom_calls(text) == {"jax_na_forward_naive": 1}
        text = _lowered(_attend(), "cpu", *shapes)
        assert custom_calls(text) == {"jax_na_forward_fused": 1}
        with pytest.raises(NotImplementedError, match="float64"):
            _lowered(_attend("fused"), "cuda", *shapes)


def test_what_was_built_for_cuda() -> None:
    """Cross-lowering with the kernels that this installation really holds."""
    text = _lowered(_gradient(_attend("naive")), "cpu")
    assert functions_called(text) == {"forward": 1, "backward": 1}
    if "cuda" not in _ffi.TARGETS:
        pytest.skip("built without CUDA kernels")
    for name in jax_na.explain(*_shapes(), (3, 3), platform="cuda").refusals:
        with pytest.raises(NotImplementedError):
            _lowered(_attend(name), "cuda")
    calls = set(custom_calls(_lowered(_gradient(_attend()), "cuda")))
    assert calls and calls <= _ffi.TARGETS["cuda"]


@pytest.mark.usefixtures("no_cuda_kernels")
def test_warning_without_cuda_kernels() -> None:
    """Once, where the portable code was not asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _lowered(_attend("xla"), "cuda")
        _lowered(_attend(), "tpu")
        _lowered(_attend(), "rocm")
    with pytest.warns(UserWarning, match="without CUDA kernels") as found:
        assert not custom_calls(_lowered(_gradient(_attend()), "cuda"))
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _lowered(_attend(), "cuda")


@pytest.mark.usefixtures("no_cuda_kernels")
def test_naming_a_kernel_that_was_not_built() -> None:
    for implementation in KERNELS["cuda"]:
        with pytest.raises(NotImplementedError, match="installed without its native"):
            _lowered(_attend(implementation), "cuda")


# ---- Attributes ----------------------------------------------------------------------


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_attributes(target: str) -> None:
    """They are a stable interface: stored programs hold them."""
    shared = {
        "kernel_size": [3, 2],
        "stride": [2, 1],
        "dilation": [1, 3],
        "is_causal": [0, 1],
        "scale": 0.25,
        "has_bias": False,
        "has_additional": False,
        "has_frame": False,
        "heads_leading": False,
    }
    function = _gradient(_attend("naive", scale=0.25, deterministic_grads=True))
    text = _lowered(function, target)
    forward = attributes(text, "jax_na_forward_naive")
    backward = attributes(text, "jax_na_backward_naive")
    assert {name: forward[name] for name in shared} == shared
    assert {name: backward[name] for name in shared} == shared
    assert backward["wrt"] == [1, 1, 1, 0, 0, 0]
    assert backward["deterministic"] is True
    assert {"wrt", "deterministic"}.isdisjoint(forward)


@pytest.mark.usefixtures("every_kernel")
def test_attributes_of_optional_operands() -> None:
    def attend(arrays: dict[str, jax.Array]) -> Any:
        frame = jax_na.Frame(arrays.pop("length"))
        return jax_na.neighborhood_attention(**arrays, **WINDOW, frame=frame)

    shapes = {
        **dict(zip(("query", "key", "value"), _shapes())),
        "rel_pos_bias": jax.ShapeDtypeStruct((4, 5, 3), jnp.float32),
        "additional_keys": jax.ShapeDtypeStruct((2, 5, 2, 8), jnp.float32),
        "additional_values": jax.ShapeDtypeStruct((2, 5, 2, 8), jnp.float32),
        "length": jax.ShapeDtypeStruct((2, 2), jnp.int32),
    }
    found = attributes(_lowered(attend, "cuda", shapes), "jax_na_forward_fused")
    assert found["has_bias"] and found["has_additional"] and found["has_frame"]


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize(
    ("tier", "deterministic", "gradients"),
    [
        ("hopper", False, {"dquery", "dkey_dvalue"}),
        ("at_once", False, {"gradients"}),
        ("at_once", True, {"dquery", "dkey_dvalue"}),
    ],
)
def test_attributes_for_hopper(
    monkeypatch: pytest.MonkeyPatch, tier: str, deterministic: bool, gradients: set[str]
) -> None:
    """A plan for Hopper GPUs beside that for any, where they have kernels for the call."""
    force_tier(monkeypatch, tier)
    gradient = _gradient(_attend("fused", deterministic_grads=deterministic))
    text = _lowered(gradient, "cuda", *_shapes(jnp.bfloat16))
    for function, portable, launches in (
        ("forward", {"query_tile", "key_box"}, {"forward"}),
        ("backward", {"query_box", "key_tile"}, gradients),
    ):
        found = attributes(text, f"jax_na_{function}_fused")
        assert portable <= set(found)
        planned = {
            name.removeprefix("sm90_").removesuffix("_kernel")
            for name in found
            if name.startswith("sm90_") and name.endswith("_kernel")
        }
        assert planned == launches
        for launch in launches:
            columns, groups = found[f"sm90_{launch}_kernel"]
            assert columns % 16 == 0 and groups in (1, 2, 3)
            for box, limit in (("row_box", 64), ("column_box", columns)):
                extents = found[f"sm90_{launch}_{box}"]
                assert len(extents) == 2 and np.prod(extents) <= limit
    for other, dtype in (
        (gradient, jnp.float32),
        (_gradient(_attend("naive")), "float16"),
    ):
        text = _lowered(other, "cuda", *_shapes(dtype))
        assert custom_calls(text) and "sm90" not in text


@native
@pytest.mark.parametrize(
    ("flags", "argument", "expected"),
    [
        ("", None, False),
        ("--xla_gpu_deterministic_ops=true", None, True),
        ("--xla_foo=1 --xla_gpu_deterministic_ops", None, True),
        ("--xla_gpu_exclude_nondeterministic_ops=1", None, True),
        ("--xla_gpu_deterministic_ops=false", None, False),
        ("--xla_gpu_deterministic_ops=true", False, False),
        ("", True, True),
    ],
)
def test_determinism(
    monkeypatch: pytest.MonkeyPatch, flags: str, argument: Any, expected: bool
) -> None:
    """The argument, or else XLA's flags of the moment."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    function = _gradient(_attend("naive", deterministic_grads=argument))
    found = attributes(_lowered(function, platform()), "jax_na_backward_naive")
    assert found["deterministic"] is expected


# ---- Memory --------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_memory_of_portable_code(function: str) -> None:
    """XLA's own count of temporary memory: not the square of the tokens."""
    tokens = jax.ShapeDtypeStruct((1, 256, 256, 4, 32), jnp.float32)

    def attend(*arrays: jax.Array) -> jax.Array:
        return jax_na.na2d(*arrays, 7, implementation="xla")

    def vjp(dout: jax.Array, *arrays: jax.Array) -> Any:
        return jax.vjp(attend, *arrays)[1](dout)

    if function == "forward":
        lowered = jax.jit(attend).lower(tokens, tokens, tokens)
    else:
        lowered = jax.jit(vjp).lower(tokens, tokens, tokens, tokens)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 256 << 20


# ---- Side by side --------------------------------------------------------------------


def _arrays(seed: int, length: int = 64) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (2, length, 2, 16)) for key in keys)


@native
def test_many_calls_in_one_program_on_two_threads() -> None:
    """Calls that wait for each other's tasks on a small thread pool would hang."""
    program = """
        import os
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
        import jax, jax.numpy as jnp, numpy as np, jax_na

        def calls(arrays, implementation):
            return [
                jax.vjp(
                    lambda *a: jax_na.na1d(*a, 7, implementation=implementation), *a
                )[1](jnp.sin(a[0]))
                for a in arrays
            ]

        keys = jax.random.split(jax.random.key(0), (16, 3))
        arrays = [
            [jax.random.normal(k, (4, 256, 4, 32)) for k in row] for row in keys
        ]
        expected = jax.jit(lambda arrays: calls(arrays, "xla"))(arrays)
        for implementation in {implementations!r}:
            run = jax.jit(lambda arrays: calls(arrays, implementation))
            for _ in range(10):
                results = run(arrays)
            for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected)):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    """
    kernels = tuple(name for name in implementations() if name != "xla")
    root = str(Path(jax_na.__file__).parents[1])
    command = f"import sys; sys.path.insert(0, {root!r})\n" + textwrap.dedent(
        program
    ).replace("{implementations!r}", repr(kernels))
    result = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("implementation", implementations())
def test_calls_from_several_python_threads(implementation: str) -> None:
    """They share compiled programs and the thread pool, and compile side by side."""

    def attend(*arrays: jax.Array) -> Any:
        return jax_na.na1d(*arrays, 7, implementation=implementation)

    gradient = jax.jit(_gradient(attend))

    def work(seed: int) -> tuple[Any, ...]:
        arrays = _arrays(seed, length=32 + seed % 3)
        return tuple(np.asarray(g) for g in gradient(*arrays))

    seeds = list(range(24))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, seeds, timeout=300))
    for seed, result in zip(seeds, results):
        for a, b in zip(result, work(seed)):
            np.testing.assert_array_equal(a, b)


def test_calls_of_many_devices_at_once() -> None:
    """One program on eight fake devices, whose calls run at the same time."""
    if platform() != "cpu":
        pytest.skip("fakes CPUs")
    samples = [_arrays(seed) for seed in range(8)]
    arrays = [jnp.concatenate(parts) for parts in zip(*samples)]
    function = _gradient(functools.partial(jax_na.na1d, kernel_size=7))
    expected = jax.jit(function)(*arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(function, in_shardings=spec)
    for _ in range(5):
        for a, b in zip(sharded(*arrays), expected):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
