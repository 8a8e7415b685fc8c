"""Programs that are exported, stored, and run again."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import implementations, platform
from programs import collectives, custom_calls

import jax_na
from jax_na import _ffi

pytest.importorskip("flatbuffers", reason="what JAX stores exported programs with")

BATCH, GRID, WINDOW = 8, (6, 5), (3, 3)
IMPLEMENTATIONS = tuple(dict.fromkeys((implementations()[0], "xla")))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
many_devices = pytest.mark.skipif(platform() != "cpu", reason="fakes CPUs")
native = pytest.mark.skipif(IMPLEMENTATIONS == ("xla",), reason="needs native kernels")

pytestmark = pytest.mark.usefixtures("quick_compile")

Arrays = tuple[jax.Array, ...]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    out, lse = jax_na.neighborhood_attention(
        query,
        key,
        value,
        WINDOW,
        dilation=(2, 1),
        rel_pos_bias=bias,
        return_lse=True,
        implementation=implementation,
    )
    return out * jnp.cos(lse)[..., None]


def _arrays(batch: int = BATCH) -> Arrays:
    shapes = (
        (batch, *GRID, 4, 8),
        (batch, *GRID, 2, 8),
        (batch, *GRID, 2, 16),
        (4, 5, 5),
    )
    return tuple(
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate(shapes)
    )


def _stored(function: Any, *arguments: Any, vjp_order: int = 0, **options: Any) -> Any:
    """The exported program after a round trip through bytes."""
    exported = export.export(
        function, disabled_checks=jax_na.export_safety_checks(), **options
    )(*arguments)
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


def _assert_close(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=0, atol=2e-5 * float(np.abs(b).max())
        )


@functools.partial(jax.jit, static_argnums=0)
def _gradients(function: Callable[..., jax.Array], arrays: Arrays) -> Arrays:
    return jax.grad(
        lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums=(0, 1, 2, 3)
    )(*arrays)


# ---- One device ----------------------------------------------------------------------


@each_implementation
def test_round_trip(implementation: str) -> None:
    """With its gradient."""
    function = jax.jit(functools.partial(_attend, implementation=implementation))
    arrays = _arrays()
    stored = _stored(function, *arrays, vjp_order=1)
    if implementation != "xla":
        assert custom_calls(stored.mlir_module())
    _assert_close(stored.call(*arrays), function(*arrays))
    _assert_close(_gradients(stored.call, arrays), _gradients(function, arrays))


@each_implementation
def test_symbolic_batch(implementation: str) -> None:
    """One program for every size of the batch."""
    function = jax.jit(functools.partial(_attend, implementation=implementation))
    (batch,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in _arrays()[:3]
    ]
    shapes.append(jax.ShapeDtypeStruct(_arrays()[3].shape, jnp.float32))
    stored = _stored(function, *shapes, vjp_order=1)
    if implementation != "xla":
        assert custom_calls(stored.mlir_module())
    for size in (1, 3, 8):
        arrays = _arrays(size)
        _assert_close(stored.call(*arrays), function(*arrays))
        _assert_close(_gradients(stored.call, arrays), _gradients(function, arrays))


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("implementation", ["fused", "gemm", "naive"])
def test_symbolic_batch_for_another_platform(implementation: str) -> None:
    """Plans and workspaces of its kernels know no batch size."""
    function = jax.jit(functools.partial(_attend, implementation=implementation))
    (batch,) = export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in _arrays()[:3]
    ]
    shapes.append(jax.ShapeDtypeStruct(_arrays()[3].shape, jnp.float32))
    gradients = functools.partial(_gradients, function)
    stored = _stored(jax.jit(lambda *a: gradients(a)), *shapes, platforms=("cuda",))
    calls = custom_calls(stored.mlir_module())
    assert calls and all(name.endswith(implementation) for name in calls)


def test_two_symbolic_batch_axes() -> None:
    function = jax.jit(jax.vmap(_attend, in_axes=(0, 0, 0, None)))
    batch = export.symbolic_shape("a, b")
    shapes = [
        jax.ShapeDtypeStruct((*batch, *a.shape[1:]), a.dtype) for a in _arrays()[:3]
    ]
    shapes.append(jax.ShapeDtypeStruct(_arrays()[3].shape, jnp.float32))
    stored = _stored(function, *shapes)
    arrays = [a.reshape(2, 4, *a.shape[1:]) for a in _arrays()[:3]]
    arrays.append(_arrays()[3])
    _assert_close(stored.call(*arrays), function(*arrays))


@native
def test_without_the_safety_checks() -> None:
    """JAX's own error: a custom call is unknown to it."""
    with pytest.raises(ValueError, match="custom calls whose targets"):
        export.export(jax.jit(_attend))(*_arrays())


def test_safety_checks_name_every_kernel() -> None:
    """Those of other installations too: programs are exported for other machines."""
    checks = jax_na.export_safety_checks()
    targets = {"jax_na_forward_fused", "jax_na_backward_naive", "jax_na_scatter_gemm"}
    for target in targets.union(*_ffi.TARGETS.values()):
        assert export.DisabledSafetyCheck.custom_call(target) in checks, target


def test_in_another_process(tmp_path: Path) -> None:
    """The custom calls are found again by name once jax_na is imported."""
    arrays = _arrays(2)
    function = jax.jit(_attend)
    path = tmp_path / "program"
    exported = export.export(function, disabled_checks=jax_na.export_safety_checks())
    path.write_bytes(exported(*arrays).serialize())
    np.savez(tmp_path / "arrays.npz", *arrays)
    program = f"""
        import numpy as np, jax, jax_na
        arrays = np.load({str(tmp_path / "arrays.npz")!r})
        stored = jax.export.deserialize(
            bytearray(open({str(path)!r}, "rb").read())
        )
        np.save({str(tmp_path / "out.npy")!r}, stored.call(*arrays.values()))
    """
    root = str(Path(jax_na.__file__).parents[1])
    command = f"import sys; sys.path.insert(0, {root!r})\n" + textwrap.dedent(program)
    result = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    _assert_close(np.load(tmp_path / "out.npy"), function(*arrays))


# ---- Several platforms ---------------------------------------------------------------


@pytest.mark.parametrize(
    "platforms", [("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cuda", "rocm", "tpu")]
)
def test_several_platforms(platforms: tuple[str, ...]) -> None:
    """One program that holds native kernels where there are any, for each platform."""
    function, arrays = jax.jit(_attend), _arrays()
    stored = _stored(function, *arrays, vjp_order=1, platforms=platforms)
    assert stored.platforms == platforms
    _assert_close(stored.call(*arrays), function(*arrays))
    _assert_close(_gradients(stored.call, arrays), _gradients(function, arrays))


# ---- Several devices -----------------------------------------------------------------


@many_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_manual(check_vma: bool) -> None:
    """A program of eight devices, each with its own piece."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tokens, bias = P("data", None, None, "model"), P("model")
    function = jax.jit(
        jax.shard_map(
            _attend,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, bias),
            out_specs=tokens,
            check_vma=check_vma,
        )
    )
    arrays = tuple(
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(_arrays(), (tokens, tokens, tokens, bias))
    )
    stored = _stored(function, *arrays, vjp_order=1)
    assert stored.nr_devices == 8
    _assert_close(jax.jit(stored.call)(*arrays), jax.jit(_attend)(*_arrays()))
    _assert_close(_gradients(stored.call, arrays), _gradients(_attend, _arrays()))


@many_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_automatic(axis_type: AxisType) -> None:
    """A program that XLA splits; it still needs no collective after the round trip."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    tokens, bias = P("data", None, None, "model"), P("model")
    with jax.set_mesh(mesh):
        arrays = tuple(
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip(_arrays(), (tokens, tokens, tokens, bias))
        )
        stored = _stored(jax.jit(_attend), *arrays, vjp_order=1)
        compiled = jax.jit(stored.call).lower(*arrays).compile()
        assert collectives(compiled.as_text()) == {}
        out = compiled(*arrays)
        gradients = _gradients(stored.call, arrays)
    _assert_close(out, jax.jit(_attend)(*_arrays()))
    _assert_close(gradients, _gradients(_attend, _arrays()))


@many_devices
def test_program_of_one_device_on_many() -> None:
    """It has no sharding rules: XLA gathers what it needs."""
    function, whole = jax.jit(_attend), _arrays()
    stored = _stored(function, *whole)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P("data"), P("data"), P())
    arrays = tuple(
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(whole, specs)
    )
    _assert_close(jax.jit(stored.call)(*arrays), function(*whole))
