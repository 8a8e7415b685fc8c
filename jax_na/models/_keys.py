"""Names and shapes of parameters in checkpoints, in each of their layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from jax_na.models._configs import Config

Path = tuple[Any, ...]
Layout = Literal["hf", "original"]


class Form(NamedTuple):
    """How a tensor of PyTorch's holds a parameter of Flax's.

    Attributes:
        write: from the parameter to the tensor.
        read: from the tensor and the parameter's shape to the parameter.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any, tuple[int, ...]], Any]


_VECTOR = Form(lambda x: x.reshape(-1), lambda x, shape: x.reshape(shape))
_ROW = Form(lambda x: x.reshape(1, -1), lambda x, shape: x.reshape(shape))
_SAME = Form(lambda x: x, lambda x, shape: x.reshape(shape))
_LINEAR = Form(
    lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape)
)
_FROM_HEADS = Form(
    lambda x: x.reshape(-1, x.shape[-1]).T, lambda x, shape: x.T.reshape(shape)
)
_CONV = Form(
    lambda x: x.transpose(3, 2, 0, 1), lambda x, shape: x.transpose(2, 3, 1, 0)
)


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        key: its name.
        paths: the parameters that it holds one after the other along its first axis.
        form: how it holds each.
    """

    key: str
    paths: tuple[Path, ...]
    form: Form


class Contents(NamedTuple):
    """What a model has besides its trunk.

    Attributes:
        head: whether it has a head.
        out_features: names of the maps of a backbone, empty for a classifier.
    """

    head: bool
    out_features: tuple[str, ...]


# ---- What both layouts share ---------------------------------------------------------


def _weight_and_bias(key: str, path: Path, form: Form) -> Iterator[Tensor]:
    yield Tensor(f"{key}.weight", ((*path, "kernel"),), form)
    yield Tensor(f"{key}.bias", ((*path, "bias"),), _VECTOR)


def _norm(key: str, path: Path) -> Iterator[Tensor]:
    yield Tensor(f"{key}.weight", ((*path, "scale"),), _VECTOR)
    yield Tensor(f"{key}.bias", ((*path, "bias"),), _VECTOR)


def _downsampler(config: Config, key: str, path: Path) -> Iterator[Tensor]:
    form = _CONV if config.tokenizer == "overlapping" else _LINEAR
    yield Tensor(f"{key}.reduction.weight", ((*path, "reduction", "kernel"),), form)
    yield from _norm(f"{key}.norm", (*path, "norm"))


def _blocks(config: Config) -> Iterator[tuple[int, int, Path]]:
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            yield stage, block, ("trunk", "stages", stage, "blocks", block)


# ---- Hugging Face --------------------------------------------------------------------


def _hf(config: Config, contents: Contents, prefix: str) -> Iterator[Tensor]:
    tokenizer: Path = ("trunk", "tokenizer")
    for index, name in enumerate(("first", "second")):
        yield from _weight_and_bias(
            f"{prefix}embeddings.patch_embeddings.projection.{index}",
            (*tokenizer, name),
            _CONV,
        )
    yield from _norm(f"{prefix}embeddings.norm", (*tokenizer, "norm"))
    for stage, block, path in _blocks(config):
        key = f"{prefix}encoder.levels.{stage}.layers.{block}"
        yield from _norm(f"{key}.layernorm_before", (*path, "attention_norm"))
        attention: Path = (*path, "attention")
        yield Tensor(
            f"{key}.attention.self.rpb", ((*attention, "rel_pos_bias"),), _SAME
        )
        for name in ("query", "key", "value"):
            yield from _weight_and_bias(
                f"{key}.attention.self.{name}", (*attention, name), _LINEAR
            )
        yield from _weight_and_bias(
            f"{key}.attention.output.dense", (*attention, "out"), _FROM_HEADS
        )
        yield from _norm(f"{key}.layernorm_after", (*path, "mlp_norm"))
        yield from _weight_and_bias(
            f"{key}.intermediate.dense", (*path, "expand"), _LINEAR
        )
        yield from _weight_and_bias(f"{key}.output.dense", (*path, "contract"), _LINEAR)
        if config.layer_scale is not None:
            scales = (*path, "attention_scale"), (*path, "mlp_scale")
            yield Tensor(f"{key}.layer_scale_parameters", scales, _ROW)
    for stage in range(len(config.depths) - 1):
        yield from _downsampler(
            config,
            f"{prefix}encoder.levels.{stage}.downsample",
            ("trunk", "stages", stage, "downsampler"),
        )
    for name in contents.out_features:
        yield from _norm(f"hidden_states_norms.{name}", ("norms", name))
    if not contents.out_features:
        yield from _norm(f"{prefix}layernorm", ("norm",))
    if contents.head:
        yield from _weight_and_bias("classifier", ("head",), _LINEAR)


# ---- Original repository -------------------------------------------------------------


def _original(config: Config, contents: Contents, prefix: str) -> Iterator[Tensor]:
    del prefix
    tokenizer: Path = ("trunk", "tokenizer")
    if config.tokenizer == "overlapping":
        for index, name in enumerate(("first", "second")):
            yield from _weight_and_bias(
                f"patch_embed.proj.{index}", (*tokenizer, name), _CONV
            )
    else:
        yield from _weight_and_bias(
            "patch_embed.proj", (*tokenizer, "projection"), _CONV
        )
    yield from _norm("patch_embed.norm", (*tokenizer, "norm"))
    levels = "levels" if config.tokenizer == "overlapping" else "layers"
    isotropic = config.tokenizer == "patch" and len(config.depths) == 1
    for stage, block, path in _blocks(config):
        key = f"layers.{block}" if isotropic else f"{levels}.{stage}.blocks.{block}"
        yield from _norm(f"{key}.norm1", (*path, "attention_norm"))
        attention: Path = (*path, "attention")
        yield Tensor(f"{key}.attn.rpb", ((*attention, "rel_pos_bias"),), _SAME)
        for name, leaf, form in (
            ("weight", "kernel", _LINEAR),
            ("bias", "bias", _VECTOR),
        ):
            parts = tuple(
                (*attention, part, leaf) for part in ("query", "key", "value")
            )
            yield Tensor(f"{key}.attn.qkv.{name}", parts, form)
        yield from _weight_and_bias(
            f"{key}.attn.proj", (*attention, "out"), _FROM_HEADS
        )
        yield from _norm(f"{key}.norm2", (*path, "mlp_norm"))
        yield from _weight_and_bias(f"{key}.mlp.fc1", (*path, "expand"), _LINEAR)
        yield from _weight_and_bias(f"{key}.mlp.fc2", (*path, "contract"), _LINEAR)
        if config.layer_scale is not None:
            yield Tensor(f"{key}.gamma1", ((*path, "attention_scale"),), _VECTOR)
            yield Tensor(f"{key}.gamma2", ((*path, "mlp_scale"),), _VECTOR)
    for stage in range(len(config.depths) - 1):
        yield from _downsampler(
            config,
            f"{levels}.{stage}.downsample",
            ("trunk", "stages", stage, "downsampler"),
        )
    for name in contents.out_features:
        index = config.stage_names.index(name) - 1
        yield from _norm(f"norm{index}", ("norms", name))
    if not contents.out_features:
        yield from _norm("norm", ("norm",))
    if contents.head:
        yield from _weight_and_bias("head", ("head",), _LINEAR)


_LAYOUTS = {"hf": _hf, "original": _original}


def tensors(
    layout: Layout, config: Config, contents: Contents, prefix: str = ""
) -> list[Tensor]:
    """Every tensor of a checkpoint, and what it holds.

    Args:
        layout: of the checkpoint.
        config: the architecture.
        contents: what the model has besides the trunk.
        prefix: what precedes the trunk's keys, in the Hugging Face layout.
    """
    return list(_LAYOUTS[layout](config, contents, prefix))


# ---- Reading a checkpoint's nature from its keys -------------------------------------

_HF_MARK = "embeddings.norm.weight"
_ORIGINAL_MARK = "patch_embed.norm.weight"
_RPB = re.compile(
    r"(?:levels|layers)\.(?P<first>\d+)\."
    r"(?:(?:layers|blocks)\.(?P<second>\d+)\.)?"
    r"(?:attention\.self|attn)\.rpb$"
)


class Nature(NamedTuple):
    """What kind of model a checkpoint holds.

    Attributes:
        layout: of the keys.
        prefix: what precedes the trunk's keys.
        contents: parts besides the trunk.
        num_classes: number of logits; None without a head.
    """

    layout: Layout
    prefix: str
    contents: Contents
    num_classes: int | None


def nature(shapes: Mapping[str, tuple[int, ...]]) -> Nature:
    """What the checkpoint with these keys and shapes holds.

    Raises:
        ValueError: it is none of a NAT or DiNAT model.
    """
    prefixes = [p for p in ("", "dinat.", "nat.") if f"{p}{_HF_MARK}" in shapes]
    layout: Layout
    if prefixes:
        prefix, layout = prefixes[0], "hf"
        head = "classifier.weight"
        norms = re.compile(r"hidden_states_norms\.(stem|stage\d+)\.weight$")
    elif _ORIGINAL_MARK in shapes:
        prefix, layout = "", "original"
        head = "head.weight"
        norms = re.compile(r"norm(\d+)\.weight$")
    else:
        raise _foreign(shapes)
    found = [match[1] for key in shapes if (match := norms.match(key))]
    contents = Contents(
        head=head in shapes and not found,
        out_features=tuple(
            f"stage{int(name) + 1}" if name.isdigit() else name for name in found
        ),
    )
    return Nature(layout, prefix, contents, shapes[head][0] if contents.head else None)


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The architecture but for what no shape tells: all dilations are 1.

    Raises:
        ValueError: the shapes are none of a NAT or DiNAT model.
    """
    tables: dict[tuple[int, int], tuple[int, ...]] = {}
    for key, shape in shapes.items():
        match = _RPB.search(key)
        if match and len(shape) == 3:
            first, second = match["first"], match["second"]
            place = (0, int(first)) if second is None else (int(first), int(second))
            tables[place] = shape
    expand = _first(shapes, "intermediate.dense.weight", "mlp.fc1.weight")
    stem = _first(shapes, "projection.0.weight", "proj.0.weight")
    patches = _first(shapes, "patch_embed.proj.weight")
    pixels = stem or patches
    if not tables or expand is None or pixels is None:
        raise _foreign(shapes)
    stages = range(1 + max(stage for stage, _ in tables))
    heads = {stage: shape[0] for (stage, _), shape in tables.items()}
    scaled = _first(shapes, "layer_scale_parameters", "gamma1") is not None
    return Config(
        embed_dim=expand[1],
        depths=tuple(sum(stage == i for stage, _ in tables) for i in stages),
        num_heads=tuple(heads.get(stage, 0) for stage in stages),
        kernel_size=(next(iter(tables.values()))[-1] + 1) // 2,
        mlp_ratio=expand[0] / expand[1],
        tokenizer="overlapping" if stem else "patch",
        patch_size=4 if stem else pixels[-1],
        num_channels=pixels[1],
        layer_scale=1e-5 if scaled else None,
    )


def _first(
    shapes: Mapping[str, tuple[int, ...]], *suffixes: str
) -> tuple[int, ...] | None:
    """Shape of the first tensor whose key ends so, in the order of its numbers."""
    keys = [key for key in shapes if key.endswith(suffixes)]
    if not keys:
        return None
    return shapes[min(keys, key=lambda key: [int(n) for n in re.findall(r"\d+", key)])]


def _foreign(shapes: Mapping[str, Any]) -> ValueError:
    some = ", ".join(list(shapes)[:5]) or "none"
    return ValueError(
        "the state is none of a NAT or DiNAT model: it has neither the key "
        f"{_HF_MARK!r} (Hugging Face) nor {_ORIGINAL_MARK!r} (original repository). "
        f"Its first keys: {some}."
    )
