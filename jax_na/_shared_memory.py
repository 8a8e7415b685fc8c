"""Shared memory that the portable kernels of ``'fused'`` take, and that GPUs have.

Sizes are those of a CTA in bytes, as the ``Shared`` structures in ``cuda/fused`` are laid
out. Kernels for gradients of wide heads take more than the small GPUs have.
"""

from __future__ import annotations

import jax

from jax_na import _tiling

_LARGEST_BIAS = 16 << 10  # as in cuda/fused/bias.cuh
_LIST = 64 * 8  # columns that are a list of additional keys, beside TileTables

# KiB that a CTA can have, by compute capability ("Technical Specifications per Compute
# Capability" of the CUDA C++ Programming Guide).
_KIB = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (11, 0): 227,
    (12, 0): 99,
    (12, 1): 99,
}


def compute_capabilities() -> list[tuple[int, int]]:
    """Those of the local CUDA devices."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return []
    versions = (device.compute_capability.split(".") for device in devices)
    return [(int(major), int(minor)) for major, minor in versions]


def refusal(
    function: str, channels: int, element_bytes: int, bias_entries: int | None
) -> str | None:
    """Why the kernels of ``'fused'`` cannot run on a local CUDA device; None if they can.

    Args:
        function: "forward" or "backward".
        channels: of a head, the more of those of query and value.
        element_bytes: of query, key and value.
        bias_entries: of one head's table; None without a bias.
    """
    needed = largest(function, channels, element_bytes, bias_entries)
    for capability in compute_capabilities():
        # A GPU that is newer than this table has at least as much, or says so itself.
        kib = _KIB.get(capability)
        if kib is not None and needed > kib << 10:
            major, minor = capability
            return (
                f"its {function} kernels take {needed / 1024:.4g} KiB of shared memory "
                f"here, and GPUs of compute capability {major}.{minor} have {kib} KiB"
            )
    return None


def largest(
    function: str, channels: int, element_bytes: int, bias_entries: int | None
) -> int:
    """The most that a CTA takes; arguments as of :func:`refusal`."""
    variant = _tiling.variant_of(channels, element_bytes)
    size = row_bytes(channels, element_bytes)
    if function == "forward":
        return max(forward(size, shape, bias_entries) for shape in variant.forward)
    sizes = [dquery(size, shape, bias_entries) for shape in variant.dquery]
    if bias_entries is not None:
        sizes += [dbias(size, shape, bias_entries) for shape in variant.dbias]
    sizes += [dkey(size, shape, element_bytes, bias_entries) for shape in variant.dkey]
    return max(sizes)


# ---- Kernels -------------------------------------------------------------------------


def row_bytes(channels: int, element_bytes: int) -> int:
    """Of a token's channels, padded."""
    return _tiling.padded_channels(channels) * element_bytes


def forward(row_bytes: int, shape: _tiling.Shape, bias_entries: int | None) -> int:
    """Of the forward kernel with score tiles of that shape."""
    rows, columns = shape
    stages = 2 if row_bytes <= 128 else 1
    tokens = rows + 2 * stages * columns
    size = tokens * row_bytes + tables(rows) + _LIST + _bias_tables(rows) + 4
    return aligned(size) + _shared_bias(bias_entries)


def dquery(row_bytes: int, shape: _tiling.Shape, bias_entries: int | None) -> int:
    """Of the kernel for the gradient of the query."""
    rows, columns = shape
    tokens = 2 * (rows + _backward_stages(row_bytes) * columns)
    size = tokens * row_bytes + tables(rows) + _LIST
    if bias_entries is None:
        return aligned(size)
    return aligned(size + _bias_tables(rows) + 4) + _shared_bias(bias_entries)


def dbias(row_bytes: int, shape: _tiling.Shape, bias_entries: int) -> int:
    """Of the kernel for the gradient of the bias."""
    rows, columns = shape
    stages = 2 if row_bytes <= 64 else 1
    size = stages * 2 * (rows + columns) * row_bytes + tables(rows) + _bias_tables(rows)
    scores = 4 * rows * (columns + 2)
    return aligned(aligned(size, 8) + scores + 4) + 2 * _shared_bias(bias_entries)


def dkey(
    row_bytes: int,
    shape: _tiling.Shape,
    element_bytes: int,
    bias_entries: int | None,
) -> int:
    """Of the kernels for the gradients of key and value."""
    rows, columns = shape
    tokens = 2 * (rows + _backward_stages(row_bytes) * columns)
    statistics = 2 * 2 * 4 * columns
    size = aligned(tokens * row_bytes + statistics + tables(rows))
    if element_bytes == 2 and 128 < row_bytes <= 256:
        size += 2 * rows * columns  # weights that one warp makes for another
    return size if bias_entries is None else aligned(size + _bias_tables(rows))


def aligned(size: int, to: int = 128) -> int:
    return -(-size // to) * to


def tables(rows: int) -> int:
    """``TileTables``: intervals, origins, tokens of rows, columns.

    ``cuda/fused/geometry.cuh`` asserts what this gives.
    """
    return aligned(12 * (rows + 2) + 12 + 4 * rows, 8) + 64 * 8


def _bias_tables(rows: int) -> int:
    return 4 * (rows + 64)


def _backward_stages(row_bytes: int) -> int:
    return 2 if row_bytes <= 256 else 1


def _shared_bias(entries: int | None) -> int:
    """Of one head's table; a large one is not brought to shared memory."""
    size = 4 * (entries or 0)
    return size if size <= _LARGEST_BIAS else 0
