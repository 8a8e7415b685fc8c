"""Train a small neighborhood-attention classifier on handwritten digits.

    python examples/train_digits.py

The data are the 1,797 real 8x8 images of scikit-learn's digits; every pixel is a token.
Prints the test accuracy and writes a picture of test images, predictions and attention.
Needs jax_na, flax, optax, scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_na
from jax_na.nnx import NeighborhoodAttention2D

SIZE = 8  # pixels per side of an image
BATCH = 64
# The window of each block: local and dense, wider and sparse, in turn.
WINDOWS = [{"kernel_size": 5, "dilation": 1}, {"kernel_size": 3, "dilation": 2}] * 2


class Block(nnx.Module):
    """A pre-norm transformer block with neighborhood attention."""

    def __init__(self, features, window, implementation, rngs):
        self.attention_norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = NeighborhoodAttention2D(
            num_heads=4,
            in_features=features,
            **window,
            rel_pos_bias=True,
            implementation=implementation,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(features, rngs=rngs)
        self.expand = nnx.Linear(features, 2 * features, rngs=rngs)
        self.contract = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, tokens):
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.contract(nnx.gelu(self.expand(self.mlp_norm(tokens))))

    def attention_weights(self, tokens, window):
        """Weights ``[batch, 8, 8, heads, 8, 8]``: query token, head, key token.

        Attention is a weighted mean of the values. When the value of every token is
        its own one-hot code, that mean lists the weights.
        """
        layer, tokens = self.attention, self.attention_norm(tokens)
        query, key, bias = layer.query(tokens), layer.key(tokens), layer.rel_pos_bias
        codes = jnp.eye(SIZE**2).reshape(SIZE, SIZE, 1, SIZE**2)
        value = jnp.broadcast_to(codes, (*key.shape[:-1], SIZE**2))
        weights = jax_na.na2d(query, key, value, **window, rel_pos_bias=bias[...])
        return weights.reshape(*weights.shape[:-1], SIZE, SIZE)


class Classifier(nnx.Module):
    """Pixels to tokens, blocks, mean over the grid, ten logits."""

    def __init__(self, implementation, rngs, features=48):
        self.stem = nnx.Conv(1, features, (3, 3), rngs=rngs)
        self.position = nnx.Param(jnp.zeros((SIZE, SIZE, features)))
        self.blocks = nnx.List(
            [Block(features, window, implementation, rngs) for window in WINDOWS]
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, 10, rngs=rngs)

    def embed(self, images):
        return self.stem(images[..., None]) + self.position[...]

    def __call__(self, images):
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens).mean((-3, -2)))


@jax.vmap
def distort(key, image):
    """The image turned, scaled, sheared and shifted by small random amounts."""
    turn, scale, shear, *shift = jax.random.uniform(key, (5,), minval=-1)
    cos, sin = jnp.cos(0.2 * turn), jnp.sin(0.2 * turn)
    matrix = jnp.array([[cos, -sin], [sin, cos + 0.15 * shear]]) * (1 + 0.12 * scale)
    pixels = jnp.indices((SIZE, SIZE), jnp.float32) - (SIZE - 1) / 2
    source = jnp.einsum("ij,jhw->ihw", matrix, pixels) + (SIZE - 1) / 2
    source += 0.8 * jnp.array(shift)[:, None, None]
    return jax.scipy.ndimage.map_coordinates(image, list(source), order=1)


@nnx.jit
def train_step(model, optimizer, key, images, labels):
    images = distort(jax.random.split(key, len(images)), images)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)

    def loss_of(model):
        return optax.softmax_cross_entropy(model(images), targets).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def train(model, images, labels, epochs, seed):
    """Trains ``model`` in place; returns the loss of every step."""
    steps = len(images) // BATCH
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, steps, epochs * steps + 1)
    adamw = optax.adamw(schedule, weight_decay=0.05)
    optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    order, key, losses = np.random.default_rng(seed), jax.random.key(seed), []
    with tqdm(total=epochs * steps, unit="step", desc="training") as progress:
        for _ in range(epochs):
            shuffled = order.permutation(len(images))[: steps * BATCH]
            for batch in shuffled.reshape(steps, BATCH):
                step_key = jax.random.fold_in(key, len(losses))
                chosen = images[batch], labels[batch]
                losses.append(float(train_step(model, optimizer, step_key, *chosen)))
                progress.update()
            progress.set_postfix(loss=f"{np.mean(losses[-steps:]):.3f}")
    return losses


def draw(model, images, labels, predictions, output):
    """Test images with their predictions, and where four tokens attend."""
    right = predictions == labels
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left_half, right_half = figure.subfigures(1, 2, width_ratios=[6, 5.7], wspace=0.04)
    wrong = f"{sum(~right)} of {len(labels)} wrong, shown first"
    left_half.suptitle(f"Test images and predictions ({wrong})")
    shown = np.argsort(right, kind="stable")
    for axes, i in zip(left_half.subplots(5, 6).flat, shown, strict=False):
        axes.imshow(images[i], cmap="gray_r")
        text = predictions[i] if right[i] else f"{predictions[i]}, not {labels[i]}"
        axes.set_title(text, color="black" if right[i] else "crimson", fontsize=11)
        axes.spines[:].set(color="0.7" if right[i] else "crimson")
        axes.set(xticks=[], yticks=[])

    right_half.suptitle("Where the framed token attends in each block (mean of heads)")
    chosen = [np.flatnonzero(right & (labels == digit))[0] for digit in (0, 3, 4, 8)]
    maps, tokens = [], model.embed(images[chosen])
    for block, window in zip(model.blocks, WINDOWS, strict=True):
        maps.append(np.asarray(block.attention_weights(tokens, window).mean(3)))
        tokens = block(tokens)
    for n, row in enumerate(right_half.subplots(len(chosen), 1 + len(maps))):
        image = images[chosen[n]]
        ink = np.argwhere(image > 0.8)  # one token of the stroke, from top to bottom
        y, x = ink[n * (len(ink) - 1) // (len(chosen) - 1)]
        for axes in row:
            axes.imshow(image, cmap="gray_r", alpha=1 if axes is row[0] else 0.25)
            axes.plot(x, y, "s", ms=11, mfc="none", mec="deepskyblue", mew=2.5)
            axes.spines[:].set(color="0.7")
            axes.set(xticks=[], yticks=[])
        for axes, weights, window in zip(row[1:], maps, WINDOWS, strict=True):
            inside = np.where(weights[n, y, x] > 0, weights[n, y, x], np.nan)
            axes.imshow(inside, cmap="YlOrRd", vmin=0, alpha=0.85)
            title = "{kernel_size}x{kernel_size}, dilation {dilation}"
            axes.set_title(title.format_map(window), fontsize=11, visible=n == 0)
    figure.savefig(output, dpi=110)


def main(argv: Sequence[str] | None = None) -> tuple[float, list[float]]:
    """Runs the example; returns the test accuracy and the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of split and training")
    parser.add_argument("--output", default="digits.png", help="where to draw")
    parser.add_argument("--implementation", help="of attention; default: the best")
    args = parser.parse_args(argv)

    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=args.seed
    )
    model = Classifier(args.implementation, nnx.Rngs(args.seed))
    losses = train(model, train_images, train_labels, args.epochs, args.seed)
    logits = nnx.jit(lambda model, images: model(images))(model, test_images)
    predictions = np.asarray(logits.argmax(-1))
    accuracy = float(np.mean(predictions == test_labels))
    draw(model, test_images, test_labels, predictions, args.output)
    print(f"test accuracy {accuracy:.2%} on {len(test_labels)} images: {args.output}")
    return accuracy, losses


if __name__ == "__main__":
    main()
