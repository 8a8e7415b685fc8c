"""What every test of this folder needs before JAX starts."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest
from tiers import TIERS, force_tier

import jax_na._ffi

# Fake devices for the sharding tests; programs of one device do not notice them. They
# must be set before the first array exists.
jax.config.update("jax_num_cpu_devices", 8)

# GPUs round float32 to TF32 otherwise. Programs that tests start inherit it.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=TIERS,
        help="which kernels of 'fused' a Hopper GPU runs (default: as planned)",
    )


@pytest.fixture(scope="session", autouse=True)
def _chosen_tier(request: pytest.FixtureRequest) -> Iterator[None]:
    tier = request.config.getoption("--tier")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if tier is not None:
            force_tier(monkeypatch, tier)
        yield


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """For tests of what programs consist of: machine code that compiles fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every kernel of every platform had been built: for lowering alone."""
    attention, products = ("forward", "backward"), ("pair", "gather", "scatter")
    kernels = {
        "cpu": {"fused": attention, "naive": attention},
        "cuda": {"fused": attention, "gemm": products, "naive": attention + products},
    }
    for platform, functions_of in kernels.items():
        targets = frozenset(
            jax_na._ffi.target_name(function, implementation)
            for implementation, functions in functions_of.items()
            for function in functions
        )
        monkeypatch.setitem(jax_na._ffi.TARGETS, platform, targets)
