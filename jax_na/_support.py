"""Which implementation runs a call on a platform, and why the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from jax_na import _ffi, _tiling_sm90

Implementation: TypeAlias = Literal["fused", "gemm", "naive", "xla"]

#: Best first.
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

#: Platforms for which native kernels exist, as JAX names them in lowering rules.
NATIVE_PLATFORMS = ("cpu", "cuda")

#: The largest head dimension in the kernels for Hopper, by function.
_HOPPER_CHANNELS = {
    "forward": max(_tiling_sm90.FORWARD.kernels),
    "backward": max(_tiling_sm90.DQUERY.kernels),
}

#: What :func:`hopper_refusal` lets through.
_HOPPER = (
    "'fused' in float16 and bfloat16, dilations up to "
    f"{_tiling_sm90.LARGEST_DILATION}, bias tables up to {_tiling_sm90.LARGEST_BIAS} "
    f"entries, head dimensions up to {_HOPPER_CHANNELS['forward']}, for gradients up to "
    f"{_HOPPER_CHANNELS['backward']}"
)

#: Implementations that use tensor cores on a GPU.
_TENSOR_CORES = ("fused", "gemm")


def check_implementation(implementation: Any) -> None:
    """Raises ValueError unless None or the name of an implementation."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}, got "
            f"{implementation!r}."
        )


class Traits(NamedTuple):
    """What of a call decides which implementations can run it.

    Attributes:
        dtype: of query, key and value.
        head_dim: of query and key.
        value_dim: of value.
    """

    dtype: np.dtype
    head_dim: int
    value_dim: int


def refusal(
    implementation: str,
    platform: str,
    traits: Traits | None = None,
    function: str = "forward",
) -> str | None:
    """Why ``implementation`` cannot run a call on ``platform``; None if it can.

    Without ``traits``: why it can run no call at all. ``function`` names the kernel that
    it needs.
    """
    if implementation == "xla":
        return None
    targets = _ffi.TARGETS.get(platform)
    if targets is None:
        if platform not in NATIVE_PLATFORMS:
            return f"jax_na has no native kernels for the platform {platform!r}"
        return f"jax_na was installed without its native kernels for {platform!r}"
    # Attention is composed of products there.
    kernel = "pair" if implementation == "gemm" else function
    if _ffi.target_name(kernel, implementation) not in targets:
        return f"jax_na has no {implementation!r} kernels for the platform {platform!r}"
    if traits is not None and platform == "cuda" and implementation in _TENSOR_CORES:
        return _tensor_core_refusal(implementation, traits)
    return None


def _tensor_core_refusal(implementation: str, traits: Traits) -> str | None:
    if traits.dtype == np.dtype("float64"):
        return (
            f"{implementation!r} on 'cuda' takes query, key and value in float32, "
            "float16 or bfloat16, got float64"
        )
    for name, channels in (("query", traits.head_dim), ("value", traits.value_dim)):
        if channels % 8 or channels > 256:
            return (
                f"{implementation!r} on 'cuda' takes head dimensions that are multiples "
                f"of 8 up to 256, got {channels} for {name}"
            )
    return None


def hopper_refusal(
    function: str,
    dtype: np.dtype,
    channels: int,
    dilation: tuple[int, ...],
    bias_entries: int,
) -> str | None:
    """Why the kernels for Hopper cannot run ``'fused'`` there; None if they can.

    If not, the portable kernels do, as on every other NVIDIA GPU.

    Args:
        function: "forward" or "backward".
        dtype: of query, key and value.
        channels: of a head, the more of those of query and value.
        dilation: of the window.
        bias_entries: of the tables of bias that a CTA reads; 0 without a bias.
    """
    if np.dtype(dtype).itemsize != 2:
        return f"they take float16 and bfloat16, got {np.dtype(dtype).name}"
    most = _tiling_sm90.LARGEST_DILATION
    if max(dilation) > most:
        return f"they take dilations up to {most}, got {max(dilation)}"
    most = _HOPPER_CHANNELS[function]
    if channels > most:
        return f"they take head dimensions up to {most}, got {channels}"
    most = _tiling_sm90.LARGEST_BIAS
    if bias_entries > most:
        return f"they take bias tables of up to {most} entries, got {bias_entries}"
    return None


def choose(
    implementation: str | None, platform: str, traits: Traits | None = None
) -> str:
    """The implementation that runs a call on ``platform``; None asks for the best.

    Raises:
        NotImplementedError: a named implementation cannot run there; the message says
            why, and which ones can.
    """
    return pick(implementation, lambda name: refusal(name, platform, traits))


def pick(implementation: str | None, reason_of: Callable[[str], str | None]) -> str:
    """As :func:`choose`; ``reason_of`` tells why an implementation cannot run the call."""
    able = [name for name in IMPLEMENTATIONS if reason_of(name) is None]
    if implementation is None:
        return able[0]
    reason = reason_of(implementation)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot run this call: {reason}. "
            f"On this platform these can: {', '.join(map(repr, able))}; None picks the "
            "first."
        )
    return implementation


@dataclasses.dataclass(frozen=True)
class Support:
    """What this installation can run.

    Attributes:
        refusals: by platform and implementation, None where it runs, else the reason
            why not. Platforms that are not listed run ``"xla"`` alone.
        cpu_instruction_set: what the CPU's fused kernels use on this machine, None
            without native CPU kernels.
        cuda_runtime: version of the CUDA runtime in the CUDA kernels, e.g. 13000 for
            13.0; None without them.
        cuda_driver: newest CUDA version that the installed driver supports; 0 without a
            driver, None without CUDA kernels.
        hopper: what of ``'fused'`` the kernels for Hopper (compute capability 9.0) run
            there, in words; None without CUDA kernels.
    """

    refusals: Mapping[str, Mapping[str, str | None]]
    cpu_instruction_set: str | None
    cuda_runtime: int | None
    cuda_driver: int | None
    hopper: str | None

    def __str__(self) -> str:
        lines = []
        for platform, reasons in self.refusals.items():
            lines.append(f"{platform}:")
            for implementation, reason in reasons.items():
                lines.append(f"  {implementation}: {reason or 'yes'}")
        if self.cpu_instruction_set is not None:
            lines.append(f"CPU instruction set: {self.cpu_instruction_set}")
        if self.cuda_runtime is not None:
            lines.append(
                f"CUDA runtime {self.cuda_runtime}, driver supports {self.cuda_driver}"
            )
        if self.hopper is not None:
            lines.append(
                f"kernels for Hopper GPUs (compute capability 9.0): {self.hopper}"
            )
        return "\n".join(lines)


def support() -> Support:
    """What this installation can run on each platform, and why not the rest.

    Starts no backend. ``print(jax_na.support())`` for a readable form;
    :func:`jax_na.explain` tells what one call does.
    """
    cpu, cuda = (_ffi.module(platform) for platform in NATIVE_PLATFORMS)
    refusals = {
        platform: {name: refusal(name, platform) for name in IMPLEMENTATIONS}
        for platform in NATIVE_PLATFORMS
    }
    driver = None if cuda is None else cuda.driver_version()
    if cuda is not None and driver < cuda.runtime_version():
        found = f"the driver supports CUDA {driver}" if driver else "there is no driver"
        reason = f"its kernels need CUDA {cuda.runtime_version()}, but {found}"
        refusals["cuda"] = {
            name: None if name == "xla" else own or reason
            for name, own in refusals["cuda"].items()
        }
    return Support(
        refusals,
        None if cpu is None else cpu.fused_instruction_set(),
        None if cuda is None else cuda.runtime_version(),
        driver,
        None if cuda is None else _HOPPER,
    )
