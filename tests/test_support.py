"""What an installation says of itself, and of one call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from problems import implementations, platform
from tiers import force_tier

import jax_na
from jax_na import _explain, _ffi

NAMES = ("fused", "gemm", "naive", "xla")


def _shapes(
    head_dim: int = 8, dtype: Any = jnp.float32, grid: tuple[int, ...] = (6, 7)
) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((2, *grid, 4, head_dim), dtype)
    keys = jax.ShapeDtypeStruct((2, *grid, 2, head_dim), dtype)
    return {"query": tokens, "key": keys, "value": keys}


# ---- The installation ----------------------------------------------------------------


def test_support_names_platforms_implementations_and_reasons() -> None:
    support = jax_na.support()
    assert set(support.refusals) == {"cpu", "cuda"}
    for name, reasons in support.refusals.items():
        assert tuple(reasons) == NAMES
        assert reasons["xla"] is None  # runs everywhere
        for implementation, reason in reasons.items():
            if reason is None:
                continue
            assert len(reason) > 20, (name, implementation)
    able = [name for name, why in support.refusals[platform()].items() if why is None]
    assert tuple(able) == implementations()
    for part in ("cpu:", "cuda:", *NAMES):
        assert part in str(support)


def test_support_of_native_modules() -> None:
    support = jax_na.support()
    built = {name: _ffi.module(name) is not None for name in ("cpu", "cuda")}
    if built["cpu"]:
        assert support.cpu_instruction_set in ("avx512", "avx2", "baseline")
    else:
        assert support.cpu_instruction_set is None
    assert (support.cuda_runtime is not None) == built["cuda"]
    assert (support.cuda_driver is not None) == built["cuda"]
    assert ("Hopper" in str(support)) == (support.hopper is not None) == built["cuda"]
    if built["cuda"] and support.cuda_driver < support.cuda_runtime:
        reason = support.refusals["cuda"]["naive"]
        assert reason is not None and str(support.cuda_runtime) in reason


@pytest.mark.usefixtures("every_kernel")
def test_support_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_ffi.TARGETS, "cuda")
    monkeypatch.delitem(_ffi._LOADED, "cuda", raising=False)
    support = jax_na.support()
    for name in ("fused", "gemm", "naive"):
        reason = support.refusals["cuda"][name]
        assert reason is not None and "without its native kernels" in reason
    assert support.cuda_runtime is support.cuda_driver is support.hopper is None


def test_support_starts_no_backend() -> None:
    """So that it can be called before a program says which devices it wants."""
    program = """
import jax, jax_na
jax_na.support()
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    root = str(Path(jax_na.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {root!r})\n{program}"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- One call ------------------------------------------------------------------------


def test_explain_agrees_with_the_call() -> None:
    explanation = jax_na.explain(**_shapes(), kernel_size=(3, 3))
    assert explanation.platform == platform()
    assert explanation.implementation == implementations()[0]
    assert set(explanation.refusals) == set(NAMES) - set(implementations())
    assert repr(explanation.implementation) in str(explanation)
    for name, reason in explanation.refusals.items():
        assert repr(name) in str(explanation) and reason in str(explanation)


@pytest.mark.usefixtures("every_kernel")
def test_explain_other_platforms() -> None:
    def chosen(platform: str, **changes: Any) -> str:
        shapes = _shapes(**changes)
        return jax_na.explain(
            **shapes, kernel_size=(3, 3), platform=platform
        ).implementation

    assert chosen("cpu") == "fused"
    assert chosen("cuda") == "fused"
    assert chosen("cuda", head_dim=5) == "naive"
    assert chosen("tpu") == chosen("rocm") == "xla"
    explanation = jax_na.explain(
        **_shapes(head_dim=264), kernel_size=(3, 3), platform="cuda"
    )
    assert "264" in explanation.refusals["fused"]
    assert set(explanation.refusals) == {"fused", "gemm"}


def test_explain_counts_the_work() -> None:
    """Of visible pairs alone: a causal axis of L tokens has fewer than k L."""
    arguments: dict[str, Any] = {"kernel_size": (3, 2), "is_causal": (False, True)}
    mask = jax_na.window_mask((6, 7), **arguments)
    explanation = jax_na.explain(**_shapes(), **arguments)
    assert explanation.visible_pairs == int(mask.sum())
    samples, heads, channels = 2, 4, 8 + 8
    expected = 2 * channels * explanation.visible_pairs * samples * heads
    assert explanation.forward_flops == expected
    assert explanation.backward_flops == expected * 5 // 2
    framed = jax_na.explain(**_shapes(), **arguments, frame=jax_na.Frame((4, 5)))
    assert framed.visible_pairs >= explanation.visible_pairs


def test_explain_takes_every_argument_of_the_call() -> None:
    explanation = jax_na.explain(
        **_shapes(),
        kernel_size=(3, 3),
        stride=2,
        dilation=(1, 2),
        is_causal=True,
        scale=1.0,
        rel_pos_bias=jnp.ones((4, 5, 5)),
        additional_keys=jnp.ones((2, 3, 2, 8)),
        additional_values=jnp.ones((2, 3, 2, 8)),
        return_lse=True,
        precision="highest",
        deterministic_grads=True,
        implementation="xla",
    )
    assert explanation.implementation == "xla"


# sizeof(Shared) of the kernels, from nvcc, by padded dimension and bytes of an element:
# forward, dQ, dQ with a bias, dbias, dK and dV, those with a bias; then pair, gather and
# scatter of 'gemm'.
FUSED_SHARED = {
    (32, 2): (22400, 25984, 26496, 51584, 27008, 27520),
    (96, 2): (38784, 75136, 75648, 67968, 84352, 84864),
    (128, 2): (51072, 99712, 100224, 84352, 71296, 71680),
    (256, 2): (100224, 99456, 99840, 70912, 99968, 100352),
    (64, 4): (51072, 99712, 100224, 84352, 100736, 101248),
    (192, 4): (74752, 99072, 99328, 76800, 99584, 99840),
    (256, 4): (99328, 98944, 99072, 101376, 99200, 99328),
}
GEMM_SHARED = {
    (32, 2): (33152, 31104, 44544),
    (256, 2): (77440, 46720, 51456),
    (64, 4): (70016, 72064, 69120),
    (256, 4): (71936, 77056, 83840),
}


def _launches(
    head_dim: int,
    element_bytes: int,
    window: int = 3,
    **arguments: Any,
) -> tuple[dict[str, int], dict[str, int]]:
    """Shared memory by kernel, of the forward and of the backward pass."""
    dtype = jnp.dtype({2: "bfloat16", 4: "float32"}[element_bytes])
    explanation = jax_na.explain(
        **_shapes(head_dim, dtype, grid=(2 * window, 2 * window)),
        kernel_size=(window, window),
        platform="cuda",
        **arguments,
    )
    kernels = explanation.portable
    assert kernels is not None
    passes = kernels.forward, kernels.backward
    assert all(launch.kernel in str(kernels) for p in passes for launch in p)
    forward, backward = ({x.kernel: x.shared_bytes for x in p} for p in passes)
    return forward, backward


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize(("dim", "element"), FUSED_SHARED)
def test_launches_of_fused(dim: int, element: int) -> None:
    forward, dquery, dquery_with_bias, dbias, dkey, dkey_with_bias = FUSED_SHARED[
        dim, element
    ]
    backward = {"delta": 0, "dquery": dquery}
    names = ("dkey, dvalue",) if dim <= 128 else ("dkey", "dvalue")
    backward |= dict.fromkeys(names, dkey)
    assert _launches(dim, element) == ({"forward": forward}, backward)

    table = 5 * 5 * 4
    own, gradients = _launches(dim, element, rel_pos_bias=jnp.ones((4, 5, 5)))
    assert own == {"forward": forward + table}
    assert gradients["dquery"] == dquery_with_bias + table
    assert {gradients[name] for name in names} == {dkey_with_bias}
    room = (99 << 10) - dbias
    assert gradients["dbias"] == dbias + (2 * table if 2 * table <= room else 0)


@pytest.mark.usefixtures("every_kernel")
def test_launches_of_additional_keys_and_partial_sums() -> None:
    additional = {
        f"additional_{name}": jnp.ones((2, 3, 2, 32), jnp.bfloat16)
        for name in ("keys", "values")
    }
    bias = jnp.ones((4, 5, 5))
    _, backward = _launches(32, 2, rel_pos_bias=bias, **additional)
    assert {"sum of dbias", "dadditional_key, dadditional_value"} <= set(backward)
    assert backward["sum of dbias"] == 0
    naive = _launches(32, 2, rel_pos_bias=bias, implementation="naive", **additional)
    assert [len(launches) for launches in naive] == [1, 4]


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize(("dim", "element"), GEMM_SHARED)
def test_launches_of_gemm(dim: int, element: int) -> None:
    pair, gather, scatter = GEMM_SHARED[dim, element]
    assert _launches(dim, element, implementation="gemm") == (
        {"scores": pair, "out": gather},
        {
            "scores": pair,
            "dweights": pair,
            "dquery": gather,
            "dkey": scatter,
            "dvalue": scatter,
        },
    )


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("window", [3, 8, 16, 31])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_kernels_fit_every_gpu(head_dim: int, element_bytes: int, window: int) -> None:
    """Also beside tables of a bias, which else stay where they are."""
    table = jnp.ones((4, 2 * window - 1, 2 * window - 1))
    for passes in _launches(head_dim, element_bytes, window, rel_pos_bias=table):
        assert max(passes.values()) <= 99 << 10


def test_launches_are_those_of_cuda() -> None:
    explanation = jax_na.explain(
        **_shapes(), kernel_size=(3, 3), implementation="xla", platform="cuda"
    )
    assert explanation.portable is explanation.hopper is None
    assert (
        jax_na.explain(**_shapes(), kernel_size=(3, 3), platform="tpu").kernels is None
    )


@pytest.mark.usefixtures("every_kernel")
def test_explain_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device at hand; of all that there may be where there is none."""

    def explain(capability: Any, dtype: Any) -> Any:
        monkeypatch.setattr(_explain, "_compute_capability", lambda: capability)
        tokens = jax.ShapeDtypeStruct((2, 64, 64, 4, 128), dtype)
        return jax_na.explain(tokens, tokens, tokens, (9, 9), platform="cuda")

    unknown = explain(None, jnp.bfloat16)
    assert not unknown.hopper_refusals and unknown.kernels is unknown.portable
    for part in ("Hopper GPUs", "other NVIDIA", unknown.hopper, unknown.portable):
        assert str(part) in str(unknown)
    hopper = explain((9, 0), jnp.bfloat16)
    assert hopper.kernels == hopper.hopper == unknown.hopper
    assert "9.0" in str(hopper) and str(hopper.portable) not in str(hopper)
    for capability in ((8, 0), (10, 0)):
        other = explain(capability, jnp.bfloat16)
        assert other.kernels == other.portable == unknown.portable
        assert str(other.hopper) not in str(other)
    refused = explain((9, 0), jnp.float32)
    assert refused.hopper is None and refused.kernels is refused.portable
    for function in ("forward", "backward"):
        reason = refused.hopper_refusals[function]
        assert "float32" in reason
        assert f"no {function} kernels for Hopper: {reason}" in str(refused)


@pytest.mark.usefixtures("every_kernel")
def test_launches_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    def launches(
        channels: int, deterministic: bool = True, **options: Any
    ) -> tuple[list[str], list[str]]:
        tokens = jax.ShapeDtypeStruct((2, 64, 64, 4, channels), jnp.bfloat16)
        options = {"kernel_size": (9, 9), **options}
        options["deterministic_grads"] = deterministic
        explanation = jax_na.explain(tokens, tokens, tokens, platform="cuda", **options)
        passes = explanation.hopper.forward, explanation.hopper.backward
        forward, backward = ([launch.kernel for launch in found] for found in passes)
        return forward, backward

    own = ["dquery", "dkey, dvalue"]
    assert launches(64) == (["forward"], ["delta", *own])
    assert launches(128) == (["forward"], ["delta", *own])
    assert launches(128, kernel_size=(33, 33)) == (["forward"], own)
    force_tier(monkeypatch, "at_once")
    assert launches(64, deterministic=False) == (
        ["forward"],
        ["delta", "dquery, dkey, dvalue", "sum of dquery"],
    )
    _, backward = launches(
        64,
        rel_pos_bias=jnp.ones((4, 17, 17)),
        additional_keys=jnp.ones((2, 3, 4, 64), jnp.bfloat16),
        additional_values=jnp.ones((2, 3, 4, 64), jnp.bfloat16),
    )
    assert backward[:4] == ["delta", *own, "dbias"]
    assert "dadditional_key, dadditional_value" in backward
    assert launches(256) == (["forward"], ["delta", "dquery", "dkey", "dvalue"])
    assert launches(32)[1] == ["delta", *own]


def test_explain_refuses_what_the_call_refuses() -> None:
    with pytest.raises(ValueError, match="stride"):
        jax_na.explain(**_shapes(), kernel_size=(3, 3), stride=4)
    with pytest.raises(ValueError, match="implementation"):
        jax_na.explain(**_shapes(), kernel_size=(3, 3), implementation="best")
    with pytest.raises(NotImplementedError, match="these can: 'xla'"):
        jax_na.explain(
            **_shapes(), kernel_size=(3, 3), platform="tpu", implementation="naive"
        )
