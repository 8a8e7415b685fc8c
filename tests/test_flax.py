"""The Flax layers: against Flax's own attention, each other, and the functions."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jax_na
import jax_na.linen
import jax_na.nnx

pytestmark = pytest.mark.usefixtures("quick_compile")

FEATURES = 16
HEADS = 4


def random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def randomize(tree, seed=7):
    """The same tree with every leaf drawn anew, so that no bias stays zero."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)
         for key, leaf in zip(keys, leaves, strict=True)]
    )  # fmt: skip


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def randomized(layer):
    nnx.update(layer, randomize(nnx.state(layer, nnx.Param)))
    return layer


def assert_close(actual, expected, tolerance=1e-5):
    scale = float(jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(expected, jnp.float32)))))
    np.testing.assert_allclose(
        np.asarray(actual, np.float32),
        np.asarray(expected, np.float32),
        rtol=0,
        atol=10 * tolerance * scale,
    )


def assert_gradients_close(actual, expected, tolerance=1e-5):
    """As assert_close, but a leaf of zero gradient may hold rounding of the others."""
    leaves = jax.tree.leaves(expected)
    floor = 1e-2 * max(float(jnp.abs(leaf).max()) for leaf in leaves)

    def check(a, b):
        scale = max(floor, float(jnp.sqrt(jnp.mean(jnp.square(b)))))
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * tolerance * scale)

    jax.tree.map(check, actual, expected)


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _names(value):
    """Test names that are the same in every process; functions print their address."""
    return ",".join(value) or "default" if isinstance(value, dict) else str(value)


# ---- Against Flax's own attention ----------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((9,), {}),
        ((9,), {"num_kv_heads": 2}),
        ((4, 5), {"use_bias": False}),
        ((4, 5), {"num_kv_heads": 1, "normalize_qk": True}),
        ((4, 5), {"qkv_features": 32, "out_features": 6}),
        ((2, 3, 4), {"out_kernel_init": nnx.initializers.ones}),
        ((2, 3, 4), {"bias_init": nnx.initializers.ones}),
    ],
    ids=_names,
)
def test_nnx_equals_flax_attention_when_the_window_is_the_grid(grid, options):
    flax_layer = nnx.MultiHeadAttention(
        HEADS, FEATURES, **options, decode=False, rngs=nnx.Rngs(3)
    )
    layer = jax_na.nnx.NeighborhoodAttention(
        HEADS, FEATURES, **options, kernel_size=grid, rngs=nnx.Rngs(3)
    )
    # One seed, one set of parameters.
    assert_trees_equal(params_of(layer), params_of(flax_layer))

    state = randomize(nnx.state(flax_layer, nnx.Param))
    nnx.update(flax_layer, state)
    nnx.update(layer, state)
    inputs = random(0, 2, *grid, FEATURES)
    outputs = layer(inputs)
    expected = flax_layer(inputs.reshape(2, -1, FEATURES))
    assert outputs.shape == (2, *grid, expected.shape[-1])
    assert_close(outputs.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((9,), {}),
        ((4, 5), {"use_bias": False, "normalize_qk": True}),
        ((2, 3, 4), {"qkv_features": 8}),
    ],
    ids=_names,
)
def test_linen_equals_flax_attention_when_the_window_is_the_grid(grid, options):
    inputs = random(0, 2, *grid, FEATURES)
    tokens = inputs.reshape(2, -1, FEATURES)
    flax_layer = nn.MultiHeadDotProductAttention(HEADS, **options)
    layer = jax_na.linen.NeighborhoodAttention(HEADS, **options, kernel_size=grid)
    variables = layer.init(jax.random.key(1), inputs)
    assert_trees_equal(variables, flax_layer.init(jax.random.key(1), tokens))

    variables = randomize(variables)
    expected = flax_layer.apply(variables, tokens)
    outputs = layer.apply(variables, inputs)
    assert_close(outputs.reshape(expected.shape), expected)


def test_causal_equals_flax_causal_attention():
    flax_layer = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0))
    layer = jax_na.nnx.NeighborhoodAttention1D(
        HEADS, FEATURES, kernel_size=9, is_causal=True, rngs=nnx.Rngs(0)
    )
    inputs = random(0, 3, 9, FEATURES)
    assert_close(layer(inputs), flax_layer(inputs, is_causal=True))


# ---- Against the functions and each other --------------------------------------------

WINDOWS = [
    ((12,), {"kernel_size": (5,), "stride": 2, "is_causal": True}),
    ((8, 9), {"kernel_size": (3, 4), "dilation": (2, 1), "num_kv_heads": 2}),
    (
        (7, 6),
        {
            "kernel_size": (3, 5),
            "stride": (1, 3),
            "is_causal": (True, False),
            "rel_pos_bias": True,
            "scale": 0.7,
        },
    ),
    (
        (4, 5, 6),
        {
            "kernel_size": (2, 3, 3),
            "dilation": (1, 1, 2),
            "rel_pos_bias": True,
            "normalize_qk": True,
            "num_kv_heads": 1,
        },
    ),
]


@pytest.mark.parametrize(
    ("batch", "grid", "options"),
    [
        (batch, *window)
        for batch, window in zip([(2,), (), (2, 1, 3), (1,)], WINDOWS, strict=True)
    ],
    ids=["1d", "2d", "rpb", "3d"],
)
def test_linen_equals_nnx(batch, grid, options):
    layer = randomized(
        jax_na.nnx.NeighborhoodAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))
    )
    linen_layer = jax_na.linen.NeighborhoodAttention(HEADS, **options)
    inputs = random(1, *batch, *grid, FEATURES)
    shapes = jax.eval_shape(linen_layer.init, jax.random.key(0), inputs)["params"]
    params = params_of(layer)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    outputs = layer(inputs)
    assert outputs.shape == inputs.shape
    assert_close(linen_layer.apply({"params": params}, inputs), outputs)


@pytest.mark.parametrize(("grid", "options"), WINDOWS, ids=["1d", "2d", "rpb", "3d"])
def test_layer_is_projections_around_the_function(grid, options):
    """Every window argument reaches the function, which has tests of its own."""
    layer = randomized(
        jax_na.nnx.NeighborhoodAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))
    )
    inputs = random(1, 2, *grid, FEATURES)
    params = params_of(layer)

    def project(name):
        projected = jnp.einsum("...f,fhd->...hd", inputs, params[name]["kernel"])
        return projected + params[name]["bias"]

    def normalize(array, name):
        if not options.get("normalize_qk"):
            return array
        array = array - array.mean(-1, keepdims=True)
        deviation = jnp.sqrt(jnp.square(array).mean(-1, keepdims=True) + 1e-6)
        return array / deviation * params[name]["scale"]

    attended = jax_na.neighborhood_attention(
        normalize(project("query"), "query_ln"),
        normalize(project("key"), "key_ln"),
        project("value"),
        options["kernel_size"],
        stride=options.get("stride", 1),
        dilation=options.get("dilation", 1),
        is_causal=options.get("is_causal", False),
        scale=options.get("scale"),
        rel_pos_bias=params.get("rel_pos_bias"),
    )
    expected = jnp.einsum("...hd,hdf->...f", attended, params["out"]["kernel"])
    assert_close(layer(inputs), expected + params["out"]["bias"])


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("NeighborhoodAttention1D", (6,)),
        ("NeighborhoodAttention2D", (6, 5)),
        ("NeighborhoodAttention3D", (4, 3, 5)),
    ],
)
def test_named_ranks_take_one_number_for_all_axes(name, grid):
    inputs = random(0, 2, *grid, FEATURES)
    options = {"kernel_size": 3, "rel_pos_bias": True}
    layer = getattr(jax_na.nnx, name)(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))
    general = jax_na.nnx.NeighborhoodAttention(
        HEADS,
        FEATURES,
        kernel_size=(3,) * len(grid),
        rel_pos_bias=True,
        rngs=nnx.Rngs(0),
    )
    linen_layer = getattr(jax_na.linen, name)(HEADS, **options)
    np.testing.assert_array_equal(layer(inputs), general(inputs))
    outputs = linen_layer.apply({"params": params_of(layer)}, inputs)
    assert_close(outputs, layer(inputs))


def test_frame_places_each_sample_of_a_padded_batch():
    options = {"kernel_size": (3, 3), "rel_pos_bias": True}
    layer = randomized(
        jax_na.nnx.NeighborhoodAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))
    )
    linen_layer = jax_na.linen.NeighborhoodAttention(HEADS, **options)
    lengths = [(5, 4), (7, 6)]
    inputs = random(0, 2, 7, 6, FEATURES)
    frame = jax_na.Frame(length=jnp.array(lengths))
    outputs = layer(inputs, frame=frame)
    bias = layer.out.bias[...]
    for sample, (height, width) in enumerate(lengths):
        alone = layer(inputs[sample, :height, :width])
        assert_close(outputs[sample, :height, :width], alone)
        padding = np.ones((7, 6), bool)
        padding[:height, :width] = False
        np.testing.assert_array_equal(
            outputs[sample][padding],
            jnp.broadcast_to(bias, (padding.sum(), FEATURES)),
        )
    params = {"params": params_of(layer)}
    assert_close(linen_layer.apply(params, inputs, frame=frame), outputs)


def test_implementation_is_passed_on():
    inputs = random(0, 6, 6, FEATURES)
    make = {
        "nnx": lambda name: jax_na.nnx.NeighborhoodAttention2D(
            HEADS, FEATURES, kernel_size=3, implementation=name, rngs=nnx.Rngs(0)
        )(inputs),
        "linen": lambda name: jax_na.linen.NeighborhoodAttention2D(
            HEADS, kernel_size=3, implementation=name
        ).init_with_output(jax.random.key(0), inputs)[0],
    }
    for call in make.values():
        assert_close(call("xla"), call(None))
        with pytest.raises(ValueError, match=r"implementation.*'fastest'"):
            call("fastest")


# ---- Relative positional bias --------------------------------------------------------


def test_relative_positional_bias_starts_small_and_learns():
    layer = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, kernel_size=(5, 7), rel_pos_bias=True, rngs=nnx.Rngs(0)
    )
    table = layer.rel_pos_bias[...]
    assert table.shape == (HEADS, 9, 13)
    assert 0.015 < float(table.std()) < 0.02  # of a normal cut at two deviations
    assert float(jnp.abs(table).max()) <= 0.04

    inputs = random(1, 2, 8, 8, FEATURES)
    gradients = nnx.grad(lambda layer: jnp.square(layer(inputs)).sum())(layer)
    assert bool(jnp.all(gradients["rel_pos_bias"][...] != 0))

    # A large entry draws every query to the neighbor at that offset: here the left one.
    layer.rel_pos_bias[...] = jnp.zeros_like(table).at[:, 4, 5].set(100.0)
    values = layer.value(inputs)
    expected = layer.out(values[:, :, 2:-4])
    assert_close(layer(inputs)[:, :, 3:-3], expected)


# ---- Transformations -----------------------------------------------------------------


@pytest.fixture
def layer():
    return randomized(
        jax_na.nnx.NeighborhoodAttention2D(
            HEADS,
            FEATURES,
            num_kv_heads=2,
            kernel_size=3,
            rel_pos_bias=True,
            normalize_qk=True,
            rngs=nnx.Rngs(0),
        )
    )


def loss_of(layer, inputs):
    return jnp.square(layer(inputs)).mean()


def test_nnx_jit_grad_split_and_merge(layer):
    inputs = random(1, 2, 5, 6, FEATURES)
    expected = layer(inputs)
    assert_close(nnx.jit(lambda layer, x: layer(x))(layer, inputs), expected)

    graphdef, state = nnx.split(layer)
    assert_close(nnx.merge(graphdef, state)(inputs), expected)
    # Without dropout a layer is parameters only.
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))) == 0

    gradients = nnx.grad(loss_of)(layer, inputs)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(gradients)) == jax.tree.map(
        jnp.shape, params_of(layer)
    )
    # Along a random direction the gradient is the loss's slope.
    direction = jax.tree.map(lambda leaf: random(5, *leaf.shape), state)

    def moved(step):
        moved_state = jax.tree.map(lambda a, b: a + step * b, state, direction)
        return float(loss_of(nnx.merge(graphdef, moved_state), inputs))

    slope = sum(
        float(jnp.vdot(a, b))
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction))
    )
    assert slope == pytest.approx((moved(1e-2) - moved(-1e-2)) / 2e-2, rel=1e-2)


def test_nnx_remat_keeps_gradients(layer):
    inputs = random(1, 2, 5, 6, FEATURES)

    def remat_loss(layer, inputs):
        return jnp.square(nnx.remat(lambda m, x: m(x))(layer, inputs)).mean()

    assert_gradients_close(
        nnx.to_pure_dict(nnx.grad(remat_loss)(layer, inputs)),
        nnx.to_pure_dict(nnx.grad(loss_of)(layer, inputs)),
    )


def test_nnx_vmap_runs_an_ensemble():
    @nnx.vmap
    def make(key):
        return jax_na.nnx.NeighborhoodAttention2D(
            HEADS, FEATURES, kernel_size=3, rel_pos_bias=True, rngs=nnx.Rngs(key)
        )

    ensemble = make(jax.random.split(jax.random.key(0), 3))
    assert ensemble.rel_pos_bias.shape == (3, HEADS, 5, 5)
    inputs = random(1, 3, 5, 6, FEATURES)
    outputs = nnx.vmap(lambda layer, x: layer(x))(ensemble, inputs)
    graphdef, state = nnx.split(ensemble)
    for member in range(3):
        alone = nnx.merge(graphdef, jax.tree.map(lambda a, m=member: a[m], state))
        assert_close(outputs[member], alone(inputs[member]))


def test_linen_jit_grad_remat_and_scan():
    options = {"num_heads": HEADS, "kernel_size": 3, "rel_pos_bias": True}
    layer = jax_na.linen.NeighborhoodAttention2D(**options)
    inputs = random(1, 2, 5, 6, FEATURES)
    variables = randomize(layer.init(jax.random.key(0), inputs))

    def loss(variables, layer):
        return jnp.square(layer.apply(variables, inputs)).mean()

    rematerialized = nn.remat(jax_na.linen.NeighborhoodAttention2D)(**options)
    gradients = jax.grad(loss)(variables, layer)
    jitted = jax.jit(jax.grad(loss), static_argnums=1)
    assert_gradients_close(jitted(variables, layer), gradients)
    assert_gradients_close(jitted(variables, rematerialized), gradients)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, carry):
            scanned = nn.scan(
                lambda layer, carry, _: (carry + layer(carry), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            layer = jax_na.linen.NeighborhoodAttention2D(**options, name="layer")
            return scanned(layer, carry, None)[0]

    stacked = Stack().init(jax.random.key(0), inputs)
    expected = inputs
    for index in range(2):
        params = jax.tree.map(lambda a, i=index: a[i], stacked["params"]["layer"])
        expected = expected + layer.apply({"params": params}, expected)
    assert_close(Stack().apply(stacked, inputs), expected)


# ---- Dtypes --------------------------------------------------------------------------


def test_bfloat16_computation_with_float32_parameters():
    options = {"kernel_size": 3, "rel_pos_bias": True, "normalize_qk": True}
    inputs = random(1, 2, 6, 6, FEATURES)
    full = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, **options, rngs=nnx.Rngs(0)
    )
    half = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, **options, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert_trees_equal(params_of(half), params_of(full))
    outputs = half(inputs)
    assert outputs.dtype == jnp.bfloat16
    assert_close(outputs, full(inputs), 1.5e-2)
    gradients = nnx.grad(lambda m: m(inputs).astype(jnp.float32).sum())(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}

    linen_half = jax_na.linen.NeighborhoodAttention2D(
        HEADS, **options, dtype=jnp.bfloat16
    )
    linen_outputs = linen_half.apply({"params": params_of(half)}, inputs)
    assert linen_outputs.dtype == jnp.bfloat16
    assert_close(linen_outputs, outputs, 1.5e-2)


def test_parameter_dtype():
    options = {"kernel_size": 3, "rel_pos_bias": True, "normalize_qk": True}
    layer = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, **options, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    inputs = random(1, 6, 6, FEATURES, dtype=jnp.bfloat16)
    linen_layer = jax_na.linen.NeighborhoodAttention2D(
        HEADS, **options, param_dtype=jnp.bfloat16
    )
    variables = linen_layer.init(jax.random.key(0), inputs)
    for tree in (params_of(layer), variables):
        assert {a.dtype for a in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    assert layer(inputs).dtype == jnp.bfloat16
    assert layer(inputs.astype(jnp.float32)).dtype == jnp.float32
    assert linen_layer.apply(variables, inputs).dtype == jnp.bfloat16


# ---- Dropout -------------------------------------------------------------------------


def assert_dropped(outputs, expected, rate):
    """Every entry is 0 or the expected one over the keep rate, at about that rate."""
    dropped = outputs == 0
    assert abs(float(dropped.mean()) - rate) < 0.1
    assert_close(outputs, jnp.where(dropped, 0, expected / (1 - rate)))


def test_nnx_dropout_acts_on_the_output():
    def make(**options):
        return jax_na.nnx.NeighborhoodAttention2D(
            HEADS, FEATURES, kernel_size=3, **options, rngs=nnx.Rngs(0, dropout=1)
        )

    inputs = random(1, 2, 6, 6, FEATURES)
    expected = make()(inputs)
    layer = make(dropout_rate=0.25)
    with pytest.raises(ValueError, match="deterministic"):
        layer(inputs)
    np.testing.assert_array_equal(layer(inputs, deterministic=True), expected)

    outputs = layer(inputs, deterministic=False)
    assert_dropped(outputs, expected, 0.25)
    assert not jnp.array_equal(layer(inputs, deterministic=False), outputs)

    layer.train()
    assert_dropped(layer(inputs), expected, 0.25)
    layer.eval()
    np.testing.assert_array_equal(layer(inputs), expected)

    forgetful = make(dropout_rate=0.25, deterministic=False, keep_rngs=False)
    with pytest.raises(ValueError, match="rngs"):
        forgetful(inputs)
    first = forgetful(inputs, rngs=nnx.Rngs(dropout=3))
    assert_dropped(first, expected, 0.25)
    np.testing.assert_array_equal(forgetful(inputs, rngs=nnx.Rngs(dropout=3)), first)


def test_linen_dropout_acts_on_the_output():
    def make(**options):
        return jax_na.linen.NeighborhoodAttention2D(HEADS, kernel_size=3, **options)

    inputs = random(1, 2, 6, 6, FEATURES)
    variables = make().init(jax.random.key(0), inputs)
    expected = make().apply(variables, inputs)
    layer = make(dropout_rate=0.25)
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, inputs)
    outputs = layer.apply(variables, inputs, deterministic=True)
    np.testing.assert_array_equal(outputs, expected)

    key = jax.random.key(3)
    outputs = layer.apply(variables, inputs, deterministic=False, dropout_rng=key)
    assert_dropped(outputs, expected, 0.25)
    outputs = make(dropout_rate=0.25, deterministic=False).apply(
        variables, inputs, rngs={"dropout": key}
    )
    assert_dropped(outputs, expected, 0.25)


# ---- Sharding ------------------------------------------------------------------------


def one_device_mesh(axis_type):
    return jax.make_mesh(
        (1, 1),
        ("data", "model"),
        axis_types=(axis_type,) * 2,
        devices=jax.devices()[:1],
    )


def test_nnx_sharding_metadata():
    # Flax places parameters that name mesh axes as soon as they are made.
    with jax.set_mesh(one_device_mesh(jax.sharding.AxisType.Auto)):
        layer = jax_na.nnx.NeighborhoodAttention2D(
            HEADS,
            FEATURES,
            kernel_size=3,
            rel_pos_bias=True,
            normalize_qk=True,
            rngs=nnx.Rngs(0),
            kernel_metadata={"out_sharding": (None, "model", None)},
            out_kernel_metadata={"out_sharding": ("model", None, None)},
            bias_metadata={"out_sharding": ("model", None)},
            out_bias_metadata={"out_sharding": (None,)},
            query_ln_scale_metadata={"note": "query"},
            key_ln_scale_metadata={"note": "key"},
            rel_pos_bias_metadata={"out_sharding": ("model", None, None)},
        )
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))
    for name in ("query", "key", "value"):
        assert specs[name]["kernel"] == PartitionSpec(None, "model", None)
        assert specs[name]["bias"] == PartitionSpec("model", None)
    assert specs["out"]["kernel"] == PartitionSpec("model", None, None)
    assert specs["out"]["bias"] == PartitionSpec(None)
    assert specs["rel_pos_bias"] == PartitionSpec("model", None, None)
    assert layer.query_ln.scale.note == "query"
    assert layer.key_ln.scale.note == "key"


def test_linen_sharding_metadata():
    inputs = random(0, 5, 5, FEATURES)
    layer = jax_na.linen.NeighborhoodAttention2D(
        HEADS,
        kernel_size=3,
        rel_pos_bias=True,
        kernel_init=nn.with_partitioning(
            nn.initializers.lecun_normal(), (None, "model", None)
        ),
        out_kernel_init=nn.with_partitioning(
            nn.initializers.lecun_normal(), ("model", None, None)
        ),
        rel_pos_bias_init=nn.with_partitioning(
            nn.initializers.zeros_init(), ("model", None, None)
        ),
    )
    variables = layer.init(jax.random.key(0), inputs)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["query"]["kernel"] == PartitionSpec(None, "model", None)
    assert specs["out"]["kernel"] == PartitionSpec("model", None, None)
    assert specs["rel_pos_bias"] == PartitionSpec("model", None, None)
    assert layer.apply(variables, inputs).shape == inputs.shape


def test_output_shardings_on_an_explicit_mesh():
    mesh = one_device_mesh(jax.sharding.AxisType.Explicit)
    layer = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, kernel_size=3, rngs=nnx.Rngs(0)
    )
    inputs = random(0, 2, 5, 6, FEATURES)
    expected = layer(inputs)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(inputs, jax.NamedSharding(mesh, PartitionSpec("data")))
        outputs = layer(
            sharded,
            qkv_sharding=PartitionSpec("data", None, None, "model", None),
            out_sharding=PartitionSpec("data", None, None, None),
        )
    assert jax.typeof(outputs).sharding.spec[0] == "data"
    assert_close(outputs, expected)


# ---- Errors --------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads must be a positive integer, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads .* positive integer, got 2.0"),
        ({"num_heads": True}, TypeError, "num_heads .* got True"),
        ({"num_heads": 3}, ValueError, "multiple of num_heads, got 16 and 3"),
        ({"num_kv_heads": 3}, ValueError, "multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads .* got -1"),
        ({"qkv_features": 10}, ValueError, "qkv_features .* got 10 and 4"),
        ({"out_features": "8"}, TypeError, "out_features .* got '8'"),
        ({"kernel_size": 3}, TypeError, "kernel_size .* got 3: .*Attention2D"),
        ({"kernel_size": ()}, ValueError, r"kernel_size must have 1, 2 or 3.*\(\)"),
        ({"kernel_size": (3,) * 4}, ValueError, "kernel_size must have 1, 2 or 3"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size .* got 0 on axis 1"),
        ({"kernel_size": (3, 2.5)}, TypeError, "kernel_size.* got 2.5"),
        ({"stride": 4}, ValueError, "stride .* got 4 on axis 0"),
        ({"stride": (1, 2, 1)}, ValueError, "stride must be one value or one per grid"),
        ({"dilation": (1, -1)}, ValueError, "dilation .* got -1 on axis 1"),
        ({"is_causal": 1}, TypeError, "is_causal must be a static bool, got 1"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"precision": "exact"}, ValueError, "precision .* got 'exact'"),
        ({"dropout_rate": 1.5}, ValueError, r"dropout_rate .* in \[0, 1\], got 1.5"),
        ({"dropout_rate": None}, TypeError, "dropout_rate must be a number, got None"),
        ({"deterministic_grads": 1}, TypeError, "deterministic_grads .* got 1"),
        ({"kernel_size": (3, 7)}, ValueError, "7 > 6 on axis 1"),
        ({"dilation": 2}, ValueError, "6 > 5 on axis 0"),
    ],
)  # fmt: skip
def test_bad_arguments(api, options, error, message):
    inputs = jnp.zeros((2, 5, 6, FEATURES))
    options = {"num_heads": HEADS, "kernel_size": (3, 3)} | options
    with pytest.raises(error, match=message):
        if api == "nnx":
            jax_na.nnx.NeighborhoodAttention(
                in_features=FEATURES, **options, rngs=nnx.Rngs(0)
            )(inputs)
        else:
            layer = jax_na.linen.NeighborhoodAttention(**options)
            layer.init(jax.random.key(0), inputs)


def test_bad_inputs():
    layer = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, kernel_size=3, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"in_features = 16 .* shape \(5, 6, 8\)"):
        layer(jnp.zeros((5, 6, 8)))
    with pytest.raises(ValueError, match=r"at least 3 axes, got shape \(6, 16\)"):
        layer(jnp.zeros((6, FEATURES)))
    with pytest.raises(TypeError, match=r"frame must be a jax_na\.Frame"):
        layer(jnp.zeros((5, 6, FEATURES)), frame=(5, 6))

    linen_layer = jax_na.linen.NeighborhoodAttention2D(HEADS, kernel_size=3)
    with pytest.raises(ValueError, match=r"at least 3 axes, got shape \(\)"):
        linen_layer.init(jax.random.key(0), jnp.zeros(()))
    with pytest.raises(ValueError, match="must not be empty on the feature axis"):
        linen_layer.init(jax.random.key(0), jnp.zeros((5, 6, 0)))


def test_empty_batch():
    layer = jax_na.nnx.NeighborhoodAttention2D(
        HEADS, FEATURES, kernel_size=3, rngs=nnx.Rngs(0)
    )
    assert layer(jnp.zeros((0, 5, 6, FEATURES))).shape == (0, 5, 6, FEATURES)


def test_flax_is_imported_on_demand_only():
    """``import jax_na`` leaves Flax alone; without Flax the layers say what to do."""
    program = """
import sys
import jax_na
assert "flax" not in sys.modules
sys.modules["flax"] = None  # as if it were not installed
for name in ("nnx", "linen"):
    try:
        __import__(f"jax_na.{name}")
    except ImportError as error:
        assert "pip install flax" in str(error), error
    else:
        raise AssertionError(name)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(jax_na.__file__).parents[1],  # imports the same jax_na
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
