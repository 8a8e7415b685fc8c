"""What array types say of meshes: how an array is sharded, and where it varies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def updated(aval: Any, shape: tuple[int, ...], dtype: Any, kept_axes: int) -> Any:
    """``aval`` with another shape; the sharding of its first ``kept_axes`` axes stays.

    ``update`` also keeps the manual axes over which the value varies in a shard_map.
    """
    kept = (*aval.sharding.spec, *(None,) * aval.ndim)[:kept_axes]
    spec = PartitionSpec(*kept, *(None,) * (len(shape) - kept_axes))
    return aval.update(
        shape=shape, dtype=dtype, sharding=aval.sharding.update(spec=spec)
    )


def varying_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """``array``, varying over at least the manual axes over which ``other`` varies."""
    missing = jax.typeof(other).mat.varying - jax.typeof(array).mat.varying
    return jax.lax.pcast(array, tuple(missing), to="varying") if missing else array


def automatic(
    function: Callable[..., Sequence[jax.Array]], types: Sequence[Any]
) -> Callable[..., Sequence[jax.Array]]:
    """``function`` with every explicit mesh axis left to the compiler.

    Reshapes split and join sharded axes in there, which JAX would refuse, although XLA
    knows what to do.

    Args:
        function: takes arrays, or None.
        types: avals of the results, whose sharding they get.
    """

    def call(*operands: jax.Array | None) -> Sequence[jax.Array]:
        explicit = set()
        for array in operands:
            if array is not None:
                mesh = jax.typeof(array).sharding.mesh
                kinds = zip(mesh.axis_names, mesh.axis_types)
                explicit |= {name for name, kind in kinds if kind is AxisType.Explicit}
        if not explicit:
            return function(*operands)
        present = [array for array in operands if array is not None]

        def fill(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            rest = iter(arrays)
            return tuple(
                function(*(None if x is None else next(rest) for x in operands))
            )

        return jax.sharding.auto_axes(
            fill,
            axes=tuple(explicit),
            out_sharding=tuple(aval.sharding for aval in types),
        )(*present)

    return call
