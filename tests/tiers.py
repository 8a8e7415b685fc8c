"""On a Hopper GPU ``'fused'`` has two tiers of kernels, of which tests can force one."""

from __future__ import annotations

import pytest

from jax_na import _plan, _support

TIERS = ("hopper", "portable")


def force_tier(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    """For programs that are lowered from now on.

    ``"hopper"`` stands for the kernels for Hopper wherever they can run, be they slower,
    and ``"portable"`` for those of any NVIDIA GPU alone.
    """
    if tier == "hopper":
        monkeypatch.setattr(_plan, "is_faster", lambda *_: True)
    else:
        monkeypatch.setattr(_support, "hopper_refusal", lambda *_: "not in this test")
