"""What every test of this folder needs before JAX starts."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

# Fake devices for the sharding tests; programs of one device do not notice them. They
# must be set before the first array exists.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """For tests of what programs consist of: machine code that compiles fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
