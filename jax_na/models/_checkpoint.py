"""Checkpoints of PyTorch models, both ways."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_na.models import _configs, _keys
from jax_na.models._configs import Config
from jax_na.models._models import Backbone, Classifier, Numerics

Model = Classifier | Backbone

_SHOWN = 10  # keys of each kind in an error message


class CheckpointError(ValueError):
    """A checkpoint that does not fit the architecture.

    Attributes:
        missing: keys that the architecture needs and the checkpoint lacks.
        unexpected: keys that the checkpoint has and the architecture lacks.
        misshapen: keys with the wrong shape, to (shape, wanted shape).
    """

    def __init__(
        self,
        missing: list[str],
        unexpected: list[str],
        misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ):
        self.missing = missing
        self.unexpected = unexpected
        self.misshapen = misshapen
        shapes = [
            f"{key} {shape}, wanted {wanted}"
            for key, (shape, wanted) in misshapen.items()
        ]
        super().__init__(
            "the checkpoint does not fit the architecture, nothing was loaded."
            + _listing("missing", missing)
            + _listing("unexpected", unexpected)
            + _listing("misshapen", shapes)
        )


def _listing(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
    return f"\n{len(lines)} {title}:{shown}{more}"


# ---- Reading -------------------------------------------------------------------------


def from_pretrained(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Config | str | None = None,
    **numerics: Unpack[Numerics],
) -> Model:
    """A model with the weights of a checkpoint, in evaluation mode.

    The layouts of keys are those of Hugging Face's ``DinatModel``, ``DinatBackbone``
    and ``DinatForImageClassification``, the same of ``Nat``, and those of the original
    repository's classifiers and detection backbones.

    Args:
        source: a folder as ``save_pretrained`` writes it, a safetensors file, a file of
            ``torch.save``, or a mapping from key to array or tensor. Nothing is
            downloaded.
        config: the architecture, or the name of a published one. Default: that of the
            ``config.json`` beside the weights. Without one, the only published
            architecture with these shapes; shapes do not tell the dilations, so where
            several fit, ``config`` must be given.
        **numerics: see :class:`jax_na.models.Numerics`.

    Returns:
        A :class:`jax_na.models.Classifier`, without a head if the checkpoint has none,
        or a :class:`jax_na.models.Backbone` if it has layer norms of feature maps.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ImportError: the file's format needs a package that is not installed.
        CheckpointError: the checkpoint has not the keys or shapes of ``config``.
        TypeError, ValueError: the state is of another kind of model, or ``config`` is
            wrong or needed.
    """
    state, beside = _read(source)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    nature = _keys.nature(shapes)
    if config is not None:
        config = _configs.resolve(config)
    elif beside is not None:
        config = Config.from_hf(beside)
    else:
        config = _published(shapes, nature)

    model = nnx.eval_shape(lambda: _build(config, nature, numerics))
    graphdef, abstract = nnx.split(model, nnx.Param)
    parameters = dict(nnx.to_flat_state(abstract))
    tensors = _keys.tensors(nature.layout, config, nature.contents, nature.prefix)
    _check_fit(shapes, _shapes(tensors, parameters))

    loaded: dict[Any, Any] = {}
    for tensor in tensors:
        parts = np.split(_as_numpy(state[tensor.key]), len(tensor.paths))
        for path, part in zip(tensor.paths, parts, strict=True):
            variable = parameters[path]
            array = jnp.asarray(tensor.form.read(part, variable.shape), variable.dtype)
            loaded[path] = variable.replace(array)
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    model.eval()
    return model


class _OneKey(nnx.Rngs):
    """The same key for every parameter, for models that get their values elsewhere.

    An abstract model of hundreds of parameters takes seconds where each of its keys
    counts up a traced counter.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def _build(config: Config, nature: _keys.Nature, numerics: Numerics) -> Model:
    # Keeps no streams for stochastic depth: an abstract model has no keys.
    rngs = _OneKey()
    if nature.contents.out_features:
        return Backbone(
            config, nature.contents.out_features, rngs=rngs, keep_rngs=False, **numerics
        )
    return Classifier(
        config, nature.num_classes, rngs=rngs, keep_rngs=False, **numerics
    )


def _published(shapes: Mapping[str, tuple[int, ...]], nature: _keys.Nature) -> Config:
    """The architecture of a checkpoint that comes without a configuration."""
    found = _keys.architecture(shapes)
    if nature.prefix == "nat.":  # has no dilations
        return found

    def undilated(config: Config) -> Config:
        return dataclasses.replace(
            config,
            dilations=(),
            drop_path_rate=0.0,
            num_channels=found.num_channels,
            layer_scale=None if config.layer_scale is None else found.layer_scale,
        )

    fitting = {
        name: config
        for name, config in _configs.CONFIGS.items()
        if undilated(config) == found
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    raise ValueError(
        "config must be given: the dilations are not stored in the weights, and "
        + (
            f"their shapes fit each of {', '.join(fitting)}."
            if fitting
            else f"their shapes fit no published architecture, but {found}."
        )
    )


def _shapes(
    tensors: Iterable[_keys.Tensor], parameters: Mapping[_keys.Path, Any]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors by key."""
    shapes = {}
    for tensor in tensors:
        parts = [
            jax.eval_shape(
                tensor.form.write,
                jax.ShapeDtypeStruct(parameters[path].shape, jnp.float32),
            ).shape
            for path in tensor.paths
        ]
        shapes[tensor.key] = (len(parts) * parts[0][0], *parts[0][1:])
    return shapes


def _check_fit(
    given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    misshapen = {
        key: (given[key], shape)
        for key, shape in wanted.items()
        if key in given and given[key] != shape
    }
    if missing or unexpected or misshapen:
        raise CheckpointError(missing, unexpected, misshapen)


# ---- Files ---------------------------------------------------------------------------


def _read(source: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The state of a checkpoint, and the ``config.json`` beside it if there is one."""
    if isinstance(source, Mapping):
        return _state(source), None
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}.")
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(
            file for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}")
        )
        if not files:
            raise FileNotFoundError(
                f"the folder {str(path)!r} has no weights: no *.safetensors, *.bin, "
                "*.pt or *.pth."
            )
    state: dict[str, Any] = {}
    for file in files:
        state |= _state(_read_file(file))
    config = files[0].parent / "config.json"
    return state, json.loads(config.read_text()) if config.exists() else None


def _read_file(path: pathlib.Path) -> Mapping[str, Any]:
    package = "safetensors" if path.suffix == ".safetensors" else "torch"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs {package}, run: pip install {package} ({error})"
        ) from error
    if package == "torch":
        return module.load(path, map_location="cpu", weights_only=True)
    # As JAX arrays: NumPy alone has no bfloat16.
    with module.safe_open(path, framework="flax") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def _state(content: Any) -> dict[str, Any]:
    """The arrays of a checkpoint by key, without what training wrapped around them."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise TypeError(
            f"a checkpoint must be a mapping from keys to arrays, got {type(content)}."
        )
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or not hasattr(value, "shape"):
            raise TypeError(
                f"a checkpoint must map strings to arrays, got {key!r}: {type(value)}."
            )
        # A table of constants that the original ViT with a positional bias stores.
        if not key.endswith("relative_position_index"):
            state[key.removeprefix("module.")] = value
    return state


def _as_numpy(value: Any) -> np.ndarray:
    """An array, or a PyTorch tensor of any dtype on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy alone has none
            value = value.float()
    return np.asarray(value)


# ---- Writing -------------------------------------------------------------------------


def to_hf_state_dict(
    model: Model, model_type: Literal["dinat", "nat"] = "dinat"
) -> dict[str, np.ndarray]:
    """The weights under the keys of Hugging Face's ``transformers``.

    Those of ``DinatForImageClassification``, of ``DinatModel`` for a classifier without
    a head, or of ``DinatBackbone``. ``model.config.to_hf()`` has the arguments of the
    ``DinatConfig`` to go with it.

    Args:
        model: the model.
        model_type: ``"nat"`` for the classes without dilations.

    Raises:
        ValueError: ``transformers`` has no such model.
    """
    if model_type not in ("dinat", "nat"):
        raise ValueError(f"model_type must be 'dinat' or 'nat', got {model_type!r}.")
    model.config.to_hf()  # raises unless transformers has such models
    if model_type == "nat" and max(map(max, model.config.dilations)) > 1:
        raise ValueError(
            f"model_type 'nat' has no dilations, got {model.config.dilations}."
        )
    contents = _contents(model)
    return _write(model, "hf", contents, f"{model_type}." if contents.head else "")


def to_original_state_dict(model: Model) -> dict[str, np.ndarray]:
    """The weights under the keys of the original repository.

    Raises:
        ValueError: the original repository has no such model.
    """
    contents = _contents(model)
    if "stem" in contents.out_features:
        raise ValueError(
            "the original repository's backbones have no feature map 'stem', got "
            f"out_features {contents.out_features}."
        )
    return _write(model, "original", contents)


def _contents(model: Model) -> _keys.Contents:
    if isinstance(model, Backbone):
        return _keys.Contents(False, model.out_features)
    return _keys.Contents(model.head is not None, ())


def _write(
    model: Model, layout: _keys.Layout, contents: _keys.Contents, prefix: str = ""
) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    parameters = {path: np.asarray(variable[...]) for path, variable in state}
    return {
        # Contiguous, which writers of safetensors take for granted.
        tensor.key: np.ascontiguousarray(
            np.concatenate([tensor.form.write(parameters[p]) for p in tensor.paths])
        )
        for tensor in _keys.tensors(layout, model.config, contents, prefix)
    }
