"""NAT and DiNAT: against the published tables, PyTorch, and their own parts."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_na import models
from jax_na.models import _blocks, _checkpoint, _keys, _resampling

pytestmark = pytest.mark.usefixtures("quick_compile")

# Two small architectures with every feature between them: dilations, an even and an odd
# number of stages, scales, both tokenizers.
SMALL = models.Config(
    8, (2, 1), (1, 2), 3, dilations=((1, 2), (2,)), layer_scale=0.1, drop_path_rate=0.4
)
PATCHES = models.Config(8, (1, 2, 1), (2, 2, 4), 3, mlp_ratio=2.0, tokenizer="patch")
ISOTROPIC = models.Config(
    8, (2,), (2,), 5, ((1, 2),), 4.0, tokenizer="patch", patch_size=8
)


def images_of(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def drawn(make, seed=7):
    """The module that ``make`` makes of keys, with random parameters.

    Drawn by NumPy, since compiling the initialisers takes longer than most tests, and
    so that no bias is zero.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(_checkpoint._OneKey())))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(random.normal(around, 0.2, leaf.shape), leaf.dtype)

    model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))
    model.eval()
    return model


@functools.cache
def classifier(config=SMALL, num_classes=5, **numerics):
    return drawn(
        lambda rngs: models.Classifier(
            config, num_classes, rngs=rngs, keep_rngs=False, **numerics
        )
    )


def backbone(config=SMALL, out_features=None):
    return drawn(
        lambda rngs: models.Backbone(config, out_features, rngs=rngs, keep_rngs=False)
    )


@nnx.jit(static_argnames="return_hidden_states")
def apply(model, images, return_hidden_states=False):
    return model(images, return_hidden_states=return_hidden_states)


# ---- Published tables ----------------------------------------------------------------

# Million parameters, billion operations, and the image size where it is not 224. The
# large DiNAT's count is with the 21,841 classes of ImageNet-22K.
PUBLISHED = {
    "nat_mini": (20, 2.7),
    "nat_tiny": (28, 4.3),
    "nat_small": (51, 7.8),
    "nat_base": (90, 13.7),
    "dinat_mini": (20, 2.7),
    "dinat_tiny": (28, 4.3),
    "dinat_small": (51, 7.8),
    "dinat_base": (90, 13.7),
    "dinat_large": (200, 30.6),
    "dinat_large_384": (200, 89.7, 384),
    "dinat_large_384_11x11": (200, 92.4, 384),
    "dinat_s_tiny": (28, 4.5),
    "dinat_s_small": (50, 8.7),
    "dinat_s_base": (88, 15.4),
    "dinat_s_large": (197, 34.5),
    "dinat_s_large_384": (197, 101.5, 384),
    "nat_isotropic_small": (22, 4.3),
    "nat_isotropic_base": (86, 16.9),
    "dinat_isotropic_small": (22, 4.3),
    "dinat_isotropic_base": (86, 16.9),
    "vit_rpb_small": (22, 4.6),
    "vit_rpb_base": (86, 17.5),
}


def test_every_published_architecture_is_checked():
    assert PUBLISHED.keys() == models.CONFIGS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_and_work(name):
    """Equal to within one unit of the last digit: some were rounded, some cut off."""
    parameters, operations, *size = PUBLISHED[name]
    side = size[0] if size else 224
    classes = 21841 if name == "dinat_large" else 1000
    counted = models.parameter_count(name) / 1e6
    worked = models.flops(name, side, side, classes) / 1e9
    assert parameters - 0.5 < counted < parameters + 1.2
    assert operations - 0.05 < worked < operations + 0.1


@pytest.mark.parametrize("config", [SMALL, PATCHES, ISOTROPIC])
def test_parameter_count_is_that_of_the_model(config):
    leaves = jax.tree.leaves(nnx.state(classifier(config), nnx.Param))
    assert models.parameter_count(config, 5) == sum(leaf.size for leaf in leaves)


def test_published_dilations():
    """Every other block, and never wider than the map of a 224x224 (384x384) image."""
    for name, config in models.CONFIGS.items():
        side = 384 if "384" in name else 224
        for stage, dilations in enumerate(config.dilations):
            assert set(dilations[::2]) == {1}
            if "isotropic" in name or "vit" in name:
                assert max(dilations) * config.kernel_size <= 14
            elif name.startswith("dinat"):
                wanted = max(1, side // 4 // 2**stage // 7)
                if "11x11" in name:
                    wanted = max(1, side // 4 // 2**stage // 11)
                assert set(dilations[1::2]) == {wanted}
            else:
                assert set(dilations) == {1}


# ---- Shapes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "grid", "stem"),
    [
        (SMALL, (33, 50), (9, 13)),  # not square, odd
        (SMALL, (1, 1), (1, 1)),  # every window larger than the map
        (PATCHES, (30, 41), (8, 11)),
        (ISOTROPIC, (24, 41), (3, 6)),
    ],
)
def test_shapes_at_any_size(config, grid, stem):
    logits, hidden = apply(classifier(config), images_of(2, *grid, 3), True)
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()
    stages = len(config.depths)
    sizes = [
        (*(math.ceil(size / 2**i) for size in stem), config.embed_dim * 2**i)
        for i in (0, *range(1, stages), stages - 1)
    ]
    assert [state.shape[1:] for state in hidden] == sizes


def test_batch_axes_are_free():
    model, images = classifier(), images_of(2, 3, 20, 24, 3)
    together = apply(model, images)
    assert together.shape == (2, 3, 5)
    np.testing.assert_allclose(apply(model, images[1, 2]), together[1, 2], atol=1e-5)


def test_small_maps_are_padded_before_the_projections():
    model = classifier()
    block = model.trunk.stages[0].blocks[1]
    tokens = jnp.asarray(images_of(2, 4, 7, 8))
    assert block.window == 6
    padded = jnp.pad(tokens, ((0, 0), (0, 2), (0, 0), (0, 0)))
    expected = block.attention(padded)[:, :4]
    np.testing.assert_allclose(block._attend(tokens), expected, atol=1e-6)


def test_patch_merging_takes_the_rows_first():
    def make(rngs):
        layers = _blocks.Layers(None, jnp.float32, None, None, rngs, False)
        return _resampling.PatchMerging(4, layers)

    merge = drawn(make)
    grid = images_of(1, 3, 5, 4)
    filled = np.pad(grid, ((0, 0), (0, 1), (0, 1), (0, 0)))
    four = np.concatenate(
        [filled[:, y::2, x::2] for y, x in ((0, 0), (1, 0), (0, 1), (1, 1))], axis=-1
    )
    np.testing.assert_allclose(
        merge(grid), merge.reduction(merge.norm(four)), atol=1e-6
    )


# ---- Training ------------------------------------------------------------------------


def test_stochastic_depth_rises_to_its_rate():
    config = models.Config(8, (2, 3), (1, 1), drop_path_rate=0.4)
    rates = np.concatenate(config.drop_path_rates)
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, 5))


def test_stochastic_depth_drops_branches_of_whole_samples():
    """Each sample's map is one of four: both branches, either, or none."""

    def make(rngs):
        layers = _blocks.Layers(None, jnp.float32, None, None, rngs, False)
        rates = {"layer_scale": None, "drop_path_rate": 0.5}
        return _blocks.Block(8, 2, 3, 1, mlp_ratio=2, layers=layers, **rates)

    block = drawn(make)
    block.train()
    tokens = jnp.asarray(np.tile(images_of(1, 4, 4, 8), (64, 1, 1, 1)))
    dropped = block(tokens, deterministic=None, rngs=nnx.Rngs(dropout=3))
    again = block(tokens, deterministic=None, rngs=nnx.Rngs(dropout=3))
    np.testing.assert_array_equal(dropped, again)
    found = {np.asarray(sample).tobytes() for sample in dropped}
    assert len(found) == 4
    assert np.asarray(tokens[0]).tobytes() in found
    whole = block(tokens, deterministic=True, rngs=None)
    assert np.asarray(whole[0]).tobytes() not in found  # those kept count double


def test_mode_and_keys_of_stochastic_depth():
    model = models.Classifier(SMALL, 5, rngs=nnx.Rngs(0))
    images, key = images_of(4, 24, 24, 3), jax.random.key(1)
    draw = nnx.jit(lambda model, key: model(images, rngs=key))
    np.testing.assert_array_equal(draw(model, key), draw(model, key))
    assert not np.array_equal(draw(model, key), draw(model, jax.random.key(2)))
    step = nnx.jit(lambda model: model(images))
    assert not np.array_equal(step(model), step(model))  # its own streams move on
    model.eval()
    np.testing.assert_array_equal(step(model), step(model))

    keyless = classifier()
    with pytest.raises(ValueError, match="rngs"):
        keyless(images, deterministic=False)


def test_every_parameter_learns():
    model, images = classifier(), images_of(8, 24, 20, 3)

    @nnx.jit
    def gradients(model):
        def loss(model):
            labels = jnp.arange(8) % 5
            return optax.softmax_cross_entropy_with_integer_labels(
                model(images), labels
            ).mean()

        return nnx.grad(loss)(model)

    for path, leaf in nnx.to_flat_state(gradients(model)):
        assert np.isfinite(leaf[...]).all(), path
        # Softmax does not see what it adds to all scores of a query.
        assert np.abs(leaf[...]).max() > 0 or path[-2:] == ("key", "bias"), path


# ---- Numerics ------------------------------------------------------------------------


def test_half_precision_keeps_parameters_in_float32():
    images = images_of(2, 24, 20, 3)
    model = classifier(dtype=jnp.bfloat16)
    logits = apply(model, images)
    assert logits.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    np.testing.assert_allclose(logits, apply(classifier(), images), atol=0.2)


def test_implementations_agree():
    images = images_of(2, 24, 20, 3)
    expected = apply(classifier(implementation="xla"), images)
    np.testing.assert_allclose(apply(classifier(), images), expected, atol=1e-5)


# ---- Backbones -----------------------------------------------------------------------


def test_backbone_gives_normalised_maps_before_halving():
    model, images = backbone(), images_of(2, 32, 24, 3)
    maps = nnx.jit(lambda model, images: model(images))(model, images)
    assert {name: m.shape for name, m in maps.items()} == {
        "stage1": (2, 8, 6, 8),
        "stage2": (2, 4, 3, 16),
    }
    features = nnx.jit(
        lambda trunk, images: trunk(images, deterministic=True, rngs=None)
    )(model.trunk, images)
    for name, stage in zip(("stage1", "stage2"), features.stages, strict=True):
        np.testing.assert_allclose(
            maps[name], model.norms[name](stage), atol=1e-5, rtol=1e-5
        )


def test_backbone_maps_come_in_the_order_of_the_stages():
    model = backbone(SMALL, ["stage2", "stem"])
    assert model.out_features == ("stem", "stage2")
    assert model.norms["stem"].num_features == 8
    assert model.norms["stage2"].num_features == 16


# ---- Bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (images_of(8, 8), ValueError, "at least 3 axes, got shape (8, 8)"),
        (images_of(2, 3, 8, 8), ValueError, "3 channels on the last axis"),
        (images_of(2, 0, 8, 3), ValueError, "must not be empty"),
        (np.zeros((2, 8, 8, 3), np.uint8), TypeError, "floating-point"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=re.escape(message)):
        classifier()(images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.Config(8, (), ()), "at least one stage"),
        (lambda: models.Config(8, (1, 0), (1, 1)), "at least one block"),
        (lambda: models.Config(8, (1, 1), (1,)), "num_heads must have one entry"),
        (lambda: models.Config(8, (1, 2), (1, 1), dilations=((1,), (1,))), "dilations"),
        (lambda: models.Config(8, (1,), (3,)), "multiple of its num_heads"),
        (lambda: models.Config(8, (1,), (1,), tokenizer="conv"), "tokenizer"),
        (lambda: models.Config(9, (1,), (1,)), "even embed_dim"),
        (lambda: models.Config(8, (1,), (1,), patch_size=2), "patch_size 4"),
        (lambda: models.Classifier("nat_huge", rngs=nnx.Rngs(0)), "nat_mini, nat_tiny"),
        (lambda: models.Classifier(SMALL, 0, rngs=nnx.Rngs(0)), "num_classes"),
        (
            lambda: models.Classifier(SMALL, rngs=nnx.Rngs(0), implementation="cudnn"),
            "implementation must be",
        ),
        (lambda: models.Backbone(SMALL, ["stage3"], rngs=nnx.Rngs(0)), "stage3"),
        (lambda: models.Backbone(SMALL, "stage1", rngs=nnx.Rngs(0)), "a sequence"),
        (lambda: models.Config.from_hf({"model_type": "swin"}), "'swin'"),
        (
            lambda: models.Config.from_hf({"model_type": "nat", "hidden_act": "relu"}),
            "hidden_act",
        ),
        (lambda: PATCHES.to_hf(), "overlapping"),
    ],
)
def test_bad_architectures(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_architectures_of_the_wrong_type():
    with pytest.raises(TypeError, match="config"):
        models.Classifier(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="num_classes"):
        models.Classifier(SMALL, 2.5, rngs=nnx.Rngs(0))


# ---- Checkpoints ---------------------------------------------------------------------


def assert_same_parameters(actual, expected):
    actual, expected = (nnx.state(model, nnx.Param) for model in (actual, expected))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def model_of(config, kind):
    if kind == "backbone":
        return backbone(config)
    return classifier(config, 5 if kind == "head" else None)


@pytest.mark.parametrize("kind", ["head", "headless", "backbone"])
@pytest.mark.parametrize("config", [SMALL, PATCHES, ISOTROPIC])
def test_original_layout_round_trip(config, kind):
    model = model_of(config, kind)
    loaded = models.from_pretrained(models.to_original_state_dict(model), config)
    assert type(loaded) is type(model)
    assert_same_parameters(loaded, model)


@pytest.mark.parametrize("kind", ["head", "headless", "backbone"])
def test_hf_layout_round_trip(kind):
    model = model_of(SMALL, kind)
    loaded = models.from_pretrained(models.to_hf_state_dict(model), SMALL)
    assert type(loaded) is type(model)
    assert_same_parameters(loaded, model)
    config = {"model_type": "dinat", **SMALL.to_hf()}
    assert models.Config.from_hf(config) == SMALL


def test_loaded_models_compute_the_same_and_are_in_evaluation_mode():
    model, images = classifier(), images_of(2, 24, 20, 3)
    loaded = models.from_pretrained(models.to_hf_state_dict(model), SMALL)
    np.testing.assert_array_equal(apply(loaded, images), apply(model, images))


def test_original_layout_packs_query_key_and_value():
    model = classifier()
    attention = model.trunk.stages[1].blocks[0].attention
    packed = models.to_original_state_dict(model)["levels.1.blocks.0.attn.qkv.weight"]
    tokens = images_of(3, 16)
    three = (tokens @ packed.T).reshape(3, 3, 2, 8)
    for index, part in enumerate((attention.query, attention.key, attention.value)):
        expected = part(tokens) - part.bias[...]
        np.testing.assert_allclose(three[:, index], expected, atol=1e-5)


def test_what_training_wraps_around_a_state_is_taken_off():
    model = classifier(ISOTROPIC)
    state = models.to_original_state_dict(model)
    wrapped = {f"module.{key}": value for key, value in state.items()}
    wrapped["module.layers.0.attn.relative_position_index"] = np.zeros((4, 4), int)
    for wrapper in ("model", "state_dict"):
        content = {"epoch": 3, wrapper: wrapped}
        assert_same_parameters(models.from_pretrained(content, ISOTROPIC), model)


def test_parameter_dtype_of_a_loaded_model():
    state = models.to_hf_state_dict(classifier())
    model = models.from_pretrained(state, SMALL, param_dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_a_wrong_checkpoint_is_told_by_its_keys_and_shapes():
    state = models.to_hf_state_dict(classifier())
    del state["dinat.layernorm.bias"]
    state["dinat.layernorm.offset"] = np.zeros(16)
    state["classifier.bias"] = np.zeros(7)
    with pytest.raises(models.CheckpointError) as caught:
        models.from_pretrained(state, SMALL)
    error = caught.value
    assert error.missing == ["dinat.layernorm.bias"]
    assert error.unexpected == ["dinat.layernorm.offset"]
    assert error.misshapen == {"classifier.bias": ((7,), (5,))}
    text = str(error)
    assert "nothing was loaded" in text
    assert "1 missing:\n  dinat.layernorm.bias" in text
    assert "1 unexpected:\n  dinat.layernorm.offset" in text
    assert "1 misshapen:\n  classifier.bias (7,), wanted (5,)" in text


def test_a_checkpoint_of_another_architecture():
    state = models.to_hf_state_dict(classifier())
    with pytest.raises(models.CheckpointError) as caught:
        models.from_pretrained(state, "nat_mini")
    assert len(caught.value.missing) > 10
    assert re.search(r"and \d+ more", str(caught.value))
    with pytest.raises(ValueError, match=r"none of a NAT or DiNAT.*vit\.cls_token"):
        models.from_pretrained({"vit.cls_token": np.zeros((1, 1, 8))}, "nat_mini")
    with pytest.raises(ValueError, match="none of a NAT or DiNAT"):
        models.from_pretrained({}, "nat_mini")
    with pytest.raises(TypeError, match="map strings to arrays"):
        models.from_pretrained({"head.weight": 3.0}, "nat_mini")


def state_of(name, prefix="dinat.", original=False, **changes):
    """Zeros of the shapes of a published checkpoint, without the memory."""
    config = dataclasses.replace(models.CONFIGS[name], **changes)
    layout = "original" if original else "hf"
    contents = _keys.Contents(True, ())
    nature = _keys.Nature(layout, prefix, contents, 1000)
    model = nnx.eval_shape(lambda: _checkpoint._build(config, nature, {}))
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    tensors = _keys.tensors(layout, config, contents, "" if original else prefix)
    shapes = _checkpoint._shapes(tensors, parameters)
    zero = np.zeros((), np.float32)
    return {key: np.broadcast_to(zero, shape) for key, shape in shapes.items()}


def test_architecture_without_a_configuration():
    """Shapes tell all but the dilations; these are known where one model only fits."""
    config = models.CONFIGS["nat_mini"]
    loaded = models.from_pretrained(state_of("nat_mini", "nat."))
    assert loaded.config == dataclasses.replace(config, drop_path_rate=0.0)
    loaded = models.from_pretrained(state_of("dinat_s_tiny", original=True))
    assert loaded.config == models.CONFIGS["dinat_s_tiny"]
    with pytest.raises(ValueError, match="fit each of nat_mini, dinat_mini"):
        models.from_pretrained(state_of("nat_mini", original=True))
    with pytest.raises(ValueError, match="fit no published architecture, but Config"):
        models.from_pretrained(models.to_hf_state_dict(classifier()))


def test_what_other_layouts_lack():
    with pytest.raises(ValueError, match="tokenizer"):
        models.to_hf_state_dict(classifier(PATCHES))
    with pytest.raises(ValueError, match="no dilations"):
        models.to_hf_state_dict(classifier(), "nat")
    with pytest.raises(ValueError, match="model_type"):
        models.to_hf_state_dict(classifier(), "swin")
    with pytest.raises(ValueError, match="stem"):
        models.to_original_state_dict(backbone(SMALL, ["stem"]))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        models.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        models.from_pretrained(tmp_path)


def test_safetensors_folder(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model = classifier()
    state = models.to_hf_state_dict(model)
    half = len(state) // 2
    parts = dict(list(state.items())[:half]), dict(list(state.items())[half:])
    for index, part in enumerate(parts):
        safetensors.save_file(part, tmp_path / f"model-{index}.safetensors")
    config = {"model_type": "dinat", **SMALL.to_hf()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_parameters(models.from_pretrained(tmp_path), model)

    safetensors.save_file(state, tmp_path / "whole.safetensors")
    assert_same_parameters(
        models.from_pretrained(tmp_path / "whole.safetensors"), model
    )


def test_safetensors_in_bfloat16(tmp_path):
    safetensors = pytest.importorskip("safetensors.flax")
    state = models.to_hf_state_dict(classifier())
    state = {key: jnp.asarray(value, jnp.bfloat16) for key, value in state.items()}
    safetensors.save_file(state, tmp_path / "model.safetensors")
    loaded = models.from_pretrained(tmp_path / "model.safetensors", SMALL)
    back = models.to_hf_state_dict(loaded)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], np.asarray(value, np.float32))


# ---- Against transformers ------------------------------------------------------------


@pytest.fixture(scope="module")
def dinat():
    """The DiNAT module of ``transformers``, and with it PyTorch."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if not (4, 46) <= version <= (4, 51):
        pytest.skip(f"transformers {transformers.__version__} cannot run DiNAT")
    reference = importlib.import_module("torch_reference")
    with reference.natten_installed() as module:
        yield module


def reference_model(dinat, kind="DinatForImageClassification", seed=0, **config):
    """A PyTorch model with every parameter drawn at random."""
    import torch

    defaults = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 3}
    config = dinat.DinatConfig(
        **defaults | {"dilations": [[1, 2], [2]], "num_labels": 5} | config
    )
    model = getattr(dinat, kind)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith("rpb") else 0.2
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + scale * noise)
    return model


def torch_images(images):
    import torch

    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def load(reference, **numerics):
    return models.from_pretrained(
        reference.state_dict(),
        models.Config.from_hf(reference.config.to_dict()),
        **numerics,
    )


CONFIGURATIONS = {
    "dilated": ({}, (40, 52)),
    "three stages, scales": (
        {
            "depths": [1, 2, 1],
            "num_heads": [2, 2, 4],
            "dilations": [[3], [1, 2], [1]],
            "layer_scale_init_value": 0.3,
            "mlp_ratio": 2.0,
        },
        (45, 64),
    ),
    "7x7 windows larger than the maps": (
        {"kernel_size": 7, "dilations": [[1, 2], [1]]},
        (33, 24),
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_logits_hidden_states_and_gradients_of_transformers(dinat, case):
    import torch

    config, size = CONFIGURATIONS[case]
    reference = reference_model(dinat, **config)
    images, labels = images_of(2, *size, 3), np.array([1, 4])
    outputs = reference(
        torch_images(images), torch.from_numpy(labels), output_hidden_states=True
    )
    outputs.loss.backward()

    @nnx.jit
    def run(model, images):
        def loss(model):
            logits, hidden = model(images, return_hidden_states=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), (logits, hidden)

        return nnx.value_and_grad(loss, has_aux=True)(model)

    model = load(reference)
    (loss, (logits, hidden)), gradients = run(model, images)
    close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
    close(loss, outputs.loss.item())
    close(logits, outputs.logits.detach().numpy())
    assert len(hidden) == len(outputs.hidden_states)
    for actual, expected in zip(hidden, outputs.hidden_states, strict=True):
        close(actual, expected.detach().numpy())

    # The gradients under PyTorch's names: a model that has them as parameters.
    nnx.update(model, gradients)
    named = models.to_hf_state_dict(model)
    for name, parameter in reference.named_parameters():
        close(named[name], parameter.grad.numpy(), err_msg=name)


def test_model_without_head_of_transformers(dinat):
    reference, images = reference_model(dinat, "DinatModel"), images_of(2, 32, 28, 3)
    model = load(reference)
    assert model.head is None
    pooled = reference(torch_images(images)).pooler_output.detach().numpy()
    np.testing.assert_allclose(apply(model, images), pooled, atol=1e-4)


@pytest.mark.parametrize("names", [["stage1", "stage2"], ["stem", "stage2"]])
def test_backbone_of_transformers(dinat, names):
    reference = reference_model(dinat, "DinatBackbone", out_features=names)
    images = images_of(2, 32, 28, 3)
    maps = nnx.jit(lambda model, images: model(images))(load(reference), images)
    assert maps.keys() == set(names)
    expected = reference(torch_images(images)).feature_maps
    for name, wanted in zip(names, expected, strict=True):
        wanted = np.moveaxis(wanted.detach().numpy(), 1, -1)
        np.testing.assert_allclose(maps[name], wanted, atol=1e-4)


def test_transformers_loads_what_was_written(dinat):
    import torch

    model, images = classifier(), images_of(2, 24, 20, 3)
    config = dinat.DinatConfig(**SMALL.to_hf(), num_labels=5)
    reference = dinat.DinatForImageClassification(config).eval()
    state = models.to_hf_state_dict(model)
    reference.load_state_dict(
        {key: torch.from_numpy(value) for key, value in state.items()}, strict=True
    )
    logits = reference(torch_images(images)).logits.detach().numpy()
    np.testing.assert_allclose(apply(model, images), logits, atol=1e-4)


@pytest.mark.parametrize("safe", [True, False])
def test_folders_that_transformers_writes(dinat, tmp_path, safe):
    import torch

    reference = reference_model(dinat)
    reference.save_pretrained(tmp_path, safe_serialization=safe)
    if not safe:
        content = {"state_dict": reference.bfloat16().state_dict()}
        torch.save(content, tmp_path / "pytorch_model.bin")
    model = models.from_pretrained(tmp_path)
    assert model.config.dilations == ((1, 2), (2,))
    named = models.to_hf_state_dict(model)
    for name, parameter in reference.named_parameters():
        np.testing.assert_array_equal(named[name], parameter.detach().float().numpy())


def test_nat_of_transformers(dinat):
    nat = importlib.import_module("transformers.models.deprecated.nat.modeling_nat")
    config = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 5}
    config = nat.NatConfig(**config, num_labels=5)
    reference = nat.NatForImageClassification(config).eval()
    model = load(reference)
    assert model.config.dilations == ((1, 1), (1,))
    wanted = reference.state_dict()
    written = models.to_hf_state_dict(model, "nat")
    assert written.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(written[name], value.numpy())
