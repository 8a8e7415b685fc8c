"""Every transformation of JAX, alone and with others, against the dense definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from dense import dense_attention
from derivatives import DERIVATIVES, loss_of
from problems import implementations
from programs import (
    attributes,
    custom_calls,
    equations,
    functions_called,
    primitives,
)
from tolerance import assert_trees_close

import jax_na

pytestmark = pytest.mark.usefixtures("quick_compile")

Arrays = dict[str, jax.Array]
Attend = Callable[[Arrays], tuple[jax.Array, jax.Array]]

GRID, WINDOW = (
    (5, 6),
    {
        "kernel_size": (3, 2),
        "stride": (1, 2),
        "dilation": (1, 2),
        "is_causal": (True, False),
    },
)
SHAPES = {
    "query": (2, *GRID, 4, 8),
    "key": (2, *GRID, 2, 8),
    "value": (2, *GRID, 2, 16),
    "rel_pos_bias": (4, 5, 3),
    "additional_keys": (2, 3, 2, 8),
    "additional_values": (2, 3, 2, 16),
}

# The best kernels and the portable code: the rules above them are the same for all.
IMPLEMENTATIONS = tuple(dict.fromkeys((implementations()[0], "xla")))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
native = pytest.mark.skipif(IMPLEMENTATIONS == ("xla",), reason="needs native kernels")


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _arrays(seed: int = 0, leading: tuple[int, ...] = ()) -> Arrays:
    """All operands, each with more axes in front."""
    return {
        name: _random(seed + index, *leading, *shape)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


@functools.cache
def _attend(implementation: str | None) -> Attend:
    def attend(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        return jax_na.neighborhood_attention(
            **arrays,
            **WINDOW,
            precision="highest",
            return_lse=True,
            implementation=implementation,
        )

    return attend


def _dense(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    return dense_attention(**arrays, **WINDOW)


# ---- Transformations -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(transform: Any, attend: Attend, *arguments: Any) -> Any:
    """Compiled once for many tests."""
    return transform(attend, *arguments)


@each_implementation
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str, implementation: str) -> None:
    arguments = _arrays(), _arrays(seed=50)
    assert_trees_close(
        _evaluate(DERIVATIVES[name], _attend(implementation), *arguments),
        _evaluate(DERIVATIVES[name], _dense, *arguments),
    )


def test_eager() -> None:
    arguments = _arrays(), _arrays(seed=50)
    for name in ("grad", "jvp"):
        actual = DERIVATIVES[name](_attend(None), *arguments)
        assert_trees_close(actual, _evaluate(DERIVATIVES[name], _dense, *arguments))


@each_implementation
@pytest.mark.parametrize("name", ["jacfwd", "jacrev", "hessian"])
def test_matrices_of_derivatives(name: str, implementation: str) -> None:
    """These map over the tangents or cotangents alone, not over the operands."""
    transform = getattr(jax, name)
    shapes = {"query": (4, 2, 8), "key": (4, 1, 8), "rel_pos_bias": (2, 5)}
    arrays = {n: _random(i, *shape) for i, (n, shape) in enumerate(shapes.items())}
    value = _random(9, 4, 1, 16)

    def evaluate(attention: Callable[..., Any], options: Any, arrays: Arrays) -> Any:
        return attention(**arrays, **options, value=value, kernel_size=(3,))

    options = {"return_lse": True, "precision": "highest"}
    options["implementation"] = implementation
    ours = functools.partial(evaluate, jax_na.neighborhood_attention, options)
    dense = functools.partial(evaluate, dense_attention, {})
    assert_trees_close(
        jax.jit(transform(ours))(arrays), jax.jit(transform(dense))(arrays)
    )


# ---- vmap ----------------------------------------------------------------------------

ALL = dict.fromkeys(SHAPES, 0)
ALONE = {name: {**dict.fromkeys(SHAPES), name: 0} for name in SHAPES}
MAPPED: dict[str, dict[str, int | None]] = {
    "all": ALL,
    "various axes": {
        "query": 1,
        "key": 2,
        "value": -1,
        "rel_pos_bias": 3,
        "additional_keys": 0,
        "additional_values": -2,
    },
    "all but the bias": {**ALL, "rel_pos_bias": None},
    "query and bias": {**dict.fromkeys(SHAPES), "query": -1, "rel_pos_bias": 1},
    **{f"{name} alone": axes for name, axes in ALONE.items()},
}


def _mapped(axes: dict[str, int | None], size: int = 3) -> Arrays:
    arrays = _arrays(leading=(size,))
    return {
        name: array[0] if axes[name] is None else jnp.moveaxis(array, 0, axes[name])
        for name, array in arrays.items()
    }


@functools.cache
def _map_of(name: str) -> Any:
    """A map of attention, its gradient, and the gradients per example."""
    axes = MAPPED[name]

    def evaluate(attend: Attend, arrays: Arrays) -> Any:
        def total(arrays: Arrays) -> jax.Array:
            return jnp.sum(jax.vmap(loss_of(attend), in_axes=(axes,))(arrays))

        outputs = jax.vmap(attend, in_axes=(axes,), out_axes=(-1, 1))(arrays)
        per_example = jax.vmap(jax.grad(loss_of(attend)), in_axes=(axes,))(arrays)
        return outputs, jax.grad(total)(arrays), per_example

    return evaluate


@pytest.mark.parametrize(
    ("mapped", "implementation"),
    [*((name, IMPLEMENTATIONS[0]) for name in MAPPED), ("various axes", "xla")],
)
def test_vmap(mapped: str, implementation: str) -> None:
    arrays, evaluate = _mapped(MAPPED[mapped]), _map_of(mapped)
    assert_trees_close(
        _evaluate(evaluate, _attend(implementation), arrays),
        _evaluate(evaluate, _dense, arrays),
    )


@pytest.mark.parametrize("rule", ["jvp", "jvp(grad)", "grad(jvp)"])
@pytest.mark.parametrize(
    ("mapped", "mapped_tangents"),
    [("query alone", ("value", "rel_pos_bias")), ("query and bias", ("value",))],
)
def test_vmap_of_derivatives(
    mapped: str, mapped_tangents: tuple[str, ...], rule: str
) -> None:
    """Where some operands and the tangents of others are mapped."""
    axes = MAPPED[mapped]
    tangent_axes = {**dict.fromkeys(SHAPES), **dict.fromkeys(mapped_tangents, 0)}

    def evaluate(attend: Attend, arrays: Arrays, tangents: Arrays) -> Any:
        one = functools.partial(DERIVATIVES[rule], attend)
        return jax.vmap(one, in_axes=(axes, tangent_axes))(arrays, tangents)

    arguments = _mapped(axes), _mapped(tangent_axes)
    assert_trees_close(
        _evaluate(evaluate, _attend(None), *arguments),
        _evaluate(evaluate, _dense, *arguments),
    )


@pytest.mark.parametrize("bias_axes", [(0, 0), (0, None), (None, 0), (None, None)])
def test_nested_vmap(bias_axes: tuple[Any, Any]) -> None:
    """A bias that only one of the maps knows has one gradient for the other."""
    outer, inner = ({**ALL, "rel_pos_bias": axis} for axis in bias_axes)
    sizes = tuple(n for n, axis in zip((2, 3), bias_axes) if axis is not None)
    arrays = _arrays(leading=(2, 3))
    arrays["rel_pos_bias"] = _random(9, *sizes, *SHAPES["rel_pos_bias"])

    def evaluate(attend: Attend, arrays: Arrays) -> Any:
        losses = jax.vmap(jax.vmap(loss_of(attend), in_axes=(inner,)), in_axes=(outer,))
        per_example = jax.vmap(
            jax.vmap(jax.grad(loss_of(attend)), in_axes=(inner,)), in_axes=(outer,)
        )
        # One gradient for each entry of the outer map, summed over the inner one.
        mixed = jax.vmap(
            jax.grad(
                lambda arrays: jnp.sum(
                    jax.vmap(loss_of(attend), in_axes=(inner,))(arrays)
                )
            ),
            in_axes=(outer,),
        )
        total = jax.grad(lambda arrays: jnp.sum(losses(arrays)))
        return losses(arrays), per_example(arrays), mixed(arrays), total(arrays)

    assert_trees_close(
        _evaluate(evaluate, _attend(None), arrays), _evaluate(evaluate, _dense, arrays)
    )


@pytest.mark.parametrize("mapped", ["query", "frame", "both"])
def test_vmap_over_frames(mapped: str) -> None:
    """One frame for all, or one array for all frames."""
    arrays = _arrays(leading=(3,))
    del arrays["rel_pos_bias"]
    lengths = jnp.asarray([[5, 6], [3, 4], [9, 2]])
    origins = jnp.asarray([[0, 0], [-1, 1], [4, -2]])
    if mapped == "frame":
        arrays = {name: array[0] for name, array in arrays.items()}
    if mapped == "query":
        lengths, origins = lengths[1], origins[1]
    axes = (
        None if mapped == "frame" else 0,
        None if mapped == "query" else 0,
        None if mapped == "query" else 0,
    )

    def evaluate(attend: Any, arrays: Arrays, lengths: Any, origins: Any) -> Any:
        def one(arrays: Arrays, length: jax.Array, origin: jax.Array) -> Any:
            frame = jax_na.Frame(length, origin, origin)

            def outputs(arrays: Arrays) -> Any:
                out, lse = attend({**arrays, "frame": frame})
                return out, jnp.where(jnp.isfinite(lse), lse, 0)

            return outputs(arrays), jax.grad(loss_of(outputs))(arrays)

        return jax.vmap(one, in_axes=axes)(arrays, lengths, origins)

    arguments = arrays, lengths, origins
    assert_trees_close(
        _evaluate(evaluate, _attend(None), *arguments),
        _evaluate(evaluate, _dense, *arguments),
    )


@native
def test_vmap_is_one_call_without_reshape() -> None:
    """Folding the mapped axis into another would make XLA gather sharded arrays."""
    axes = {**ALL, "rel_pos_bias": None}
    arrays = _mapped(axes)
    mapped = jax.vmap(_attend(None), in_axes=(axes,))
    names = {equation.primitive.name for equation in equations(mapped, arrays)}
    assert "reshape" not in names
    assert primitives(mapped, arrays) == {"forward": 1}
    text = jax.jit(mapped).lower(arrays).as_text()
    assert functions_called(text) == {"forward": 1}


# ---- Control flow and rematerialisation ----------------------------------------------


def _layers(attend: Attend, wrap: Any = lambda layer: layer) -> Any:
    """Two layers of attention, each of which ``wrap`` transforms."""

    @wrap
    def layer(tokens: jax.Array, bias: jax.Array) -> jax.Array:
        key = jnp.tanh(tokens[..., :2, :])
        out, lse = attend(
            {"query": tokens, "key": key, "value": jnp.sin(key), "rel_pos_bias": bias}
        )
        return tokens + out * jnp.cos(lse)[..., None]

    def model(tokens: jax.Array, biases: jax.Array) -> jax.Array:
        for bias in biases:
            tokens = layer(tokens, bias)
        return jnp.sum(jnp.sin(tokens))

    return model


@each_implementation
@pytest.mark.parametrize("remat", [False, True])
def test_scan(remat: bool, implementation: str) -> None:
    tokens = _random(0, *SHAPES["query"])
    biases = _random(1, 2, *SHAPES["rel_pos_bias"])

    def scanned(attend: Attend, tokens: jax.Array, biases: jax.Array) -> jax.Array:
        def layer(tokens: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
            key = jnp.tanh(tokens[..., :2, :])
            value = jnp.sin(key)
            out, lse = attend(
                {"query": tokens, "key": key, "value": value, "rel_pos_bias": bias}
            )
            return tokens + out * jnp.cos(lse)[..., None], None

        layer = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jnp.sin(jax.lax.scan(layer, tokens, biases)[0]))

    ours = functools.partial(scanned, _attend(implementation))
    expected = jax.jit(jax.value_and_grad(_layers(_dense), argnums=(0, 1)))
    actual = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))
    assert_trees_close(actual(tokens, biases), expected(tokens, biases))


@each_implementation
def test_control_flow(implementation: str) -> None:
    """A branch per example, in a loop over them, in a loop with a traced end."""
    arrays = _arrays(leading=(3,))

    def evaluate(attend: Attend, arrays: Arrays, steps: int) -> Any:
        def one(argument: tuple[jax.Array, Arrays]) -> Any:
            index, arrays = argument
            return jax.lax.cond(
                index % 2 == 0,
                attend,
                lambda arrays: attend({**arrays, "query": -arrays["query"]}),
                arrays,
            )

        out, lse = jax.lax.map(one, (jnp.arange(3), arrays))
        example = {name: array[0] for name, array in arrays.items()}
        repeated = jax.lax.fori_loop(
            0,
            steps,
            lambda _, query: query + attend({**example, "query": query})[0].sum(),
            example["query"],
        )
        return out, lse, repeated

    actual = jax.jit(functools.partial(evaluate, _attend(implementation)))(arrays, 2)
    assert_trees_close(
        actual, jax.jit(functools.partial(evaluate, _dense))(arrays, 2), 1e-4
    )


REMAT = {
    "none": (lambda layer: layer, 2),
    "plain": (jax.checkpoint, 4),
    "save other names": (
        functools.partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names("something"),
        ),
        4,
    ),
    "save out and lse": (
        functools.partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names(
                "jax_na_out", "jax_na_lse"
            ),
        ),
        2,
    ),
}


@native
@pytest.mark.parametrize("name", REMAT)
def test_remat(name: str) -> None:
    """How often two layers compute their attention, and that it stays right."""
    wrap, expected_calls = REMAT[name]
    tokens = _random(0, *SHAPES["query"])
    biases = _random(1, 2, *SHAPES["rel_pos_bias"])
    gradient = jax.jit(jax.value_and_grad(_layers(_attend(None), wrap), argnums=(0, 1)))
    lowered = gradient.lower(tokens, biases)
    expected = {"forward": expected_calls, "backward": 2}
    assert functions_called(lowered.as_text()) == expected
    compiled = lowered.compile()
    assert functions_called(compiled.as_text()) == expected
    reference = jax.jit(jax.value_and_grad(_layers(_dense), argnums=(0, 1)))
    assert_trees_close(compiled(tokens, biases), reference(tokens, biases))


# ---- What is computed, and what is not -----------------------------------------------


def test_first_order_is_one_forward_and_one_backward() -> None:
    gradient = jax.grad(loss_of(_attend(None)))
    assert primitives(gradient, _arrays()) == {"forward": 1, "backward": 1}
    mapped = jax.vmap(gradient)
    assert primitives(mapped, _arrays(leading=(2,))) == {"forward": 1, "backward": 1}


def test_forward_mode_is_one_forward_and_one_tangent() -> None:
    tangent = functools.partial(DERIVATIVES["jvp"], _attend(None))
    assert primitives(tangent, _arrays(), _arrays()) == {"forward": 1, "tangent": 1}


def _parameter(name: str, function: Any, *arguments: Any) -> Any:
    (found,) = (
        equation.params[name]
        for equation in equations(function, *arguments)
        if name in equation.params
        and equation.primitive.name.startswith("neighborhood_attention")
    )
    return found


FIELDS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "rel_pos_bias": "bias",
    "additional_keys": "additional_key",
    "additional_values": "additional_value",
}


def _gradient_of(wanted: tuple[str, ...], attend: Attend) -> Any:
    """The gradient for some operands; the others are held constant."""

    def gradient(arrays: Arrays) -> Arrays:
        moving = {name: arrays[name] for name in wanted}
        return jax.grad(lambda moving: loss_of(attend)({**arrays, **moving}))(moving)

    return gradient


@pytest.mark.parametrize(
    "wanted", [*((name,) for name in SHAPES), ("query", "rel_pos_bias"), tuple(SHAPES)]
)
def test_only_wanted_gradients_are_computed(wanted: tuple[str, ...]) -> None:
    arrays = _arrays()
    gradient = _gradient_of(wanted, _attend(None))
    assert set(_parameter("wrt", gradient, arrays)) == {FIELDS[n] for n in wanted}
    everything = _evaluate(DERIVATIVES["grad"], _dense, arrays, arrays)
    expected = {name: everything[name] for name in wanted}
    assert_trees_close(jax.jit(gradient)(arrays), expected)
    text = jax.jit(gradient).lower(arrays).as_text()
    for target in custom_calls(text):
        if target.startswith("jax_na_backward"):
            flags = [int(name in wanted) for name in SHAPES]
            assert attributes(text, target)["wrt"] == flags


def test_stopped_gradients_are_not_computed() -> None:
    def loss(arrays: Arrays) -> jax.Array:
        key = jax.lax.stop_gradient(arrays["key"])
        return loss_of(_attend(None))({**arrays, "key": key})

    wrt = _parameter("wrt", jax.grad(loss), _arrays())
    assert set(wrt) == set(FIELDS.values()) - {"key"}


def test_unmoved_operands_have_no_tangents() -> None:
    arrays = _arrays()

    def tangent(arrays: Arrays) -> Any:
        moving = {"value": arrays["value"]}
        attend = _attend(None)
        return jax.jvp(lambda m: attend({**arrays, **m}), (moving,), (moving,))

    assert _parameter("tangents", tangent, arrays) == ("value",)


@each_implementation
@pytest.mark.parametrize("output", ["out", "lse"])
def test_gradient_of_one_output(output: str, implementation: str) -> None:
    """The cotangent of lse counts, and takes part only if there is one."""
    arrays = _arrays()

    def loss(attend: Attend, arrays: Arrays) -> jax.Array:
        return jnp.sum(jnp.sin(attend(arrays)[output == "lse"]))

    ours = jax.grad(functools.partial(loss, _attend(implementation)))
    dense = jax.grad(functools.partial(loss, _dense))
    assert _parameter("has_dlse", ours, arrays) == (output == "lse")
    assert_trees_close(jax.jit(ours)(arrays), jax.jit(dense)(arrays))


def test_unused_call_is_removed() -> None:
    arrays = _arrays()
    text = jax.jit(lambda arrays: (_attend(None)(arrays), 0)[1]).lower(arrays).as_text()
    assert not functions_called(text)


def test_frames_have_no_gradient() -> None:
    """Integers: JAX asks for their tangents in a type of its own."""
    arrays = _arrays()
    frame = jax_na.Frame(jnp.asarray([4, 5]), jnp.asarray([0, 1]))

    def loss(arrays: Arrays, frame: jax_na.Frame) -> jax.Array:
        return jnp.sum(_attend(None)({**arrays, "frame": frame})[0])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
    gradients, of_frame = gradient(arrays, frame)
    assert {leaf.dtype for leaf in jax.tree.leaves(of_frame)} == {jax.dtypes.float0}
    expected = jax.grad(lambda a: jnp.sum(_dense({**a, "frame": frame})[0]))
    assert_trees_close(gradients, jax.jit(expected)(arrays))


def test_frames_do_not_recompile() -> None:
    arrays = _arrays()

    def framed(attend: Attend, arrays: Arrays, frame: jax_na.Frame) -> Any:
        return attend({**arrays, "frame": frame})

    ours = jax.jit(functools.partial(framed, _attend(None)))
    dense = jax.jit(functools.partial(framed, _dense))
    for length in (3, 4, 5):
        frame = jax_na.Frame(jnp.asarray([length, 6]), jnp.asarray(0), jnp.asarray(0))
        assert_trees_close(ours(arrays, frame)[0], dense(arrays, frame)[0])
    assert ours._cache_size() == 1


# ---- Donation ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@each_implementation
@pytest.mark.parametrize("grad", [False, True])
def test_donated_buffers(grad: bool, implementation: str) -> None:
    """Results may take the memory of operands, but not while these are still read."""
    arrays = {
        name: array[..., :8] if name == "value" else array
        for name, array in _arrays().items()
        if not name.startswith("additional")
    }
    attend = _attend(implementation)
    function = jax.grad(loss_of(attend)) if grad else attend
    reference = jax.grad(loss_of(_dense)) if grad else _dense
    expected = jax.jit(reference)(arrays)
    donating = jax.jit(function, donate_argnums=0)
    compiled = donating.lower(arrays).compile()
    assert "input_output_alias={" in compiled.as_text()
    query = arrays["query"]
    assert_trees_close(compiled(arrays), expected)
    assert query.is_deleted()
