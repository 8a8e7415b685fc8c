"""Sharded calls: right whatever is sharded, and silent where nothing need be said.

Eight fake CPU devices; the compiled programs are searched for collectives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import implementations, platform
from programs import collectives, custom_call_shapes

import jax_na

if platform() != "cpu":
    pytest.skip("needs many devices, and fakes CPUs", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("quick_compile")

Arrays = dict[str, jax.Array]
Attend = Callable[[Arrays], tuple[jax.Array, jax.Array]]

BATCH, GRID, HEADS, KEY_HEADS = 8, (8, 4), 4, 2
WINDOW = {"kernel_size": (3, 3), "stride": (2, 1), "is_causal": (False, True)}
SHAPES = {
    "query": (BATCH, *GRID, HEADS, 8),
    "key": (BATCH, *GRID, KEY_HEADS, 8),
    "value": (BATCH, *GRID, KEY_HEADS, 16),
    "rel_pos_bias": (HEADS, 5, 5),
    "additional_keys": (BATCH, 3, KEY_HEADS, 8),
    "additional_values": (BATCH, 3, KEY_HEADS, 16),
}
TOKENS = ("query", "key", "value")

IMPLEMENTATIONS = tuple(dict.fromkeys((implementations()[0], "xla")))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_mesh = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def _mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def _arrays(names: tuple[str, ...] = tuple(SHAPES), **shapes: Any) -> Arrays:
    return {
        name: jax.random.normal(jax.random.key(seed), ({**SHAPES, **shapes})[name])
        for seed, name in enumerate(names)
    }


def _attend(implementation: str | None = None, **window: Any) -> Attend:
    def attend(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        return jax_na.neighborhood_attention(
            **arrays,
            **{**WINDOW, **window},
            precision="highest",
            return_lse=True,
            implementation=implementation,
        )

    return attend


def _dense(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    return dense_attention(**arrays, **WINDOW)


def _with_gradients(attend: Attend, arrays: Arrays) -> Any:
    """Outputs and gradients, without a sum over tokens that would communicate."""
    outputs, vjp = jax.vjp(attend, arrays)
    return outputs, vjp(jax.tree.map(jnp.cos, outputs))[0]


def _derivatives(attend: Attend, arrays: Arrays) -> Any:
    """Forward mode, and second order."""
    tangents = jax.tree.map(jnp.sin, arrays)
    first = jax.jvp(attend, (arrays,), (tangents,))
    gradients = functools.partial(_with_gradients, attend)
    return first, jax.jvp(gradients, (arrays,), (tangents,))


def _per_example(attend: Attend, arrays: Arrays) -> Any:
    """One bias for all examples, and a gradient of it for each."""
    axes = {name: None if name == "rel_pos_bias" else 0 for name in arrays}
    return jax.vmap(functools.partial(_with_gradients, attend), in_axes=(axes,))(arrays)


def _loss(attend: Attend, arrays: Arrays) -> jax.Array:
    out, lse = attend(arrays)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(lse))


def _gradient(attend: Attend, arrays: Arrays) -> Arrays:
    return jax.grad(functools.partial(_loss, attend))(arrays)


def _reverse_over_reverse(attend: Attend, arrays: Arrays) -> Arrays:
    def slope(arrays: Arrays) -> jax.Array:
        gradients = _gradient(attend, arrays)
        return sum(jnp.sum(jnp.sin(gradients[name])) for name in arrays)

    return jax.grad(slope)(arrays)


@functools.partial(jax.jit, static_argnums=0)
def _on_one_device(function: Any, *arguments: Any) -> Any:
    """``function(_dense, *arguments)``; compiled once for many tests."""
    return function(_dense, *arguments)


def _assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)
    ):
        name, b = jax.tree_util.keystr(path), np.asarray(b)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        size = max(1e-2, float(np.max(np.abs(b))))
        np.testing.assert_allclose(
            np.asarray(a), b, rtol=0, atol=tolerance * size, err_msg=name
        )


def _specs(
    batch: Any = None, grid: Any = None, heads: Any = None, channels: Any = None
) -> dict[str, P]:
    """The same axes of every operand sharded."""
    tokens = P(batch, grid, None, heads, channels)
    extra = P(batch, None, heads, channels)
    return {
        **dict.fromkeys(TOKENS, tokens),
        "rel_pos_bias": P(heads),
        "additional_keys": extra,
        "additional_values": extra,
    }


def _place(arrays: Arrays, mesh: Any, specs: dict[str, P]) -> Arrays:
    return {
        name: jax.device_put(array, NamedSharding(mesh, specs[name]))
        for name, array in arrays.items()
    }


def _in_mesh(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def _run(function: Any, mesh: Any, *arguments: Any) -> tuple[Any, str]:
    """Results, and the compiled program."""
    with _in_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled(*arguments), compiled.as_text()


# ---- No collective -------------------------------------------------------------------

# The second: what a device's own call is divided by, in batch and key heads.
SILENT = {
    "batch": (_specs(batch="data"), (4, 1)),
    "heads": (_specs(heads="model"), (1, 2)),
    "batch and heads": (_specs(batch="data", heads="model"), (4, 2)),
    "batch over two axes": (_specs(batch=("data", "model")), (8, 1)),
}


@each_mesh
@pytest.mark.parametrize(
    ("sharded", "implementation"),
    [*((name, IMPLEMENTATIONS[0]) for name in SILENT), ("batch and heads", "xla")],
)
def test_no_collective(sharded: str, implementation: str, axis_type: AxisType) -> None:
    """Forward and gradient; a table for all samples is for the tests below."""
    specs, (batch_shards, head_shards) = SILENT[sharded]
    names = tuple(SHAPES) if batch_shards == 1 else (*TOKENS, *list(SHAPES)[4:])
    arrays, mesh = _arrays(names), _mesh(axis_type)
    function = functools.partial(_with_gradients, _attend(implementation))
    results, text = _run(function, mesh, _place(arrays, mesh, specs))
    assert collectives(text) == {}
    _assert_close(results, _on_one_device(_with_gradients, arrays))
    (out, lse), gradients = results
    local = (BATCH // batch_shards, *GRID, HEADS // head_shards)
    assert {shard.data.shape[:-1] for shard in out.addressable_shards} == {local}
    assert {shard.data.shape for shard in lse.addressable_shards} == {local}
    for name, gradient in gradients.items():
        spec = NamedSharding(mesh, specs[name])
        assert gradient.sharding.is_equivalent_to(spec, gradient.ndim), name
    if implementation != "xla":
        shape = (BATCH // batch_shards, KEY_HEADS // head_shards, HEADS // KEY_HEADS)
        called = custom_call_shapes(text)
        assert {name: len(shapes) for name, shapes in called.items()} == {
            "forward": 1,
            "backward": 1,
        }
        assert called["forward"][0][:3] == called["backward"][0][:3] == shape


@each_mesh
@each_implementation
def test_derivatives_need_no_collective(
    implementation: str, axis_type: AxisType
) -> None:
    arrays, mesh = _arrays((*TOKENS, *list(SHAPES)[4:])), _mesh(axis_type)
    results, text = _run(
        functools.partial(_derivatives, _attend(implementation)),
        mesh,
        _place(arrays, mesh, _specs(batch="data", heads="model")),
    )
    assert collectives(text) == {}
    _assert_close(results, _on_one_device(_derivatives, arrays))


@each_mesh
def test_reverse_over_reverse(axis_type: AxisType) -> None:
    arrays, mesh = _arrays(), _mesh(axis_type)
    results, _ = _run(
        functools.partial(_reverse_over_reverse, _attend()),
        mesh,
        _place(arrays, mesh, _specs(batch="data", heads="model")),
    )
    _assert_close(results, _on_one_device(_reverse_over_reverse, arrays), 1e-4)


@each_mesh
def test_no_collective_for_one_frame_per_sample(axis_type: AxisType) -> None:
    arrays, mesh = _arrays(TOKENS), _mesh(axis_type)
    length = jax.random.randint(jax.random.key(9), (BATCH, 2), 0, 9)
    origin = jax.random.randint(jax.random.key(8), (BATCH, 2), -2, 3)

    def evaluate(attend: Attend, arrays: Arrays, length: Any, origin: Any) -> Any:
        frame = jax_na.Frame(length, origin, origin)

        def framed(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
            out, lse = attend({**arrays, "frame": frame})
            return out, jnp.where(jnp.isfinite(lse), lse, 0)

        return _with_gradients(framed, arrays)

    specs = _specs(batch="data", heads="model")
    by_sample = NamedSharding(mesh, P("data"))
    results, text = _run(
        functools.partial(evaluate, _attend()),
        mesh,
        _place(arrays, mesh, specs),
        jax.device_put(length, by_sample),
        jax.device_put(origin, by_sample),
    )
    assert collectives(text) == {}
    _assert_close(results, _on_one_device(evaluate, arrays, length, origin))


# ---- vmap ----------------------------------------------------------------------------


@each_mesh
@pytest.mark.parametrize("axes", [("data", "model"), (None, "data"), ("data", None)])
def test_vmap(axes: tuple[Any, Any], axis_type: AxisType) -> None:
    """Over a sharded axis, over an axis in front of a sharded one, and both."""
    mapped_axis, batch_axis = axes
    mesh = _mesh(axis_type)
    names = (*TOKENS, *list(SHAPES)[4:])
    arrays = _arrays(names, **{name: (4, *SHAPES[name]) for name in names})
    inner = _specs(batch=batch_axis)
    specs = {name: P(mapped_axis, *inner[name]) for name in names}
    results, text = _run(
        functools.partial(_per_example, _attend()), mesh, _place(arrays, mesh, specs)
    )
    assert collectives(text) == {}
    _assert_close(results, _on_one_device(_per_example, arrays))


@each_mesh
@each_implementation
def test_vmap_keeps_an_unmapped_bias_per_example(
    implementation: str, axis_type: AxisType
) -> None:
    """One table for all examples, one gradient for each, on the example's device."""
    mesh = _mesh(axis_type)
    arrays = _arrays((*TOKENS, "rel_pos_bias"))
    results, text = _run(
        functools.partial(_per_example, _attend(implementation)),
        mesh,
        _place(arrays, mesh, _specs(batch="data")),
    )
    assert collectives(text) == {}
    assert results[1]["rel_pos_bias"].shape == (BATCH, *SHAPES["rel_pos_bias"])
    _assert_close(results, _on_one_device(_per_example, arrays))


def test_vmap_with_spmd_axis_name() -> None:
    mesh = _mesh()
    arrays = _arrays(TOKENS)

    def evaluate(arrays: Arrays) -> Any:
        one = functools.partial(_with_gradients, _attend())
        return jax.vmap(one, spmd_axis_name="data")(arrays)

    placed = _place(arrays, mesh, _specs(batch="data", heads="model"))
    with jax.set_mesh(mesh):
        results, text = _run(evaluate, mesh, placed)
    assert collectives(text) == {}
    _assert_close(results, _on_one_device(_per_example, arrays))


# ---- A bias for all samples ----------------------------------------------------------


@each_implementation
@each_mesh
@pytest.mark.parametrize("heads", [None, "model"])
def test_bias_of_a_sharded_batch(
    heads: str | None, axis_type: AxisType, implementation: str
) -> None:
    """Its gradient is the sum of what the shards find: one sum over them, no more."""
    arrays, mesh = _arrays(), _mesh(axis_type)
    placed = _place(arrays, mesh, _specs(batch="data", heads=heads))
    results, text = _run(
        functools.partial(_with_gradients, _attend(implementation)), mesh, placed
    )
    assert collectives(text) == {"all-reduce": 1}
    _assert_close(results, _on_one_device(_with_gradients, arrays))


# ---- Whatever is sharded -------------------------------------------------------------

WHOLE = dict.fromkeys(SHAPES, P())
GATHERED = {
    "grid": _specs(grid="data"),
    "channels": _specs(channels="model"),
    "grid and heads": _specs(grid="data", heads="model"),
    "batch and channels": _specs(batch="data", channels="model"),
    "query's batch alone": {**WHOLE, "query": P("data")},
    "query's grid alone": {**WHOLE, "query": P(None, "data")},
    "keys alone": {**WHOLE, "key": P("data"), "value": P(None, None, "model")},
    "bias alone": {**WHOLE, "rel_pos_bias": P(None, None, None)},
    "bias's heads alone": {**WHOLE, "rel_pos_bias": P("data")},
    "additional keys alone": {
        **WHOLE,
        "additional_keys": P(("data", "model")),
        "additional_values": P(None, None, "model"),
    },
    # Two key heads on four devices: local head numbers are not the key heads' own.
    "heads finer than key heads": {
        **WHOLE,
        "query": P(None, None, None, "data"),
        "rel_pos_bias": P("data"),
    },
    "heads finer than key heads, batch": {
        **_specs(batch="model"),
        "query": P("model", None, None, "data"),
        "rel_pos_bias": P("data"),
    },
    "heads and key heads unlike": {
        **WHOLE,
        "query": P(None, None, None, "data"),
        "key": P(None, None, None, "model"),
        "value": P(None, None, "data", "model"),
    },
    "all unlike": {
        "query": P("data", None, None, "model"),
        "key": P("model", "data"),
        "value": P(None, None, "data", None, "model"),
        "rel_pos_bias": P("model"),
        "additional_keys": P("data", None, None, "model"),
        "additional_values": P(("model", "data")),
    },
}


# These on every kind of mesh and implementation, the others on the usual one.
EVERYWHERE = {"grid", "channels", "heads finer than key heads, batch", "all unlike"}


@pytest.mark.parametrize(
    ("sharded", "axis_type", "implementation"),
    [
        (name, axis_type, implementation)
        for name in GATHERED
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for implementation in IMPLEMENTATIONS
        if name in EVERYWHERE
        or (axis_type, implementation) == (AxisType.Auto, IMPLEMENTATIONS[0])
    ],
)
def test_any_sharding(sharded: str, axis_type: AxisType, implementation: str) -> None:
    arrays, mesh = _arrays(), _mesh(axis_type)
    placed = _place(arrays, mesh, GATHERED[sharded])
    function = functools.partial(_with_gradients, _attend(implementation))
    results, _ = _run(function, mesh, placed)
    _assert_close(results, _on_one_device(_with_gradients, arrays))


@each_implementation
def test_sizes_that_do_not_divide(implementation: str) -> None:
    """XLA pads the last shard; what is in the padding must not matter."""
    names = (*TOKENS, "rel_pos_bias")
    arrays = _arrays(names, **{name: (6, *SHAPES[name][1:]) for name in TOKENS})
    mesh = _mesh()
    length = jnp.asarray([[3, 4], [8, 2], [5, 5], [8, 4], [9, 9], [0, 3]])

    def framed(attend: Attend, arrays: Arrays) -> Any:
        def call(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
            out, lse = attend({**arrays, "frame": jax_na.Frame(length)})
            return out, jnp.where(jnp.isfinite(lse), lse, 0)

        return _with_gradients(call, arrays)

    def sharded(arrays: Arrays) -> Any:
        def split(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
            split = NamedSharding(mesh, P("data"))
            tokens = {
                name: jax.lax.with_sharding_constraint(arrays[name], split)
                for name in TOKENS
            }
            return _attend(implementation)({**arrays, **tokens})

        return framed(split, arrays)

    results, text = _run(sharded, mesh, arrays)
    if implementation != "xla":
        assert custom_call_shapes(text)["forward"][0][0] == 2
    _assert_close(results, _on_one_device(framed, arrays))


@each_mesh
def test_eager(axis_type: AxisType) -> None:
    arrays, mesh = _arrays(), _mesh(axis_type)
    placed = _place(arrays, mesh, _specs(batch="data", heads="model"))
    with _in_mesh(mesh):
        out, _ = _attend()(placed)
    _assert_close(out, _on_one_device(_with_gradients, arrays)[0][0])
    assert out.addressable_shards[0].data.shape[0] == BATCH // 4


def test_many_batch_axes() -> None:
    """More axes than Shardy has letters for its factors."""
    grown = (2, 1, 2, 1, 2, 1, 4, 3, 3)
    arrays = _arrays(TOKENS, **{name: (*grown, *SHAPES[name][-2:]) for name in TOKENS})
    mesh = _mesh()
    specs = dict.fromkeys(TOKENS, P("model", None, None, None, None, None, "data"))
    results, text = _run(
        functools.partial(_with_gradients, _attend()), mesh, _place(arrays, mesh, specs)
    )
    assert collectives(text) == {}
    _assert_close(results, _on_one_device(_with_gradients, arrays))


# ---- shard_map -----------------------------------------------------------------------

# Portable code inside goes by JAX's own rules.
each_check = pytest.mark.parametrize(
    ("check_vma", "implementation"),
    dict.fromkeys(
        [(True, IMPLEMENTATIONS[0]), (False, IMPLEMENTATIONS[0]), (True, "xla")]
    ),
)


def _manual(
    attend: Attend, mesh: Any, specs: dict[str, P], names: Any, **options: Any
) -> Attend:
    """Every device calls attention on its own piece."""
    out = P(*specs["query"][:4])
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=({name: specs[name] for name in names},),
        out_specs=(out, out),
        **options,
    )


@each_check
@pytest.mark.parametrize("sharded", SILENT)
def test_manual(sharded: str, check_vma: bool, implementation: str) -> None:
    """With a bias, which is replicated where the batch alone is sharded."""
    specs, (batch_shards, _) = SILENT[sharded]
    arrays, mesh = _arrays(), _mesh()
    function = _manual(
        _attend(implementation), mesh, specs, arrays, check_vma=check_vma
    )
    results, text = _run(functools.partial(_with_gradients, function), mesh, arrays)
    if check_vma:  # without, JAX sums gradients over all devices that share an operand
        assert set(collectives(text)) == ({"all-reduce"} if batch_shards > 1 else set())
    _assert_close(results, _on_one_device(_with_gradients, arrays))


@each_check
def test_manual_with_replicated_keys(check_vma: bool, implementation: str) -> None:
    """Each device holds some rows of queries and all keys, whose gradients are sums."""
    arrays, mesh = _arrays(), _mesh()
    rows = GRID[0] // 4

    def piece(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        first = jnp.stack([rows * jax.lax.axis_index("data"), 0])
        frame = jax_na.Frame(GRID, first)
        return _attend(implementation)({**arrays, "frame": frame})

    specs = {**WHOLE, "query": P(None, "data")}
    function = _manual(piece, mesh, specs, arrays, check_vma=check_vma)
    _assert_close(
        jax.jit(functools.partial(_with_gradients, function))(arrays),
        _on_one_device(_with_gradients, arrays),
    )


@each_check
@pytest.mark.parametrize("name", ["query", "key", "additional_values", "rel_pos_bias"])
def test_manual_with_one_varying_operand(
    name: str, check_vma: bool, implementation: str
) -> None:
    """All the others are replicated, so that their gradients are sums over devices."""
    arrays, mesh = _arrays(), _mesh()
    arrays[name] = jnp.stack([arrays[name], jnp.sin(3 * arrays[name])])

    def piece(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        out, lse = _attend(implementation)({**arrays, name: arrays[name][0]})
        return out[None], lse[None]

    def mapped(attend: Attend, arrays: Arrays) -> Any:
        axes = {**dict.fromkeys(arrays), name: 0}
        return _with_gradients(jax.vmap(attend, in_axes=(axes,)), arrays)

    function = jax.shard_map(
        piece,
        mesh=mesh,
        in_specs=({**WHOLE, name: P("model")},),
        out_specs=(P("model"), P("model")),
        check_vma=check_vma,
    )
    _assert_close(
        jax.jit(functools.partial(_with_gradients, function))(arrays),
        _on_one_device(mapped, arrays),
    )


@each_check
def test_gradient_inside_manual(check_vma: bool, implementation: str) -> None:
    """As data-parallel training takes it: of a bias that all devices share."""
    arrays, mesh = _arrays(), _mesh()
    specs = _specs(batch=("data", "model"))

    def gradient(arrays: Arrays) -> Arrays:
        result = _gradient(_attend(implementation), arrays)
        if not check_vma:  # then the sum over devices is the caller's
            bias = jax.lax.psum(result["rel_pos_bias"], ("data", "model"))
            result = {**result, "rel_pos_bias": bias}
        return result

    function = jax.shard_map(
        gradient, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma
    )
    _assert_close(jax.jit(function)(arrays), _on_one_device(_gradient, arrays))


@each_check
def test_derivatives_inside_manual(check_vma: bool, implementation: str) -> None:
    """Forward mode and second order, with a replicated bias."""
    arrays, mesh = _arrays(), _mesh()
    specs = _specs(batch="data", heads="model")
    out = P("data", None, None, "model")
    derivatives = jax.shard_map(
        lambda arrays: _derivatives(_attend(implementation), arrays)[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=((out, out), (out, out)),
        check_vma=check_vma,
    )
    manual = _manual(_attend(implementation), mesh, specs, arrays, check_vma=check_vma)
    _assert_close(jax.jit(derivatives)(arrays), _on_one_device(_derivatives, arrays)[0])
    _assert_close(
        jax.jit(functools.partial(_reverse_over_reverse, manual))(arrays),
        _on_one_device(_reverse_over_reverse, arrays),
        1e-4,
    )


@each_check
def test_vmap_inside_manual(check_vma: bool, implementation: str) -> None:
    """The mapped examples of a device, with a bias that all of them share."""
    arrays, mesh = _arrays((*TOKENS, "rel_pos_bias")), _mesh()
    axes = {**dict.fromkeys(TOKENS, 0), "rel_pos_bias": None}

    def mapped(attend: Attend, arrays: Arrays) -> Any:
        return _with_gradients(jax.vmap(attend, in_axes=(axes,)), arrays)

    function = _manual(
        jax.vmap(_attend(implementation), in_axes=(axes,)),
        mesh,
        _specs(batch="data"),
        arrays,
        check_vma=check_vma,
    )
    _assert_close(
        jax.jit(functools.partial(_with_gradients, function))(arrays),
        _on_one_device(mapped, arrays),
    )


@each_check
@each_mesh
@pytest.mark.parametrize("automatic", ["heads", "grid"])
def test_partially_manual(
    automatic: str, axis_type: AxisType, check_vma: bool, implementation: str
) -> None:
    """The batch by hand, and something else by the compiler."""
    arrays, mesh = _arrays(), _mesh(axis_type)
    placed = _place(arrays, mesh, _specs(batch="data", **{automatic: "model"}))
    with _in_mesh(mesh):
        function = _manual(
            _attend(implementation),
            mesh,
            _specs(batch="data"),
            arrays,
            axis_names={"data"},
            check_vma=check_vma,
        )
    results, text = _run(functools.partial(_with_gradients, function), mesh, placed)
    if automatic == "heads" and not _partially_manual_gathers(mesh):
        # the sum of the bias's gradient over the batch
        assert set(collectives(text)) == {"all-reduce"}
    _assert_close(results, _on_one_device(_with_gradients, arrays))


@functools.cache
def _partially_manual_gathers(mesh: Any) -> bool:
    """Whether this JAX gathers even for a cosine what a manual axis leaves sharded.

    JAX 0.10 does under explicit axes: it declares every other axis of the operands and
    results of a partially manual region replicated.
    """
    array = jax.device_put(
        jnp.ones((BATCH, HEADS)), NamedSharding(mesh, P("data", "model"))
    )
    with _in_mesh(mesh):
        cosine = jax.shard_map(
            jnp.cos,
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names={"data"},
        )
    return "all-gather" in collectives(_run(cosine, mesh, array)[1])


# ---- The unfused halves --------------------------------------------------------------


def _unfused(arrays: Arrays) -> Any:
    """Scores, and sums of the values weighted with them."""
    scores = jax_na.na_qk(
        arrays["query"], arrays["key"], **WINDOW, rel_pos_bias=arrays["rel_pos_bias"]
    )
    scores = jnp.where(jnp.isfinite(scores), scores, 0)
    return scores, jax_na.na_av(scores, arrays["value"], **WINDOW)


def _unfused_with_gradients(_: Attend, arrays: Arrays) -> Any:
    return _with_gradients(_unfused, arrays)


@each_mesh
@pytest.mark.parametrize("sharded", ["batch and heads", "grid", "all unlike"])
def test_unfused(sharded: str, axis_type: AxisType) -> None:
    arrays, mesh = _arrays((*TOKENS, "rel_pos_bias")), _mesh(axis_type)
    specs = SILENT[sharded][0] if sharded in SILENT else GATHERED[sharded]
    placed = _place(arrays, mesh, specs)
    results, text = _run(functools.partial(_with_gradients, _unfused), mesh, placed)
    if sharded in SILENT:  # the sum of the bias's gradient over the batch
        assert set(collectives(text)) == {"all-reduce"}
    _assert_close(results, _on_one_device(_unfused_with_gradients, arrays))


@pytest.mark.parametrize("check_vma", [True, False])
def test_unfused_inside_manual(check_vma: bool) -> None:
    arrays, mesh = _arrays((*TOKENS, "rel_pos_bias")), _mesh()
    function = _manual(_unfused, mesh, SILENT["batch"][0], arrays, check_vma=check_vma)
    _assert_close(
        jax.jit(functools.partial(_with_gradients, function))(arrays),
        _on_one_device(_unfused_with_gradients, arrays),
    )
