"""PyTorch's neighborhood attentions, where they happen to be importable."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import timing

Measure = Callable[[cases.Case, int], tuple[float, float]]


def _operands(case: cases.Case, shape: tuple[int, ...]) -> list[Any]:
    import torch

    dtype = getattr(torch, case.dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(
            shape, dtype=dtype, device="cuda", generator=generator, requires_grad=i < 3
        )
        for i in range(4)
    ]


def _measure(
    attend: Callable[..., Any], operands: list[Any], calls: int
) -> tuple[float, float]:
    import torch

    *inputs, cotangent = operands
    with torch.no_grad():
        forward = timing.torch_milliseconds(lambda: attend(*inputs), calls)
    out = attend(*inputs)
    backward = timing.torch_milliseconds(
        lambda: torch.autograd.grad(out, inputs, cotangent, retain_graph=True), calls
    )
    return forward, backward


def _flex_attention(case: cases.Case, calls: int) -> tuple[float, float]:
    """FlexAttention with a block mask of the window."""
    import torch
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from jax_na import _window

    torch._dynamo.reset()  # which else gives up after eight cases, and runs them unfused
    # The backward pass is called many times for one forward pass.
    torch._functorch.config.donated_buffer = False
    # Per axis and query: the residue class and the interval of visible keys.
    intervals = []
    for axis, length in enumerate(case.shape):
        window = (case.window[axis], case.stride[axis], case.dilation[axis])
        interval = _window.key_interval(
            np.arange(length), length, *window, case.is_causal[axis]
        )
        intervals.append([torch.as_tensor(part, device="cuda") for part in interval])

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        del batch, head
        seen = query >= 0  # not in place below: PyTorch maps this function over indices
        for axis in reversed(range(len(case.shape))):
            length, dilation = case.shape[axis], case.dilation[axis]
            residue, lo, hi = (part[query % length] for part in intervals[axis])
            index = key % length
            position = index // dilation
            inside = (position >= lo) & (position < hi)
            seen = seen & (index % dilation == residue) & inside
            query, key = query // length, key // length
        return seen

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens)
    attend = functools.partial(torch.compile(flex_attention), block_mask=mask)
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    return _measure(attend, _operands(case, shape), calls)


def _natten(backend: str, case: cases.Case, calls: int) -> tuple[float, float]:
    """NATTEN, best of the tile configurations that it offers for the backend."""
    import natten
    from natten import backends

    attend = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(case.shape)]
    operands = _operands(case, case.operand_shape)
    suffix = backend.replace("-", "_")
    configurations = getattr(backends, f"get_configs_for_{suffix}")(*operands[:3])
    backward_configurations = getattr(backends, f"get_bwd_configs_for_{suffix}")(
        *operands[:3]
    )
    times = []
    for index in range(max(len(configurations), len(backward_configurations))):
        forward = configurations[min(index, len(configurations) - 1)]
        backward = backward_configurations[min(index, len(backward_configurations) - 1)]
        call = functools.partial(
            attend,
            **case.window_arguments,
            backend=backend,
            q_tile_shape=forward[0],
            kv_tile_shape=forward[1],
            backward_q_tile_shape=backward[0],
            backward_kv_tile_shape=backward[1],
        )
        times.append(_measure(call, operands, calls))
    return min(f for f, _ in times), min(b for _, b in times)


PEERS: dict[str, Measure] = {}
if importlib.util.find_spec("torch") is not None:
    PEERS["FlexAttention"] = _flex_attention
if importlib.util.find_spec("natten") is not None:
    for _backend in ("hopper-fna", "cutlass-fna"):
        PEERS[f"NATTEN {_backend}"] = functools.partial(_natten, _backend)
