"""Shared memory that the portable kernels of ``'fused'`` take.

Sizes are those of a CTA in bytes, as the ``Shared`` structures in ``cuda/fused`` are laid
out. ``cuda/fused/variants.h`` says what every GPU has, and the structures assert that they
fit.
"""

from __future__ import annotations

from jax_na import _tiling

_EVERY_GPU = 99 << 10  # kSharedBytes in cuda/fused/variants.h
_LARGEST_BIAS = 16 << 10  # as in cuda/fused/bias.cuh


def row_bytes(channels: int, element_bytes: int) -> int:
    """Of a token's channels, padded."""
    return _tiling.padded_channels(channels) * element_bytes


def forward(row_bytes: int, shape: _tiling.Shape, bias_entries: int | None) -> int:
    """Of the forward kernel with score tiles of that shape.

    ``bias_entries`` are those of one head's table; None without a bias.
    """
    rows, columns = shape
    stages = 2 if row_bytes <= 128 else 1
    tokens = rows + 2 * stages * columns
    size = tokens * row_bytes + _tile_tables(shape) + _bias_tables(shape) + 4
    return _with_bias(aligned(size), bias_entries)


def dquery(row_bytes: int, shape: _tiling.Shape, bias_entries: int | None) -> int:
    """Of the kernel for the gradient of the query."""
    rows, columns = shape
    tokens = 2 * (rows + _backward_stages(row_bytes) * columns)
    size = tokens * row_bytes + _tile_tables(shape)
    if bias_entries is None:
        return aligned(size)
    return _with_bias(aligned(size + _bias_tables(shape) + 4), bias_entries)


def dbias(row_bytes: int, shape: _tiling.Shape, bias_entries: int) -> int:
    """Of the kernel for the gradient of the bias."""
    rows, columns = shape
    stages = 2 if row_bytes <= 64 else 1
    size = stages * 2 * (rows + columns) * row_bytes
    size += _tile_tables(shape) + _bias_tables(shape)
    scores = 4 * rows * (columns + 2)
    return _with_bias(aligned(aligned(size, 8) + scores + 4), bias_entries, tables=2)


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
    size = tokens * row_bytes + statistics + _tile_tables(shape)
    if element_bytes == 2 and 128 < row_bytes <= 256:
        size = aligned(size, 16) + 2 * rows * columns  # weights for another warp
    return aligned(size if bias_entries is None else size + _bias_tables(shape))


def aligned(size: int, to: int = 128) -> int:
    return -(-size // to) * to


def row_tables(rows: int) -> int:
    """``RowTables``: intervals, origins and tokens of rows.

    ``cuda/fused/geometry.cuh`` asserts what this gives.
    """
    return 8 * (rows + 2) + 12 + 4 * rows


def _tile_tables(shape: _tiling.Shape) -> int:
    """``TileTables``: the same, and columns."""
    rows, columns = shape
    return aligned(row_tables(rows), 8) + 8 * columns


def _bias_tables(shape: _tiling.Shape) -> int:
    return 4 * sum(shape)


def _backward_stages(row_bytes: int) -> int:
    return 2 if row_bytes <= 256 else 1


def _with_bias(size: int, entries: int | None, tables: int = 1) -> int:
    """With so many tables of one head if there is room for them."""
    table = 4 * (entries or 0)
    room = min((_EVERY_GPU - size) // tables, _LARGEST_BIAS)
    return size + tables * table if table <= room else size
