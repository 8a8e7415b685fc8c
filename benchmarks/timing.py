"""Device time of one call: what the GPU's own clock says of its kernels.

For JAX from the profiler (the sum of the kernels' durations, so that neither dispatch nor
gaps count), for PyTorch likewise. On a CPU there is no such clock; see cpu.py there.
"""

from __future__ import annotations

import glob
import statistics
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax


def _median_of_equal_parts(durations: list[float], calls: int, name: str) -> float:
    """Median over the calls, which all launch the same kernels in the same order."""
    if not durations or len(durations) % calls:
        raise RuntimeError(
            f"{name}: the profiler saw {len(durations)} kernels in {calls} calls"
        )
    size = len(durations) // calls
    parts = [sum(durations[i : i + size]) for i in range(0, len(durations), size)]
    return statistics.median(parts)


def _jax_kernels(directory: str) -> Iterable[tuple[float, float, str]]:
    """(start, duration, name) of everything that ran on the GPU; nanoseconds."""
    (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield event.start_ns, event.duration_ns, event.name


def _trace(
    call: Callable[[], Any], calls: int, warm_up: int
) -> list[tuple[float, float, str]]:
    """:func:`_jax_kernels` of that many calls, in order."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory)
        for _ in range(calls):
            jax.block_until_ready(call())
        jax.profiler.stop_trace()
        return sorted(_jax_kernels(directory))


def jax_milliseconds(
    call: Callable[[], Any], calls: int = 20, warm_up: int = 3
) -> float:
    """Median device time of a jitted call without arguments."""
    durations = [duration for _, duration, _ in _trace(call, calls, warm_up)]
    return _median_of_equal_parts(durations, calls, "jax") / 1e6


def jax_kernels(
    call: Callable[[], Any], calls: int = 10, warm_up: int = 2
) -> list[tuple[str, float]]:
    """Names of its kernels, in the order of their launches, and median milliseconds."""
    kernels = _trace(call, calls, warm_up)
    if not kernels or len(kernels) % calls:
        raise RuntimeError(f"the profiler saw {len(kernels)} kernels in {calls} calls")
    size = len(kernels) // calls
    return [
        (
            kernels[index][2],
            statistics.median(duration for _, duration, _ in kernels[index::size])
            / 1e6,
        )
        for index in range(size)
    ]


def torch_milliseconds(
    call: Callable[[], Any], calls: int = 20, warm_up: int = 3
) -> float:
    """The same of a PyTorch call."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = sorted(
        (event.time_range.start, event.time_range.elapsed_us())
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return _median_of_equal_parts([d for _, d in kernels], calls, "torch") / 1e3
