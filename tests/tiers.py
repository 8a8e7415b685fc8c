"""On a Hopper GPU ``'fused'`` has several kernels, of which tests can force some."""

from __future__ import annotations

import pytest

from jax_na import _plan, _support

TIERS = ("hopper", "at_once", "portable")


def force_tier(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    """For programs that are lowered from now on.

    ``"hopper"`` stands for the kernels for Hopper wherever they can run, be they slower,
    ``"at_once"`` for those too and the one that makes all gradients at once wherever it
    can, and ``"portable"`` for those of any NVIDIA GPU alone.
    """
    if tier != "portable":
        monkeypatch.setattr(_plan, "is_faster", lambda *_: True)
        at_once = tier == "at_once"
        monkeypatch.setattr(_plan, "is_faster_at_once", lambda *_: at_once)
    else:
        monkeypatch.setattr(_support, "hopper_refusal", lambda *_: "not in this test")
