"""Train a neighborhood-attention image classifier: handwritten digits, or your images.

    python examples/train_classifier.py
    python examples/train_classifier.py --data photos --model dinat_mini --epochs 100

Without ``--data`` the images are the 1,797 real digits of scikit-learn, at 32x32
pixels, and training takes a minute or two on a laptop. A folder of images has one
subfolder per class, or ``train`` and ``test`` (or ``val``) with one per class each.
Training runs on all local devices, splitting every batch. Killed and started again with
the same arguments, it goes on from the last checkpoint, and ends as if it had never
stopped.

Writes to the output folder: ``metrics.jsonl``, ``checkpoints``, and ``picture.png``
with test images, predictions and attention. Needs jax_na, flax, optax,
orbax-checkpoint, scikit-learn, matplotlib, pillow and tqdm.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_na
from jax_na import models

# A small DiNAT for images of 32x32 pixels, which are 8x8 tokens, then 4x4.
DIGITS = models.Config(
    embed_dim=32,
    depths=(2, 2),
    num_heads=(2, 4),
    kernel_size=3,
    dilations=((1, 2), (1, 1)),
    mlp_ratio=2.0,
    num_channels=1,
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
EMA_DECAY = 0.999


# ---- Data ----------------------------------------------------------------------------


class Split(NamedTuple):
    """Images to train or test with.

    Attributes:
        load: from indices to images ``[batch, height, width, channels]``, uint8.
        labels: ``[images]``.
    """

    load: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray


class Data(NamedTuple):
    """What to learn; ``mean`` and ``deviation`` are those of the channels, of 255."""

    train: Split
    test: Split
    classes: list[str]
    mean: list[float]
    deviation: list[float]
    flip: bool


def digits(seed: int) -> Data:
    content = load_digits()
    pixels = np.round(content.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image).resize((32, 32)) for image in pixels]
    images = np.stack(images)[..., None]
    *images, train_labels, test_labels = train_test_split(
        images,
        content.target,
        test_size=0.2,
        stratify=content.target,
        random_state=seed,
    )
    train, test = (array.__getitem__ for array in images)
    return Data(
        train=Split(train, train_labels),
        test=Split(test, test_labels),
        classes=[str(name) for name in content.target_names],
        mean=[78.0],
        deviation=[96.0],
        flip=False,
    )


def image_folder(path: pathlib.Path, size: int, seed: int) -> Data:
    folders = {folder.name: folder for folder in path.iterdir() if folder.is_dir()}
    tests = [folders[name] for name in ("test", "val") if name in folders]
    if "train" in folders and tests:
        classes = _class_names(folders["train"])
        train, test = (_files(f, classes) for f in (folders["train"], tests[0]))
    else:
        classes = _class_names(path)
        files, labels = _files(path, classes)
        *files, train_labels, test_labels = train_test_split(
            files, labels, test_size=0.2, stratify=labels, random_state=seed
        )
        train, test = (files[0], train_labels), (files[1], test_labels)
    splits = [
        Split(functools.partial(_load, files, size), np.asarray(labels))
        for files, labels in (train, test)
    ]
    mean, deviation = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # ImageNet's
    return Data(*splits, classes, mean, deviation, flip=True)


def _class_names(folder: pathlib.Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise SystemExit(f"{folder} must have a subfolder of images per class")
    return classes


def _files(folder: pathlib.Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (str(file), label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not pairs:
        raise SystemExit(f"{folder} has no images in its subfolders")
    files, labels = zip(*pairs, strict=True)
    return np.array(files), np.array(labels)


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(16)


def _load(files: np.ndarray, size: int, indices: np.ndarray) -> np.ndarray:
    """The largest centred square of each image, resized."""

    def decode(file: str) -> np.ndarray:
        with Image.open(file) as image:
            image = image.convert("RGB")
        side = min(image.size)
        left, top = ((extent - side) // 2 for extent in image.size)
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))

    return np.stack(list(_decoders().map(decode, files[indices])))


def prefetched(
    split: Split, batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each batch, loaded while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(split.load, batch) for batch in batches[:1]]
        for index, batch in enumerate(batches):
            coming += [
                pool.submit(split.load, b) for b in batches[index + 1 : index + 2]
            ]
            yield coming.pop(0).result(), split.labels[batch]


def normalised(images: jax.Array, data: Data) -> jax.Array:
    mean, deviation = jnp.array(data.mean), jnp.array(data.deviation)
    return (images.astype(jnp.float32) - mean) / deviation


@functools.partial(jax.vmap, in_axes=(0, 0, None))
def distorted(key: jax.Array, image: jax.Array, flip: bool) -> jax.Array:
    """The image turned, scaled, sheared and shifted at random, perhaps mirrored."""
    key, mirror = jax.random.split(key)
    turn, scale, shear, *shift = jax.random.uniform(key, (5,), minval=-1)
    cos, sin = jnp.cos(0.2 * turn), jnp.sin(0.2 * turn)
    matrix = jnp.array([[cos, -sin], [sin, cos + 0.15 * shear]]) * (1 + 0.12 * scale)
    size = jnp.array(image.shape[:2], jnp.float32)[:, None, None]
    pixels = jnp.indices(image.shape[:2], jnp.float32) - (size - 1) / 2
    source = jnp.einsum("ij,jhw->ihw", matrix, pixels) + (size - 1) / 2
    source += 0.06 * size * jnp.array(shift)[:, None, None]
    if flip:
        across = jnp.where(jax.random.bernoulli(mirror), source[1], size[1] - source[1])
        source = source.at[1].set(across)
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, order=1, mode="nearest"
    )
    return jax.vmap(sample, (2, None), 2)(image, list(source))


# ---- Training ------------------------------------------------------------------------


class State(NamedTuple):
    """All that a step reads and writes, and a checkpoint holds.

    Attributes:
        step: number of steps taken.
        loss_sum: of the losses of the epoch so far.
        params: the model's parameters.
        average: their exponential moving average, which is tested.
        optimizer: the optimizer's own state.
    """

    step: jax.Array
    loss_sum: jax.Array
    params: Any
    average: Any
    optimizer: Any


class Trainer:
    """A model, its optimizer, and the compiled steps on a mesh of local devices."""

    def __init__(self, model: models.Classifier, data: Data, args: argparse.Namespace):
        self.data, self.batch, self.seed = data, args.batch, args.seed
        self.steps_per_epoch = len(data.train.labels) // args.batch
        if not self.steps_per_epoch:
            raise SystemExit(
                f"--batch must be at most the {len(data.train.labels)} training images"
            )
        self.schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            args.learning_rate,
            warmup_steps=max(1, args.epochs * self.steps_per_epoch // 20),
            decay_steps=args.epochs * self.steps_per_epoch + 1,
        )
        # Only kernels decay: not norms, biases, scales and positional biases.
        self.adamw = optax.adamw(
            self.schedule,
            weight_decay=0.05,
            mask=lambda params: jax.tree.map_with_path(
                lambda path, _: "kernel" in jax.tree_util.keystr(path), params
            ),
        )
        devices = jax.devices()
        if args.devices is not None:
            if not 1 <= args.devices <= len(devices):
                raise SystemExit(
                    f"--devices must be 1 to {len(devices)}, what there is here, "
                    f"got {args.devices}"
                )
            devices = devices[: args.devices]
        if args.batch % len(devices):
            raise SystemExit(
                f"--batch must be a multiple of the {len(devices)} devices"
            )
        mesh = jax.make_mesh(
            (len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,)
        )
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))
        self.graph, params = nnx.split(model)
        self.initial = jax.jit(self._initial, out_shardings=self.replicated)(params)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.predict = jax.jit(self._predict)

    def _initial(self, params: Any) -> State:
        zero = jnp.zeros((), jnp.int32)
        return State(zero, jnp.zeros(()), params, params, self.adamw.init(params))

    def _step(self, state: State, images: jax.Array, labels: jax.Array) -> State:
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        distort_key, drop_key = jax.random.split(key)
        images = normalised(images, self.data)
        keys = jax.random.split(distort_key, len(images))
        images = distorted(keys, images, self.data.flip)
        targets = jax.nn.one_hot(labels, len(self.data.classes))
        targets = optax.smooth_labels(targets, 0.1)

        def loss_of(params: Any) -> jax.Array:
            model = nnx.merge(self.graph, params)
            logits = model(images, deterministic=False, rngs=drop_key)
            logits = logits.astype(jnp.float32)
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, optimizer = self.adamw.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Young averages forget faster, or they would remember the initial weights.
        decay = jnp.minimum(EMA_DECAY, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        first = state.step % self.steps_per_epoch == 0
        loss_sum = jnp.where(first, 0.0, state.loss_sum) + loss
        return State(state.step + 1, loss_sum, params, average, optimizer)

    def _predict(self, params: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(self.graph, params)
        return model(normalised(images, self.data), deterministic=True).argmax(-1)

    def batches_of(self, epoch: int) -> np.ndarray:
        """Indices ``[steps, batch]`` of the training images of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.data.train.labels))
        return order[: self.steps_per_epoch * self.batch].reshape(-1, self.batch)

    def predictions(self, params: Any) -> np.ndarray:
        """The class of every test image."""
        count, found = len(self.data.test.labels), []
        # Whole batches only, which split over the devices: the last is filled up.
        indices = np.minimum(np.arange(-(-count // self.batch) * self.batch), count - 1)
        for images, _ in prefetched(self.data.test, indices.reshape(-1, self.batch)):
            found.append(self.predict(params, jax.device_put(images, self.split)))
        return np.concatenate(found)[:count]

    def fit(self, state: State, epochs: int, output: pathlib.Path, every: int) -> State:
        """Trains from ``state`` on, with checkpoints and metrics of every epoch."""
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        directory = (output / "checkpoints").absolute()
        metrics = Metrics(output / "metrics.jsonl")
        with ocp.CheckpointManager(directory, options=options) as checkpoints:
            latest = checkpoints.latest_step()
            if latest is not None:
                restore = ocp.args.StandardRestore(state)
                state = checkpoints.restore(latest, args=restore)
            start, total = int(state.step), epochs * self.steps_per_epoch
            metrics.forget_after(start)
            progress = tqdm(total=total, initial=start, unit="step", desc="training")
            for epoch in range(start // self.steps_per_epoch, epochs):
                began = time.monotonic()
                done = int(state.step) - epoch * self.steps_per_epoch
                batches = list(self.batches_of(epoch)[done:])
                for images, labels in prefetched(self.data.train, batches):
                    shards = jax.device_put((images, labels), self.split)
                    state = self.step(state, *shards)
                    progress.update()
                    if progress.n % every == 0 or progress.n == total:
                        checkpoints.save(progress.n, args=ocp.args.StandardSave(state))
                accuracy = self.accuracy(self.predictions(state.average))
                rate = len(batches) * self.batch / (time.monotonic() - began)
                line = metrics.add(
                    step=int(state.step),
                    epoch=epoch + 1,
                    train_loss=float(state.loss_sum) / self.steps_per_epoch,
                    test_accuracy=accuracy,
                    learning_rate=float(self.schedule(int(state.step) - 1)),
                    images_per_second=rate,
                )
                progress.set_postfix(
                    loss=f"{line['train_loss']:.3f}", accuracy=f"{accuracy:.2%}"
                )
            progress.close()
        return state

    def accuracy(self, predictions: np.ndarray) -> float:
        return float(np.mean(predictions == self.data.test.labels))


class Metrics:
    """A file with one line of JSON per epoch."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that are about to be taken again."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(kept))

    def add(self, **values: float) -> dict[str, float]:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        return values


# ---- Picture -------------------------------------------------------------------------


def attention_maps(
    model: models.Classifier, images: jax.Array
) -> list[tuple[str, np.ndarray]]:
    """A title and weights ``[batch, *grid, *grid]``, query then key, per block.

    Of the first stage's blocks whose windows fit the map, and the mean of their heads.
    What a query's window does not hold is NaN.
    """
    maps, tokens = [], model.trunk.tokenizer(images)
    grid = tokens.shape[1:3]
    for block in model.trunk.stages[0].blocks:
        if block.window > min(grid):
            break
        layer, problem = block.attention, block.attention.problem
        window = {"kernel_size": problem.kernel_size, "dilation": problem.dilation}
        normed = block.attention_norm(tokens)
        scores = jax_na.na_qk(
            layer.query(normed),
            layer.key(normed),
            rel_pos_bias=layer.rel_pos_bias[...],
            **window,
        )
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).mean(axis=-2)
        mask = np.asarray(jax_na.window_mask(grid, **window))
        # Both list a query's keys from top left to bottom right.
        seen = np.full((len(images), *mask.shape), np.nan, np.float32)
        seen[:, mask] = np.asarray(weights).reshape(len(images), -1)
        size, dilation = problem.kernel_size[0], problem.dilation[0]
        maps.append((f"{size}x{size}, dilation {dilation}", seen))
        tokens = block(tokens, deterministic=True, rngs=None)
    return maps


def draw(
    model: models.Classifier, data: Data, predictions: np.ndarray, output: pathlib.Path
) -> None:
    """Test images with their predictions, and where tokens of some attend."""
    labels, right = data.test.labels, predictions == data.test.labels
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left_half, right_half = figure.subfigures(1, 2, width_ratios=[6, 5.7], wspace=0.04)
    wrong = f"{sum(~right)} of {len(labels)} wrong, shown first"
    left_half.suptitle(f"Test images and predictions ({wrong})")
    shown = np.argsort(right, kind="stable")[:30]
    show = {"cmap": "gray_r"} if len(data.mean) == 1 else {}
    for axes, image, i in zip(
        left_half.subplots(5, 6).flat, data.test.load(shown), shown, strict=False
    ):
        axes.imshow(image, **show)
        name, truth = data.classes[predictions[i]], data.classes[labels[i]]
        text = name if right[i] else f"{name}, not {truth}"
        axes.set_title(text, color="black" if right[i] else "crimson", fontsize=11)
        axes.spines[:].set(color="0.7" if right[i] else "crimson")
    for axes in left_half.axes:
        axes.set(xticks=[], yticks=[])

    right_half.suptitle("Where the framed token attends in each block (mean of heads)")
    chosen = np.unique([np.argmax(labels == label) for label in np.unique(labels)])[:4]
    images = data.test.load(chosen)
    pixels = normalised(jnp.asarray(images), data)
    maps = attention_maps(model, pixels)
    height, width = model.trunk.tokenizer(pixels).shape[1:3]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    rows = right_half.subplots(len(chosen), 1 + len(maps), squeeze=False)
    for n, (row, image) in enumerate(zip(rows, images, strict=True)):
        y, x = (int((n + 1) * size / (len(chosen) + 1)) for size in (height, width))
        for axes in row:
            axes.imshow(image, extent=extent, **show)
            axes.plot(x, y, "s", ms=11, mfc="none", mec="deepskyblue", mew=2.5)
            axes.spines[:].set(color="0.7")
            axes.set(xticks=[], yticks=[])
        for axes, (title, weights) in zip(row[1:], maps, strict=True):
            axes.imshow(weights[n, y, x], cmap="YlOrRd", vmin=0, alpha=0.85)
            axes.set_title(title, fontsize=11, visible=n == 0)
    figure.savefig(output, dpi=110)


# ---- Command line --------------------------------------------------------------------


def make_model(args: argparse.Namespace, data: Data) -> models.Classifier:
    dtype = args.dtype
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = models.Classifier(
        args.model or (DIGITS if args.data is None else "nat_mini"),
        len(data.classes),
        rngs=nnx.Rngs(args.seed),
        keep_rngs=False,  # the keys of a step follow from its number
        dtype=jnp.dtype(dtype),
        implementation=args.implementation,
    )
    if args.pretrained is not None:
        trained = models.from_pretrained(args.pretrained, args.model)
        nnx.update(model.trunk, nnx.state(trained.trunk))
    return model


def main(argv: Sequence[str] | None = None) -> float:
    """Runs the example; returns the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, help="folder of images")
    parser.add_argument("--model", help="name of a published model, for --data")
    parser.add_argument("--pretrained", help="checkpoint whose trunk to start from")
    parser.add_argument(
        "--size", type=int, default=224, help="side of images of --data"
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64, help="over all devices")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument(
        "--dtype", help="of computation; default: bfloat16 unless on CPU"
    )
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    parser.add_argument("--implementation", help="of attention; default: the best")
    parser.add_argument("--seed", type=int, default=0, help="of split and training")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--output", type=pathlib.Path, default="classifier")
    args = parser.parse_args(argv)

    args.output.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        data = digits(args.seed)
    else:
        data = image_folder(args.data, args.size, args.seed)
    trainer = Trainer(make_model(args, data), data, args)
    state = trainer.fit(trainer.initial, args.epochs, args.output, args.save_every)
    predictions = trainer.predictions(state.average)
    accuracy = trainer.accuracy(predictions)
    model = nnx.merge(trainer.graph, jax.device_get(state.average))
    draw(model, data, predictions, args.output / "picture.png")
    print(f"test accuracy {accuracy:.2%} on {len(predictions)} images: {args.output}")
    return accuracy


if __name__ == "__main__":
    main()
