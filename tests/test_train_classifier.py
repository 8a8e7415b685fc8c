"""The training example, cut short: its accuracy is that of the full command."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image

from jax_na import models

PATH = pathlib.Path(__file__).parent.parent / "examples" / "train_classifier.py"
DEVICES = min(2, jax.device_count())
ARGUMENTS = ["--epochs", "3", "--batch", "128", "--save-every", "4"]
ARGUMENTS += ["--devices", str(DEVICES)]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_classifier", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def whole_run(example, tmp_path_factory):
    """The output folder of a run without interruption, on two fake devices."""
    output = tmp_path_factory.mktemp("whole")
    example.main([*ARGUMENTS, "--output", str(output)])
    return output


def test_learns_and_draws(whole_run):
    metrics = metrics_of(whole_run)
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert [line["step"] for line in metrics] == [11, 22, 33]
    losses = [line["train_loss"] for line in metrics]
    assert losses == sorted(losses, reverse=True)
    assert metrics[-1]["test_accuracy"] > 0.25  # ten classes
    assert (whole_run / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_after_a_kill_as_if_nothing_had_happened(example, whole_run, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    command = [sys.executable, str(PATH), *ARGUMENTS, "--output", str(tmp_path)]
    environment = {"JAX_NUM_CPU_DEVICES": "2"}
    process = subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.PIPE
    )
    # In the second epoch, with a checkpoint of the first or of the middle of this one.
    while not any(checkpoints.glob("1[26]")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkpoints / "33").exists()

    example.main([*ARGUMENTS, "--output", str(tmp_path)])
    for line, expected in zip(metrics_of(tmp_path), metrics_of(whole_run), strict=True):
        del line["images_per_second"], expected["images_per_second"]
        assert line == expected
    states = [
        ocp.StandardCheckpointer().restore(folder / "checkpoints" / "33" / "default")
        for folder in (tmp_path, whole_run)
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_number_of_devices_changes_rounding_only(example, whole_run, tmp_path):
    example.main([*ARGUMENTS, "--devices", "1", "--output", str(tmp_path)])
    for line, expected in zip(metrics_of(tmp_path), metrics_of(whole_run), strict=True):
        assert abs(line["train_loss"] - expected["train_loss"]) < 1e-2


@pytest.mark.skipif(jax.device_count() < 2, reason="one device alone")
def test_batches_that_do_not_split(example, tmp_path):
    with pytest.raises(SystemExit, match="multiple of the 2 devices"):
        example.main([*ARGUMENTS, "--batch", "129", "--output", str(tmp_path)])


@pytest.mark.parametrize("count", [0, 1000])
def test_devices_that_there_are_not(example, tmp_path, count):
    with pytest.raises(SystemExit, match=f"--devices must be 1 to .* got {count}"):
        example.main([*ARGUMENTS, "--devices", str(count), "--output", str(tmp_path)])


def test_batches_larger_than_the_data(example, tmp_path):
    with pytest.raises(SystemExit, match="at most"):
        example.main([*ARGUMENTS, "--batch", "4000", "--output", str(tmp_path)])


# ---- Image folders -------------------------------------------------------------------


def save_images(folder, count, color):
    folder.mkdir(parents=True)
    random = np.random.default_rng(count)
    for index in range(count):
        pixels = random.integers(0, 100, (20, 30 + index, 3), np.uint8)
        pixels[..., color] += 120
        Image.fromarray(pixels).save(folder / f"{index}.png")


def test_image_folder_is_split(example, tmp_path):
    for color, name in enumerate(("red", "green")):
        save_images(tmp_path / name, 10, color)
    data = example.image_folder(tmp_path, 16, 0)
    assert data.classes == ["green", "red"]
    assert sorted(data.test.labels) == [0, 0, 1, 1]
    assert len(data.train.labels) == 16
    images = data.train.load(np.arange(16))
    assert images.shape == (16, 16, 16, 3)
    assert images.dtype == np.uint8
    brightest = images.mean((1, 2)).argmax(-1)
    np.testing.assert_array_equal(brightest, np.where(data.train.labels == 0, 1, 0))


def test_image_folder_with_its_own_split(example, tmp_path):
    for color, name in enumerate(("red", "green")):
        save_images(tmp_path / "train" / name, 4, color)
        save_images(tmp_path / "val" / name, 3, color)
    data = example.image_folder(tmp_path, 16, 0)
    assert (len(data.train.labels), len(data.test.labels)) == (8, 6)


@pytest.mark.parametrize("names", [(), ("one",)])
def test_folder_without_classes(example, tmp_path, names):
    for name in names:
        save_images(tmp_path / name, 2, 0)
    with pytest.raises(SystemExit, match="a subfolder of images per class"):
        example.image_folder(tmp_path, 16, 0)


def test_trains_on_an_image_folder_in_half_precision(example, tmp_path):
    for color, name in enumerate(("red", "green")):
        save_images(tmp_path / name, 20, color)
    data = example.image_folder(tmp_path, 16, 0)
    config = models.Config(8, (1, 1), (1, 2), kernel_size=3, drop_path_rate=0.1)
    model = models.Classifier(
        config, 2, rngs=nnx.Rngs(0), keep_rngs=False, dtype=jnp.bfloat16
    )
    args = argparse.Namespace(
        batch=16, seed=0, epochs=15, learning_rate=1e-2, devices=1
    )
    trainer = example.Trainer(model, data, args)
    state = trainer.fit(trainer.initial, args.epochs, tmp_path, every=100)
    assert trainer.accuracy(trainer.predictions(state.average)) == 1.0
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_distortion_keeps_the_range_and_mirrors(example):
    image = np.zeros((8, 8, 1), np.float32)
    image[:, :3] = 1.0
    keys = jax.random.split(jax.random.key(0), 64)
    images = example.distorted(keys, jnp.tile(image, (64, 1, 1, 1)), True)
    assert 0 <= images.min() <= images.max() <= 1 + 1e-5
    left = np.asarray(
        images[:, :, :2].mean((1, 2, 3)) > images[:, :, -2:].mean((1, 2, 3))
    )
    assert 16 < left.sum() < 48
