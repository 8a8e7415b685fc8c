"""The main example, cut short; its accuracy is that of the full command."""

from __future__ import annotations

import importlib.util
import pathlib
import struct

import numpy as np
import pytest
from flax import nnx

import jax_na

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def train_digits():
    path = EXAMPLES / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_digits_learns_and_draws(train_digits, tmp_path, capsys):
    output = tmp_path / "digits.png"
    accuracy, losses = train_digits.main(["--epochs", "3", "--output", str(output)])
    assert np.isfinite(losses).all()
    assert losses[0] > 2  # ten classes, nothing learned: about ln 10 = 2.3
    assert np.mean(losses[-10:]) < losses[0] - 0.5
    assert accuracy > 0.5
    assert f"test accuracy {accuracy:.2%} on 360 images" in capsys.readouterr().out

    content = output.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1000
    assert height >= 500


def test_attention_weights_cover_the_window_only(train_digits):
    """What the picture shows sums to one and lies where jax_na says."""
    model = train_digits.Classifier(None, nnx.Rngs(0))
    images = np.random.default_rng(0).random((2, 8, 8), np.float32)
    tokens = model.embed(images)
    for block, window in zip(model.blocks, train_digits.WINDOWS, strict=True):
        weights = np.asarray(block.attention_weights(tokens, window))
        assert weights.shape == (2, 8, 8, 4, 8, 8)
        np.testing.assert_allclose(weights.sum((-2, -1)), 1, rtol=1e-5)
        mask = np.asarray(jax_na.window_mask((8, 8), **window))
        expected = np.broadcast_to(mask[None, :, :, None], weights.shape)
        np.testing.assert_array_equal(weights > 0, expected)
