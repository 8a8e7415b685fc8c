"""The public functions: arguments checked, made canonical, and bound to primitives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_na import _lowering as _lowering  # registers the lowering rules
from jax_na import _problem, _support, _unfused
from jax_na import _unfused_lowering as _unfused_lowering  # the same of its primitives
from jax_na._frame import Frame
from jax_na._primitives import forward_p, pack
from jax_na._problem import Operands, Problem
from jax_na._sharding import automatic, updated
from jax_na._support import Implementation

PerAxisInt: TypeAlias = int | Sequence[int]
PerAxisBool: TypeAlias = bool | Sequence[bool]


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`neighborhood_attention`."""

    stride: PerAxisInt
    dilation: PerAxisInt
    is_causal: PerAxisBool
    scale: float | None
    rel_pos_bias: ArrayLike | None
    additional_keys: ArrayLike | None
    additional_values: ArrayLike | None
    frame: Frame | None
    return_lse: bool
    precision: Any
    deterministic_grads: bool | None
    implementation: Implementation | None


def vary_alike(operands: Operands) -> Operands:
    """Casts all operands to vary over the same manual axes of a ``shard_map``.

    Own primitives are not checked for that: without the cast, the gradient of an operand
    that is replicated next to one that varies would lack its sum over the shards.
    """
    varying = {
        name: jax.typeof(array).mat.varying
        for name, array in operands._asdict().items()
        if array is not None
    }
    union = frozenset().union(*varying.values())
    return operands._replace(
        **{
            name: jax.lax.pcast(
                getattr(operands, name), tuple(union - axes), to="varying"
            )
            for name, axes in varying.items()
            if union - axes
        }
    )


def _attention(
    rank: int,
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Any,
    *,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    **options: Any,
) -> Any:
    problem, operands = canonical_call(rank, query, key, value, kernel_size, **options)
    _support.check_implementation(implementation)
    arrays, present = pack(vary_alike(operands))
    out, lse = forward_p.bind(
        *arrays, present=present, problem=problem, implementation=implementation
    )
    return (out, lse) if return_lse else out


def canonical_call(
    rank: int,
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Any,
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: Any = None,
    rel_pos_bias: Any = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    frame: Any = None,
    precision: Any = None,
    deterministic_grads: Any = None,
) -> tuple[Problem, Operands]:
    """Checked static parameters and operands of one attention call."""
    query, key, value = _problem.as_arrays(query=query, key=key, value=value)
    _problem.check_grid("query", query, rank)
    problem = _problem.make_problem(
        rank,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale=scale,
        head_dim=query.shape[-1],
        precision=precision,
        deterministic_grads=deterministic_grads,
    )
    operands = _problem.make_operands(
        problem,
        query,
        key,
        value,
        rel_pos_bias,
        additional_keys,
        additional_values,
        frame,
    )
    return problem, operands


def rank_of(kernel_size: Any) -> int:
    """Rank of a call of :func:`neighborhood_attention` and its unfused relatives."""
    return _problem.rank_of(
        kernel_size, "a function of known rank, such as jax_na.na2d"
    )


# ---- Attention -----------------------------------------------------------------------


def neighborhood_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kernel_size: Sequence[int],
    *,
    stride: PerAxisInt = 1,
    dilation: PerAxisInt = 1,
    is_causal: PerAxisBool = False,
    scale: float | None = None,
    rel_pos_bias: ArrayLike | None = None,
    additional_keys: ArrayLike | None = None,
    additional_values: ArrayLike | None = None,
    frame: Frame | None = None,
    return_lse: bool = False,
    precision: Any = None,
    deterministic_grads: bool | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Attention of every token of a 1-D, 2-D or 3-D grid to the tokens nearest to it.

    ``out = softmax(scale * query . key + rel_pos_bias) . value`` over the keys of each
    query's window and the additional keys (Hassani et al., "Faster Neighborhood
    Attention", arXiv 2403.04690; the form with a stride: arXiv 2504.16922).

    The shapes are those of ``jax.nn.dot_product_attention`` with the sequence axis
    replaced by the grid. ``*batch`` is any number of axes, none included.

    Differentiable to any order in both modes, with respect to ``query``, ``key``,
    ``value``, ``rel_pos_bias`` and the additional keys and values; the cotangent of lse
    is honoured. ``jax.checkpoint`` policies can save the results under the names
    ``"jax_na_out"`` and ``"jax_na_lse"``.

    Args:
        query: ``[*batch, *grid, N, D]``, float64, float32, float16 or bfloat16.
        key: ``[*batch, *grid, K, D]`` of the same dtype, with N a multiple of K; query
            head h reads key head ``h // (N // K)``.
        value: ``[*batch, *grid, K, Dv]`` of the same dtype.
        kernel_size: window length per axis, in tokens; its length is the grid's rank.
        stride: neighboring queries that share one window, per axis, at most
            ``kernel_size``; 1 centres every query in its window. Integers here and
            below stand for every axis.
        dilation: distance between neighboring keys of a window, per axis.
        is_causal: whether a query sees no key after itself, per axis.
        scale: factor of the scores, static. Default ``D ** -0.5``.
        rel_pos_bias: ``[N, *(2 * kernel_size - 1)]`` of any floating dtype, added to the
            scaled scores by the offset of key and query; the middle entry is for a
            query's own token.
        additional_keys: ``[*batch, M, K, D]``, seen by every query of the grid.
        additional_values: ``[*batch, M, K, Dv]``.
        frame: placement of the arrays in a larger or padded grid, see
            :class:`jax_na.Frame`; with one, the grids of query and key may differ.
        return_lse: whether to return the log-sum-exp of the scores too.
        precision: ``jax.lax.Precision`` or its name. None follows
            ``jax_default_matmul_precision``. For float32 on a GPU the default may use
            TF32 tensor cores; ``"highest"`` never does.
        deterministic_grads: True: gradients are bitwise equal in every run. False: sums
            may be made in any order where that is faster, as ``"fused"`` does for the
            query's gradient in some calls on Hopper GPUs. None reads XLA's determinism
            flags in the environment variable ``XLA_FLAGS``; flags given to a single
            ``jit`` are not seen.
        implementation: ``"fused"``, ``"gemm"``, ``"naive"`` or ``"xla"``. None: the best
            that supports the call on the platform it is compiled for.

    Returns:
        ``out [*batch, *grid, N, Dv]`` in the query's dtype; with ``return_lse`` the pair
        ``(out, lse)``, ``lse [*batch, *grid, N]`` being ``ln sum exp(score)`` in
        float32 (float64 for float64). A query that sees nothing has ``out = 0`` and
        ``lse = -inf``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names the argument, its
            value and the rule. Without a frame, ``kernel_size * dilation`` must not
            exceed the grid.
        NotImplementedError: the named implementation cannot run the call on the
            platform; raised when the call is compiled.
    """
    return _attention(
        rank_of(kernel_size),
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        rel_pos_bias=rel_pos_bias,
        additional_keys=additional_keys,
        additional_values=additional_values,
        frame=frame,
        return_lse=return_lse,
        precision=precision,
        deterministic_grads=deterministic_grads,
        implementation=implementation,
    )


def na1d(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kernel_size: PerAxisInt,
    **options: Unpack[Options],
) -> Any:
    """:func:`neighborhood_attention` over a sequence.

    Args:
        query: ``[*batch, length, N, D]``.
        key: ``[*batch, length, K, D]``.
        value: ``[*batch, length, K, Dv]``.
        kernel_size: window length, an int or a sequence of one.
        **options: keyword arguments of :func:`neighborhood_attention`.
    """
    return _attention(1, query, key, value, kernel_size, **options)


def na2d(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kernel_size: PerAxisInt,
    **options: Unpack[Options],
) -> Any:
    """:func:`neighborhood_attention` over an image or feature map.

    Args:
        query: ``[*batch, height, width, N, D]``.
        key: ``[*batch, height, width, K, D]``.
        value: ``[*batch, height, width, K, Dv]``.
        kernel_size: window length, an int for both axes or one per axis.
        **options: keyword arguments of :func:`neighborhood_attention`.
    """
    return _attention(2, query, key, value, kernel_size, **options)


def na3d(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kernel_size: PerAxisInt,
    **options: Unpack[Options],
) -> Any:
    """:func:`neighborhood_attention` over a video or volume.

    Args:
        query: ``[*batch, depth, height, width, N, D]``.
        key: ``[*batch, depth, height, width, K, D]``.
        value: ``[*batch, depth, height, width, K, Dv]``.
        kernel_size: window length, an int for all axes or one per axis.
        **options: keyword arguments of :func:`neighborhood_attention`.
    """
    return _attention(3, query, key, value, kernel_size, **options)


# ---- Unfused -------------------------------------------------------------------------


def na_qk(
    query: ArrayLike,
    key: ArrayLike,
    kernel_size: Sequence[int],
    *,
    stride: PerAxisInt = 1,
    dilation: PerAxisInt = 1,
    is_causal: PerAxisBool = False,
    scale: float | None = None,
    rel_pos_bias: ArrayLike | None = None,
    frame: Frame | None = None,
    precision: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Scores of every query's window, the first half of unfused attention.

    ``jax_na.na_av(jax.nn.softmax(jax_na.na_qk(...)), value, ...)`` is
    :func:`neighborhood_attention` without additional keys, with the weights at hand
    in between.

    Args:
        query: ``[*batch, *grid, N, D]``.
        key: ``[*batch, *grid, K, D]``.
        kernel_size: one entry per grid axis. This and the other arguments are those of
            :func:`neighborhood_attention`.
        implementation: ``"gemm"``, ``"naive"`` or ``"xla"``. None: the best that
            supports the call on the platform it is compiled for.

    Returns:
        ``[*batch, *grid, N, prod(kernel_size)]`` in the query's dtype. Slot j of an axis
        is the j-th key of the window, the last axis varies fastest; slots that no key
        fills are -inf and have no gradient.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`neighborhood_attention`.
    """
    rank = rank_of(kernel_size)
    query, key = _problem.as_arrays(query=query, key=key)
    for name, array in (("query", query), ("key", key)):
        _problem.check_grid(name, array, rank)
    problem = _problem.make_problem(
        rank,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale=scale,
        head_dim=query.shape[-1],
        precision=precision,
    )
    _problem.check_pair(("query", query), ("key", key), rank, frame is None)
    _problem.check_head_dim(query, key)
    _problem.check_heads("query", query.shape[-2], key.shape[-2])
    if frame is None:
        _problem.check_window_fits(problem, query.shape[-rank - 2 : -2])
    batch = query.shape[: -rank - 2]
    bias = _problem.canonical_bias(
        rel_pos_bias, problem, query.shape[-2], len(batch), query.dtype
    )
    packed_frame = _problem.canonical_frame(frame, batch, rank)
    _support.check_implementation(implementation)
    operands = vary_alike(Operands(query, key, None, bias, frame=packed_frame))

    def scores(*arrays: Any) -> jax.Array:
        return _unfused.scores(*arrays, problem, implementation, query.dtype)

    return _like_first(
        scores,
        math.prod(problem.kernel_size),
        operands.query,
        operands.key,
        operands.bias,
        operands.frame,
    )


def na_av(
    weights: ArrayLike,
    value: ArrayLike,
    kernel_size: Sequence[int],
    *,
    stride: PerAxisInt = 1,
    dilation: PerAxisInt = 1,
    is_causal: PerAxisBool = False,
    frame: Frame | None = None,
    precision: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Weighted sums of every query's window, the second half of unfused attention.

    Args:
        weights: ``[*batch, *grid, N, prod(kernel_size)]`` in the order of
            :func:`na_qk`; slots that no key fills are ignored and have no gradient.
        value: ``[*batch, *grid, K, Dv]``.
        kernel_size: one entry per grid axis. This and the other arguments are those of
            :func:`neighborhood_attention`, ``implementation`` that of :func:`na_qk`.

    Returns:
        ``[*batch, *grid, N, Dv]`` in the weights' dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`neighborhood_attention`.
    """
    rank = rank_of(kernel_size)
    weights, value = _problem.as_arrays(weights=weights, value=value)
    for name, array in (("weights", weights), ("value", value)):
        _problem.check_grid(name, array, rank)
    problem = _problem.make_problem(
        rank, kernel_size, stride, dilation, is_causal, precision=precision
    )
    _problem.check_slots(weights, problem)
    _problem.check_pair(("weights", weights), ("value", value), rank, frame is None)
    _problem.check_heads("weights", weights.shape[-2], value.shape[-2])
    if frame is None:
        _problem.check_window_fits(problem, weights.shape[-rank - 2 : -2])
    packed_frame = _problem.canonical_frame(frame, weights.shape[: -rank - 2], rank)
    _support.check_implementation(implementation)
    operands = vary_alike(Operands(weights, value, None, frame=packed_frame))

    def sums(weights: Any, value: Any, frame: Any) -> jax.Array:
        return _unfused.gather(
            weights, value, frame, problem, implementation, weights.dtype
        )

    return _like_first(
        sums, value.shape[-1], operands.query, operands.key, operands.frame
    )


def _like_first(
    function: Callable[..., jax.Array], channels: int, *operands: Any
) -> jax.Array:
    """``function(*operands)``, which lies as the first operand, but in its last axis."""
    first = operands[0]
    kept = first.ndim - 1
    shape = (*first.shape[:kept], channels)
    result = updated(jax.typeof(first), shape, first.dtype, kept)
    return automatic(lambda *arrays: (function(*arrays),), [result])(*operands)[0]


# ---- Merging -------------------------------------------------------------------------


def merge_attentions(
    outputs: Sequence[ArrayLike] | jax.Array, lses: Sequence[ArrayLike] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from that over each set.

    Exact: ``out = sum_i exp(lse_i - lse) out_i`` with ``lse = ln sum_i exp(lse_i)``
    (Milakov and Gimelshein, arXiv 1805.02867).

    Args:
        outputs: arrays ``[..., Dv]`` of one shape and floating dtype, or one array with
            the parts stacked in front.
        lses: as many arrays ``[...]``, float32 or float64. A part with ``lse = -inf``
            saw nothing and has no weight, whatever its output holds.

    Returns:
        ``(out [..., Dv], lse [...])`` in the dtypes of the parts. Where every part is
        empty they are ``(0, -inf)`` with zero gradients.

    Raises:
        TypeError, ValueError: there are no parts, or they do not match; the message
            names the argument, its value and the rule.
    """
    outputs, lses = list(outputs), list(lses)
    if not outputs:
        raise ValueError("outputs must hold at least one part, got an empty sequence.")
    if len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must have the same number of parts, got {len(outputs)} "
            f"and {len(lses)}."
        )
    outputs = _parts("outputs", outputs)
    lses = _parts("lses", lses)
    if lses[0].shape != outputs[0].shape[:-1]:
        raise ValueError(
            f"lses must have the outputs' shape without the last axis, "
            f"{outputs[0].shape[:-1]}, got {lses[0].shape}."
        )
    accumulation = jnp.promote_types(
        lses[0].dtype, _problem.accumulation_dtype(outputs[0].dtype)
    )
    lse = jnp.stack(lses).astype(accumulation)
    out = jnp.stack(outputs).astype(accumulation)

    # Empty parts are selected away before any arithmetic, so that neither their values
    # nor their derivatives can turn into NaN.
    seen = ~jnp.isneginf(lse)
    some = seen.any(axis=0)
    largest = jax.lax.stop_gradient(jnp.where(some, lse.max(axis=0), 0.0))
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, lse, largest) - largest), 0.0)
    total = jnp.where(some, weight.sum(axis=0), 1.0)
    terms = jnp.where(seen[..., None], out, 0.0) * (weight / total)[..., None]
    merged_lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
    return terms.sum(axis=0).astype(outputs[0].dtype), merged_lse


def _parts(name: str, parts: list[Any]) -> list[jax.Array]:
    """Floating-point arrays of one dtype and shape."""
    arrays = _problem.as_arrays(
        **{f"{name}[{index}]": part for index, part in enumerate(parts)}
    )
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{name} must all have the same shape, got {array.shape} for "
                f"{name}[{index}] and {arrays[0].shape} for {name}[0]."
            )
    return arrays
