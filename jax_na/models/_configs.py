"""Architectures: what a configuration holds, and those that were published."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

Tokenizer = Literal["overlapping", "patch"]


@dataclasses.dataclass(frozen=True)
class Config:
    """An architecture.

    Stage ``i`` has ``depths[i]`` blocks of ``embed_dim * 2**i`` features; between two
    stages the feature map is halved. Sequences are kept as tuples.

    Attributes:
        embed_dim: features of the first stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        kernel_size: window length of every block, both axes.
        dilations: dilation of every block, one sequence per stage. Default: all 1.
        mlp_ratio: hidden over outer features of the MLPs.
        tokenizer: ``"overlapping"``: two convolutions 3x3 of stride 2, and one between
            stages (NAT, DiNAT); ``"patch"``: patches side by side, and merged two by
            two between stages (DiNAT_s, isotropic models).
        patch_size: pixels per token and axis; 4 with the overlapping tokenizer.
        num_channels: channels of the images.
        layer_scale: initial value of the per-feature scales of both branches of a
            block. Default: no scales.
        drop_path_rate: stochastic depth of the last block in training; that of the
            others rises linearly from 0.

    Raises:
        ValueError: the values do not fit together; the message names them and the rule.
    """

    embed_dim: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    kernel_size: int = 7
    dilations: Sequence[Sequence[int]] = ()
    mlp_ratio: float = 3.0
    tokenizer: Tokenizer = "overlapping"
    patch_size: int = 4
    num_channels: int = 3
    layer_scale: float | None = None
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        dilations = self.dilations or [[1] * depth for depth in self.depths]
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))
        object.__setattr__(self, "dilations", tuple(map(tuple, dilations)))
        self._check()

    def _check(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths must hold at least one stage of at least one block, got "
                f"{self.depths}."
            )
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads must have one entry per stage, {len(self.depths)}, got "
                f"{self.num_heads}."
            )
        if tuple(map(len, self.dilations)) != self.depths:
            raise ValueError(
                f"dilations must have one entry per block, so lengths {self.depths}, "
                f"got {self.dilations}."
            )
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or self.features(stage) % heads:
                raise ValueError(
                    f"the {self.features(stage)} features of stage {stage + 1} must be "
                    f"a multiple of its num_heads, got {heads}."
                )
        if self.tokenizer not in get_args(Tokenizer):
            raise ValueError(
                f"tokenizer must be one of {get_args(Tokenizer)}, got "
                f"{self.tokenizer!r}."
            )
        overlapping = self.tokenizer == "overlapping"
        if overlapping and (self.patch_size != 4 or self.embed_dim % 2):
            raise ValueError(
                "the overlapping tokenizer has patch_size 4 and an even embed_dim, got "
                f"{self.patch_size} and {self.embed_dim}."
            )

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the feature maps: ``stem``, ``stage1``, ..."""
        return ("stem", *(f"stage{i + 1}" for i in range(len(self.depths))))

    def features(self, stage: int) -> int:
        """Features of the blocks of a stage, counted from 0."""
        return self.embed_dim * 2**stage

    @property
    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """Stochastic depth of every block, one tuple per stage."""
        last = max(1, sum(self.depths) - 1)
        count = itertools.count()
        return tuple(
            tuple(self.drop_path_rate * next(count) / last for _ in range(depth))
            for depth in self.depths
        )

    # ---- Hugging Face ----------------------------------------------------------------

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """The architecture of a ``config.json`` of ``model_type`` ``dinat`` or ``nat``.

        Raises:
            ValueError: it is of another type, or has a setting that these models lack.
        """
        if config.get("model_type") not in ("dinat", "nat"):
            raise ValueError(
                "model_type of the configuration must be 'dinat' or 'nat', got "
                f"{config.get('model_type')!r}."
            )
        for name, value in _HF_FIXED.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"{name} of the configuration must be {value!r}, got "
                    f"{config[name]!r}."
                )
        dilated = config["model_type"] == "dinat"
        return cls(
            embed_dim=config.get("embed_dim", 64),
            depths=config.get("depths", (3, 4, 6, 5)),
            num_heads=config.get("num_heads", (2, 4, 8, 16)),
            kernel_size=config.get("kernel_size", 7),
            dilations=config.get("dilations", _DINAT_MINI) if dilated else (),
            mlp_ratio=config.get("mlp_ratio", 3.0),
            num_channels=config.get("num_channels", 3),
            layer_scale=config.get("layer_scale_init_value", 0.0) or None,
            drop_path_rate=config.get("drop_path_rate", 0.1),
        )

    def to_hf(self) -> dict[str, Any]:
        """Keyword arguments of ``transformers.DinatConfig`` for this architecture.

        Raises:
            ValueError: ``transformers`` has no such model.
        """
        if self.tokenizer != "overlapping":
            raise ValueError(
                "only models with the overlapping tokenizer (NAT, DiNAT) exist in "
                f"transformers, got tokenizer {self.tokenizer!r}."
            )
        return {
            **_HF_FIXED,
            "embed_dim": self.embed_dim,
            "depths": list(self.depths),
            "num_heads": list(self.num_heads),
            "kernel_size": self.kernel_size,
            "dilations": [list(stage) for stage in self.dilations],
            "mlp_ratio": self.mlp_ratio,
            "num_channels": self.num_channels,
            "layer_scale_init_value": self.layer_scale or 0.0,
            "drop_path_rate": self.drop_path_rate,
        }


# ---- Published architectures ---------------------------------------------------------


def _alternating(
    depths: Sequence[int], largest: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Dilations 1, d, 1, d, ... with one d per stage."""
    return tuple(
        tuple(itertools.islice(itertools.cycle((1, dilation)), depth))
        for depth, dilation in zip(depths, largest, strict=True)
    )


#: What the Hugging Face configurations can vary and these models cannot.
_HF_FIXED = {
    "patch_size": 4,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_SHALLOW, _DEEP = (3, 4, 6, 5), (3, 4, 18, 5)
_DINAT_MINI = _alternating(_SHALLOW, (8, 4, 2, 1))


def _nat(variant: str, dilations: Sequence[int] = (), **changes: Any) -> Config:
    """NAT, or with ``dilations`` DiNAT (the largest of each stage)."""
    embed_dim, depths, mlp_ratio, drop_path_rate = {
        "mini": (64, _SHALLOW, 3.0, 0.2),
        "tiny": (64, _DEEP, 3.0, 0.2),
        "small": (96, _DEEP, 2.0, 0.3),
        "base": (128, _DEEP, 2.0, 0.5),
        "large": (192, _DEEP, 2.0, 0.35),
    }[variant]
    return Config(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=tuple(embed_dim // 32 * 2**stage for stage in range(4)),
        dilations=_alternating(depths, dilations) if dilations else (),
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path_rate,
        **changes,
    )


def _dinat_s(
    variant: str, dilations: Sequence[int] = (8, 4, 2, 1), **changes: Any
) -> Config:
    embed_dim, depths, drop_path_rate = {
        "tiny": (96, (2, 2, 6, 2), 0.2),
        "small": (96, (2, 2, 18, 2), 0.3),
        "base": (128, (2, 2, 18, 2), 0.5),
        "large": (192, (2, 2, 18, 2), 0.35),
    }[variant]
    return Config(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=tuple(embed_dim // 32 * 2**stage for stage in range(4)),
        dilations=_alternating(depths, dilations),
        mlp_ratio=4.0,
        tokenizer="patch",
        drop_path_rate=drop_path_rate,
        **changes,
    )


def _isotropic(variant: str, kernel_size: int = 7, dilation: int = 1) -> Config:
    embed_dim, drop_path_rate = {"small": (384, 0.1), "base": (768, 0.4)}[variant]
    return Config(
        embed_dim=embed_dim,
        depths=(12,),
        num_heads=(embed_dim // 32,),
        kernel_size=kernel_size,
        dilations=_alternating((12,), (dilation,)),
        mlp_ratio=4.0,
        tokenizer="patch",
        patch_size=16,
        drop_path_rate=drop_path_rate,
    )


_LOCAL = (8, 4, 2, 1)  # dilations at 224x224: the last stages' windows fill their maps
_LARGE = (13, 6, 3, 1)  # at 384x384

#: The published architectures by name.
CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        "nat_mini": _nat("mini"),
        "nat_tiny": _nat("tiny"),
        "nat_small": _nat("small", layer_scale=1e-5),
        "nat_base": _nat("base", layer_scale=1e-5),
        "dinat_mini": _nat("mini", _LOCAL),
        "dinat_tiny": _nat("tiny", _LOCAL),
        "dinat_small": _nat("small", _LOCAL),
        "dinat_base": _nat("base", _LOCAL, layer_scale=1e-5),
        "dinat_large": _nat("large", _LOCAL),
        "dinat_large_384": _nat("large", _LARGE),
        "dinat_large_384_11x11": _nat("large", _LOCAL, kernel_size=11),
        "dinat_s_tiny": _dinat_s("tiny"),
        "dinat_s_small": _dinat_s("small"),
        "dinat_s_base": _dinat_s("base"),
        "dinat_s_large": _dinat_s("large"),
        "dinat_s_large_384": _dinat_s("large", _LARGE),
        "nat_isotropic_small": _isotropic("small"),
        "nat_isotropic_base": _isotropic("base"),
        "dinat_isotropic_small": _isotropic("small", dilation=2),
        "dinat_isotropic_base": _isotropic("base", dilation=2),
        # Self-attention over the 14x14 map of a 224x224 image, as the widest window.
        "vit_rpb_small": _isotropic("small", kernel_size=14),
        "vit_rpb_base": _isotropic("base", kernel_size=14),
    }
)


def resolve(config: Config | str) -> Config:
    """The configuration itself, or the published one of that name.

    Raises:
        TypeError, ValueError: ``config`` is neither.
    """
    if isinstance(config, Config):
        return config
    if not isinstance(config, str):
        raise TypeError(
            "config must be a jax_na.models.Config or the name of a published one, "
            f"got {config!r}."
        )
    if config not in CONFIGS:
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}, got {config!r}.")
    return CONFIGS[config]
