"""What ``transformers`` needs of the old natten package, for PyTorch on the CPU.

``transformers`` imports two functions from ``natten.functional``, which are gone now.
Here they are in plain PyTorch, by gathering every query's window; differentiable.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch


def _windows(length: int, kernel_size: int, dilation: int) -> torch.Tensor:
    """``[length, kernel_size]``: the keys of every query along one axis."""
    query = torch.arange(length)
    first = query % dilation  # of the tokens that can see each other
    count = (length - first + dilation - 1) // dilation
    start = query // dilation - kernel_size // 2
    start = torch.minimum(start.clamp(min=0), count - kernel_size)
    return first[:, None] + dilation * (start[:, None] + torch.arange(kernel_size))


def _rows_and_columns(
    grid: torch.Tensor, kernel_size: int, dilation: int
) -> list[torch.Tensor]:
    return [_windows(size, kernel_size, dilation) for size in grid.shape[2:4]]


def _gather(grid: torch.Tensor, windows: list[torch.Tensor]) -> torch.Tensor:
    """``[B, N, H, W, D]`` to ``[B, N, H, W, k, k, D]``."""
    rows, columns = windows
    return grid[:, :, rows[:, None, :, None], columns[None, :, None, :]]


def natten2dqkrpb(
    query: torch.Tensor,
    key: torch.Tensor,
    rpb: torch.Tensor,
    kernel_size: int,
    dilation: int,
) -> torch.Tensor:
    """Scores ``[B, N, H, W, k * k]`` of ``[B, N, H, W, D]``, positional bias added."""
    windows = _rows_and_columns(query, kernel_size, dilation)
    scores = torch.einsum("bnhwd,bnhwijd->bnhwij", query, _gather(key, windows))
    rows, columns = (
        (keys - torch.arange(len(keys))[:, None]) // dilation + kernel_size - 1
        for keys in windows
    )
    scores = scores + rpb[:, rows[:, None, :, None], columns[None, :, None, :]]
    return scores.flatten(-2)


def natten2dav(
    weights: torch.Tensor, value: torch.Tensor, kernel_size: int, dilation: int
) -> torch.Tensor:
    """Weighted sums ``[B, N, H, W, D]`` of the values in every window."""
    windows = _rows_and_columns(value, kernel_size, dilation)
    weights = weights.unflatten(-1, (kernel_size, kernel_size))
    return torch.einsum("bnhwij,bnhwijd->bnhwd", weights, _gather(value, windows))


@contextlib.contextmanager
def natten_installed() -> Iterator[Any]:
    """Makes ``transformers`` find the functions above; gives its DiNAT module."""
    functional = types.ModuleType("natten.functional")
    functional.natten2dqkrpb = natten2dqkrpb
    functional.natten2dav = natten2dav
    package = types.ModuleType("natten")
    package.functional = functional
    modules = {"natten": package, "natten.functional": functional}

    from transformers.utils import import_utils

    saved = import_utils._natten_available
    import_utils._natten_available = True
    sys.modules.update(modules)
    try:
        from transformers.models.dinat import modeling_dinat

        yield modeling_dinat
    finally:
        import_utils._natten_available = saved
        for name in modules:
            del sys.modules[name]
