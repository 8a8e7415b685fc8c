"""Dense float64 oracle of neighborhood attention, in NumPy, for tests.

Written from the definition alone: the window, the masked softmax and the gradients are
stated here a second time, so that no error can hide in code that the oracle shares with
an implementation. It is slow and O(n^2); ``queries`` and :func:`key_gradients` evaluate
chosen rows of problems that are too large for that.

With P = softmax(scale q.k + bias) over the visible keys, O = P V, and cotangents dO of
the output and dL of its log-sum-exp, the gradients are (Dao et al., "FlashAttention",
arXiv 2205.14135, appendix B.2, plus the cotangent of the log-sum-exp)::

    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(dO * O) + dL)
    dQ = scale dS K    dK = scale dS^T Q   dBias = dS summed over equal offsets

Every result comes with its *magnitude*: the same sum taken with absolute values, which
says how large the terms are that may cancel, and so which error is mere rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray

# Query rows evaluated at once: bounds the memory of large problems.
_CHUNK = 512


class Result(NamedTuple):
    """A float64 array and the same sum taken with absolute values."""

    value: Array
    magnitude: Array


# ---- The window ----------------------------------------------------------------------


def visible_keys(
    query: int,
    length: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
) -> range:
    """Global indices of the keys that one query sees on one axis, in order.

    A query sees keys of its own residue class modulo the dilation only. ``stride``
    queries in a row share the window of their leader; near an edge the window shifts
    inward.
    """
    if not 0 <= query < length:
        return range(0)
    residue_class = range(query % dilation, length, dilation)
    position = query // dilation
    last = len(residue_class) - 1
    group = position // stride * stride
    if is_causal:
        leader = min(group + stride - 1, last)
        first, stop = max(leader - kernel_size + 1, 0), position + 1
    else:
        leader = min(group + stride // 2, last)
        first = max(0, min(leader - kernel_size // 2, last + 1 - kernel_size))
        stop = first + kernel_size
    return residue_class[first:stop]


def _per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    return tuple(value) if np.ndim(value) else (value,) * rank


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """Which local query sees which local key; tokens count in row-major order."""

    query_grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    window: tuple[tuple[int, int, int, bool], ...]  # per axis, as visible_keys takes it
    length: Array  # [samples, rank], as the two below
    query_origin: Array
    key_origin: Array

    @classmethod
    def make(
        cls,
        query_shape: Sequence[int],
        key_shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Any,
        dilation: Any,
        is_causal: Any,
        frame: Any,
    ) -> _Geometry:
        """From the shapes ``[*batch, *grid, heads, channels]`` of a call."""
        rank = len(kernel_size)
        batch = tuple(query_shape[: -rank - 2])
        query_grid = tuple(query_shape[-rank - 2 : -2])

        def placement(field: Any) -> Array:
            full = np.broadcast_to(np.asarray(field), (*batch, rank))
            return full.reshape(math.prod(batch), rank)

        return cls(
            query_grid,
            tuple(key_shape[-rank - 2 : -2]),
            tuple(
                zip(
                    kernel_size,
                    _per_axis(stride, rank),
                    _per_axis(dilation, rank),
                    _per_axis(is_causal, rank),
                    strict=True,
                )
            ),
            placement(query_grid if frame is None else frame.length),
            placement(0 if frame is None else frame.query_origin),
            placement(0 if frame is None else frame.key_origin),
        )

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(axis[0] for axis in self.window)

    def _global_queries(self, sample: int, tokens: Array) -> Array:
        """Global position ``[rank, tokens]`` of local queries."""
        local = np.stack(np.unravel_index(tokens, self.query_grid))
        return local + self.query_origin[sample][:, None]

    def _axis_slots(self, sample: int, axis: int, queries: Array) -> Array:
        """Local key coordinates ``[queries, kernel_size]`` of global queries.

        Slot j is the j-th key of the window; -1 past the window's end, and where the
        local array lacks the key.
        """
        length, size = int(self.length[sample, axis]), self.key_grid[axis]
        slots = np.full((len(queries), self.window[axis][0]), -1)
        for row, query in enumerate(queries.tolist()):
            keys = np.array(visible_keys(query, length, *self.window[axis]), np.int64)
            keys -= self.key_origin[sample, axis]
            slots[row, : len(keys)] = np.where((keys >= 0) & (keys < size), keys, -1)
        return slots

    def _axis_mask(self, sample: int, axis: int, queries: Array) -> Array:
        """Which local key coordinates ``[queries, keys]`` global queries see."""
        slots = self._axis_slots(sample, axis, queries)
        mask = np.zeros((len(queries), self.key_grid[axis]), bool)
        row, slot = np.nonzero(slots >= 0)
        mask[row, slots[row, slot]] = True
        return mask

    def _axis_bias(self, sample: int, axis: int, queries: Array, keys: Array) -> Array:
        """Bias row of global queries and local key coordinates, where visible."""
        kernel_size, _, dilation, _ = self.window[axis]
        position = keys + self.key_origin[sample, axis]
        return position // dilation - queries // dilation + kernel_size - 1

    def inside(self, sample: int, queries: Array) -> Array:
        """Whether each local query belongs to the grid at all."""
        position = self._global_queries(sample, queries)
        length = self.length[sample][:, None]
        return ((position >= 0) & (position < length)).all(axis=0)

    def block(self, sample: int, queries: Array) -> tuple[Array, Array, Array]:
        """The keys that some of ``queries`` may see, and the mask between the two.

        Returns:
            ``(keys, visible, bias_index)``: tokens ``[S]``, and bool and int
            ``[queries, S]``; the last numbers the elements of one head's bias table
            and is 0 where nothing is visible.
        """
        positions = self._global_queries(sample, queries)
        masks = [
            self._axis_mask(sample, axis, position)
            for axis, position in enumerate(positions)
        ]
        candidates = np.meshgrid(
            *(np.flatnonzero(mask.any(axis=0)) for mask in masks), indexing="ij"
        )
        coordinates = np.stack([axis.reshape(-1) for axis in candidates])
        visible = np.ones((len(queries), coordinates.shape[1]), bool)
        bias_index = np.zeros(visible.shape, np.int64)
        for axis, kernel_size in enumerate(self.kernel_size):
            visible &= masks[axis][:, coordinates[axis]]
            bias_index *= 2 * kernel_size - 1
            bias_index += self._axis_bias(
                sample, axis, positions[axis][:, None], coordinates[axis]
            )
        keys = np.ravel_multi_index(tuple(coordinates), self.key_grid)
        return keys, visible, np.where(visible, bias_index, 0)

    def observers(self, sample: int, keys: Array) -> Array:
        """The local queries that see any of the local ``keys``."""
        seen = np.ones((*self.query_grid, len(keys)), bool)
        for axis, coordinates in enumerate(np.unravel_index(keys, self.key_grid)):
            queries = np.arange(self.query_grid[axis])
            queries = queries + self.query_origin[sample, axis]
            mask = self._axis_mask(sample, axis, queries)[:, coordinates]
            shape = [1] * len(self.query_grid) + [len(keys)]
            shape[axis] = len(queries)
            seen &= mask.reshape(shape)
        return np.flatnonzero(seen.any(axis=-1))

    def slots(self, sample: int) -> tuple[Array, Array]:
        """Key token and bias index of every slot ``[queries, prod(kernel_size)]``.

        The last axis varies fastest; token -1 where a slot holds no key.
        """
        count = math.prod(self.query_grid)
        positions = self._global_queries(sample, np.arange(count))
        held: Array = np.ones((count, 1), bool)
        tokens: Array = np.zeros((count, 1), np.int64)
        bias_index: Array = np.zeros((count, 1), np.int64)
        for axis, (position, size) in enumerate(zip(positions, self.key_grid)):
            slots = self._axis_slots(sample, axis, position)
            rows = self._axis_bias(sample, axis, position[:, None], slots)
            extent = 2 * self.kernel_size[axis] - 1
            held = held[:, :, None] & (slots >= 0)[:, None]
            tokens = tokens[:, :, None] * size + slots[:, None]
            bias_index = bias_index[:, :, None] * extent + rows[:, None]
            held, tokens, bias_index = (
                table.reshape(count, -1) for table in (held, tokens, bias_index)
            )
        return np.where(held, tokens, -1), np.where(held, bias_index, 0)


# ---- Layout --------------------------------------------------------------------------


def _flatten(array: Any, rank: int) -> Array:
    """From ``[*batch, *grid, heads, channels]`` to one batch and one token axis."""
    array = np.asarray(array)
    batch, grid = array.shape[: -rank - 2], array.shape[-rank - 2 : -2]
    return array.reshape(math.prod(batch), math.prod(grid), *array.shape[-2:])


def _heads_first(array: Array, heads: int) -> Array:
    """``[tokens, K, channels]`` to float64 ``[heads, tokens, channels]``.

    Query head h reads key head h // (heads // K).
    """
    array = np.moveaxis(array.astype(np.float64), 1, 0)
    return np.repeat(array, heads // array.shape[0], axis=0)


def _heads_last(array: Array, key_heads: int) -> Array:
    """Sums the query heads that share a key head, and puts heads after tokens."""
    heads, tokens, channels = array.shape
    shape = (key_heads, heads // key_heads, tokens, channels)
    return np.moveaxis(array.reshape(shape).sum(axis=1), 0, 1)


def _sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes that broadcasting ``shape`` to ``array.shape`` adds."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and array.shape[i] != 1)
    return array.sum(axis=axes, keepdims=True)


# ---- Attention -----------------------------------------------------------------------


class _Attention:
    """One call in canonical form, evaluated by sample and chunk of queries."""

    def __init__(
        self,
        query: Any,
        key: Any,
        value: Any,
        kernel_size: Sequence[int],
        *,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
        rel_pos_bias: Any = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        frame: Any = None,
        dout: Any = None,
        dlse: Any = None,
    ):
        rank = len(kernel_size)
        shape = np.shape(query)
        self.batch, self.heads = tuple(shape[: -rank - 2]), shape[-2]
        self.table = tuple(2 * size - 1 for size in kernel_size)
        self.scale = shape[-1] ** -0.5 if scale is None else scale
        self.geometry = _Geometry.make(
            shape, np.shape(key), kernel_size, stride, dilation, is_causal, frame
        )
        self.query = _flatten(query, rank)
        self.key, self.value = _flatten(key, rank), _flatten(value, rank)
        self.key_heads, self.value_dim = self.value.shape[2:]
        self.additional = additional_keys is not None
        if self.additional:
            self.additional_keys = _flatten(additional_keys, 1)
            self.additional_values = _flatten(additional_values, 1)
        self.bias = None
        if rel_pos_bias is not None:
            full = (*self.batch, self.heads, *self.table)
            bias = np.broadcast_to(np.asarray(rel_pos_bias, np.float64), full)
            self.bias = bias.reshape(len(self.query), self.heads, math.prod(self.table))
        self.has_cotangents = dout is not None
        if self.has_cotangents:
            dlse = np.zeros(shape[:-1]) if dlse is None else np.asarray(dlse)
            self.dout = _flatten(dout, rank)
            self.dlse = _flatten(dlse[..., None], rank)

    def chunks(self, queries: Array) -> Iterator[slice]:
        """Slices of ``queries`` that are evaluated at once."""
        for start in range(0, len(queries), _CHUNK):
            yield slice(start, min(start + _CHUNK, len(queries)))

    def evaluate(self, sample: int, queries: Array) -> tuple[Array, dict[str, Result]]:
        """Some queries of one sample against all keys that they see.

        Returns:
            ``(keys, results)``: the tokens ``[S]`` of grid keys, and the queries' part
            of each result: out ``[R, N, Dv]``, lse ``[R, N, 1]``; given cotangents,
            query ``[R, N, D]``, key and value ``[S, K, channels]``, additional_keys and
            additional_values ``[M, K, channels]``, rel_pos_bias ``[N, table size]``.
        """
        keys, visible, bias_index = self.geometry.block(sample, queries)
        seen = len(keys)
        key, value = self.key[sample, keys], self.value[sample, keys]
        if self.additional:
            key = np.concatenate([key, self.additional_keys[sample]])
            value = np.concatenate([value, self.additional_values[sample]])
        inside = self.geometry.inside(sample, queries)[:, None]
        inside = np.broadcast_to(inside, (len(queries), len(key) - seen))
        visible = np.concatenate([visible, inside], axis=1)
        bias = np.zeros((self.heads, *visible.shape))
        if self.bias is not None:
            bias[..., :seen] = self.bias[sample][:, bias_index]

        # A query that sees nothing yields zeros, whatever it and its cotangents hold.
        sees = visible.any(axis=1)
        q = _heads_first(_select(sees, self.query[sample, queries]), self.heads)
        k, v = _heads_first(key, self.heads), _heads_first(value, self.heads)
        score = np.where(visible, self.scale * (q @ k.swapaxes(1, 2)) + bias, -np.inf)
        largest = np.where(sees, score.max(axis=-1, initial=-np.inf), 0.0)
        weight = np.exp(score - largest[..., None])
        total = weight.sum(axis=-1)
        p = weight / np.where(sees, total, 1.0)[..., None]
        with np.errstate(divide="ignore"):
            lse = largest + np.log(total)
            surprise = -np.where(p > 0, np.log(p), 0.0)

        signed = {"out": p @ v, "lse": lse[..., None]}
        # lse = sum_j P_j (s_j - ln P_j).
        terms = (
            abs(self.scale) * (abs(q) @ abs(k).swapaxes(1, 2)) + abs(bias) + surprise
        )
        absolute = {"out": p @ abs(v), "lse": (p * terms).sum(axis=-1, keepdims=True)}
        if self.has_cotangents:
            dout = _heads_first(_select(sees, self.dout[sample, queries]), self.heads)
            dlse = _heads_first(_select(sees, self.dlse[sample, queries]), self.heads)
            signed |= _gradients(p, q, k, v, self.scale, dout, dlse, -1.0)
            absolute |= _gradients(
                p, abs(q), abs(k), abs(v), abs(self.scale), abs(dout), abs(dlse), 1.0
            )

        def public_layout(results: dict[str, Array]) -> dict[str, Array]:
            public = {}
            for name in {"out", "lse", "query"} & set(results):
                public[name] = _heads_last(results[name], self.heads)
            for name in {"key", "value"} & set(results):
                array = _heads_last(results[name], self.key_heads)
                public[name] = array[:seen]
                if self.additional:
                    public[f"additional_{name}s"] = array[seen:]
            if self.bias is not None and "score" in results:
                size = math.prod(self.table)
                public["rel_pos_bias"] = np.stack(
                    [
                        np.bincount(bias_index.ravel(), head[:, :seen].ravel(), size)
                        for head in results["score"]
                    ]
                )
            return public

        values, magnitudes = public_layout(signed), public_layout(absolute)
        return keys, {n: Result(values[n], magnitudes[n]) for n in values}


def _select(condition: Any, array: Array) -> Array:
    """``array [R, heads, channels]`` with zeros where ``condition [R]`` is False."""
    return np.where(condition[:, None, None], array, np.zeros((), array.dtype))


def _gradients(
    p: Array,
    query: Array,
    key: Array,
    value: Array,
    scale: float,
    dout: Array,
    dlse: Array,
    sign: float,
) -> dict[str, Array]:
    """The formulas at the top of this file; ``sign`` is that of the term dO * O."""
    delta = sign * (dout * (p @ value)).sum(axis=-1, keepdims=True) + dlse
    dscore = p * (dout @ value.swapaxes(1, 2) + delta)
    return {
        "query": scale * dscore @ key,
        "key": scale * dscore.swapaxes(1, 2) @ query,
        "value": p.swapaxes(1, 2) @ dout,
        "score": dscore,
    }


def attention_results(
    query: Any, key: Any, value: Any, kernel_size: Sequence[int], **options: Any
) -> dict[str, Result]:
    """Neighborhood attention and, given cotangents, its gradients, with magnitudes.

    Arrays may be NumPy's or JAX's of any floating-point dtype; widening is exact.

    Args:
        query: ``[*batch, *grid, N, D]``.
        key: ``[*batch, *grid, K, D]``.
        value: ``[*batch, *grid, K, Dv]``.
        kernel_size: one entry per grid axis; decides the rank.
        **options: ``stride``, ``dilation``, ``is_causal``, ``scale``, ``rel_pos_bias``,
            ``additional_keys``, ``additional_values`` and ``frame`` as
            :func:`jax_na.neighborhood_attention` takes them, with its defaults. The
            bias may also have the batch axes before its own, each full or of size 1.
            And ``dout``, the cotangent of the output, without which no gradient is
            evaluated; ``dlse``, that of the log-sum-exp, default zero.

    Returns:
        ``out [*batch, *grid, N, Dv]`` and ``lse [*batch, *grid, N]``; with ``dout``
        also the gradients, in the shapes of the arrays, of ``query``, ``key``,
        ``value`` and of whichever of ``rel_pos_bias``, ``additional_keys``,
        ``additional_values`` was given.
    """
    call = _Attention(query, key, value, kernel_size, **options)
    samples, tokens = call.query.shape[:2]
    shapes = {
        "out": (*np.shape(query)[:-1], call.value_dim),
        "lse": np.shape(query)[:-1],
    }
    canonical: dict[str, tuple[int, ...]] = {
        "out": (samples, tokens, call.heads, call.value_dim),
        "lse": (samples, tokens, call.heads, 1),
    }
    if call.has_cotangents:
        arrays = {"query": query, "key": key, "value": value}
        canonical |= {n: _flatten(a, len(kernel_size)).shape for n, a in arrays.items()}
        if call.additional:
            arrays |= {n: options[n] for n in ("additional_keys", "additional_values")}
            canonical["additional_keys"] = call.additional_keys.shape
            canonical["additional_values"] = call.additional_values.shape
        if call.bias is not None:
            canonical["rel_pos_bias"] = call.bias.shape
            shapes["rel_pos_bias"] = (*call.batch, call.heads, *call.table)
        shapes |= {n: np.shape(a) for n, a in arrays.items()}

    totals = {n: Result(np.zeros(s), np.zeros(s)) for n, s in canonical.items()}
    everyone = np.arange(tokens)
    for sample in range(samples):
        for chunk in call.chunks(everyone):
            keys, results = call.evaluate(sample, everyone[chunk])
            for name, result in results.items():
                rows: Any = slice(None)
                if name in ("out", "lse", "query"):
                    rows = chunk
                elif name in ("key", "value"):
                    rows = keys
                for total, part in zip(totals[name], result):
                    total[sample][rows] += part
    final = {
        name: Result(*(array.reshape(shapes[name]) for array in total))
        for name, total in totals.items()
    }
    if "rel_pos_bias" in final:
        shape = np.shape(options["rel_pos_bias"])
        final["rel_pos_bias"] = Result(
            *(_sum_to(a, shape) for a in final["rel_pos_bias"])
        )
    return final


def attention(
    query: Any, key: Any, value: Any, kernel_size: Sequence[int], **options: Any
) -> tuple[Array, Array]:
    """``(out, lse)`` of :func:`attention_results`, float64."""
    results = attention_results(query, key, value, kernel_size, **options)
    return results["out"].value, results["lse"].value


def attention_gradients(
    query: Any, key: Any, value: Any, kernel_size: Sequence[int], **options: Any
) -> dict[str, Array]:
    """The gradients of :func:`attention_results`, by the name of their array."""
    results = attention_results(query, key, value, kernel_size, **options)
    return {n: r.value for n, r in results.items() if n not in ("out", "lse")}


# ---- Chosen rows of problems that are too large for a dense mask ---------------------


def query_rows(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sequence[int],
    *,
    queries: Any,
    **options: Any,
) -> dict[str, Result]:
    """Rows of the output, of lse and, given cotangents, of the query's gradient.

    Args:
        queries: ``[R, rank]`` local positions. The other arguments are those of
            :func:`attention_results`.

    Returns:
        ``out [*batch, R, N, Dv]``, ``lse [*batch, R, N]``, ``query [*batch, R, N, D]``.
    """
    call = _Attention(query, key, value, kernel_size, **options)
    tokens = np.ravel_multi_index(
        tuple(np.transpose(queries)), call.geometry.query_grid
    )
    parts: dict[str, list[Result]] = {}
    for sample in range(len(call.query)):
        for chunk in call.chunks(tokens):
            _, results = call.evaluate(sample, tokens[chunk])
            for name in {"out", "lse", "query"} & set(results):
                parts.setdefault(name, []).append(results[name])
    rows = {}
    for name, chunks in parts.items():
        shape = (*call.batch, len(tokens), *chunks[0].value.shape[1:])
        shape = shape[:-1] if name == "lse" else shape
        rows[name] = Result(
            *(np.concatenate(arrays).reshape(shape) for arrays in zip(*chunks))
        )
    return rows


def key_rows(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sequence[int],
    *,
    keys: Any,
    **options: Any,
) -> dict[str, Result]:
    """Rows of the key's and the value's gradient.

    Args:
        keys: ``[S, rank]`` local positions. The other arguments are those of
            :func:`attention_results`; ``dout`` is required.

    Returns:
        ``key [*batch, S, K, D]`` and ``value [*batch, S, K, Dv]``.
    """
    call = _Attention(query, key, value, kernel_size, **options)
    chosen = np.ravel_multi_index(tuple(np.transpose(keys)), call.geometry.key_grid)
    rows = {}
    for name, array in (("key", call.key), ("value", call.value)):
        shape = (len(call.query), len(chosen), *array.shape[2:])
        rows[name] = Result(np.zeros(shape), np.zeros(shape))
    for sample in range(len(call.query)):
        observers = call.geometry.observers(sample, chosen)
        for chunk in call.chunks(observers):
            seen, results = call.evaluate(sample, observers[chunk])
            hits, positions = np.nonzero(chosen[:, None] == seen)
            for name, totals in rows.items():
                for total, part in zip(totals, results[name]):
                    total[sample, hits] += part[positions]
    return {
        name: Result(*(a.reshape(*call.batch, *a.shape[1:]) for a in totals))
        for name, totals in rows.items()
    }


# ---- Unfused -------------------------------------------------------------------------


def qk(
    query: Any,
    key: Any,
    kernel_size: Sequence[int],
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    rel_pos_bias: Any = None,
    frame: Any = None,
    dscores: Any = None,
) -> dict[str, Result]:
    """Scores of every query's window, and their gradients given ``dscores``.

    Args:
        dscores: cotangent ``[*batch, *grid, N, prod(kernel_size)]`` of the scores;
            ignored where no key fills the slot. The other arguments are those of
            :func:`jax_na.na_qk`.

    Returns:
        ``scores [*batch, *grid, N, prod(kernel_size)]``, -inf where no key fills the
        slot; with ``dscores`` also ``query``, ``key`` and, if given, ``rel_pos_bias``.
    """
    rank, shape = len(kernel_size), np.shape(query)
    heads = shape[-2]
    scale = shape[-1] ** -0.5 if scale is None else scale
    table = tuple(2 * size - 1 for size in kernel_size)
    geometry = _Geometry.make(
        shape, np.shape(key), kernel_size, stride, dilation, is_causal, frame
    )
    flat_query, flat_key = _flatten(query, rank), _flatten(key, rank)
    samples, tokens = flat_query.shape[:2]
    bias = np.zeros((heads, *table)) if rel_pos_bias is None else rel_pos_bias
    bias = np.asarray(bias, np.float64).reshape(heads, -1)
    slots = math.prod(kernel_size)
    totals: dict[str, tuple[int, ...]] = {"scores": (samples, tokens, heads, slots)}
    if dscores is not None:
        dscores = _flatten(dscores, rank)
        totals |= {"query": flat_query.shape, "key": flat_key.shape}
        totals["rel_pos_bias"] = bias.shape

    def evaluate(part: Callable[[Any], Any]) -> dict[str, Array]:
        sums = {name: np.zeros(size) for name, size in totals.items()}
        for sample in range(samples):
            chosen, bias_index = geometry.slots(sample)
            held = chosen >= 0
            q = part(_heads_first(flat_query[sample], heads))
            k = part(_heads_first(flat_key[sample], heads))[:, chosen]
            k = np.where(held[..., None], k, 0.0)
            score = part(scale) * np.einsum("htd,htsd->hts", q, k)
            score += part(bias)[:, bias_index]
            sums["scores"][sample] = np.where(held, score, -np.inf).swapaxes(0, 1)
            if dscores is None:
                continue
            ds = part(np.where(held, _heads_first(dscores[sample], heads), 0.0))
            dquery = part(scale) * np.einsum("hts,htsd->htd", ds, k)
            dkey = np.zeros((heads, *flat_key.shape[1::2]))
            for head in range(heads):
                products = part(scale) * ds[head][..., None] * q[head][:, None]
                np.add.at(dkey[head], chosen[held], products[held])
                np.add.at(sums["rel_pos_bias"][head], bias_index[held], ds[head][held])
            sums["query"][sample] = _heads_last(dquery, heads)
            sums["key"][sample] = _heads_last(dkey, flat_key.shape[2])
        return sums

    shapes = {
        "scores": (*shape[:-1], slots),
        "query": shape,
        "key": np.shape(key),
        "rel_pos_bias": (heads, *table),
    }
    results = _results(evaluate, shapes)
    if rel_pos_bias is None:
        results.pop("rel_pos_bias", None)
    return results


def av(
    weights: Any,
    value: Any,
    kernel_size: Sequence[int],
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    frame: Any = None,
    dout: Any = None,
) -> dict[str, Result]:
    """Weighted sums of every query's window, and their gradients given ``dout``.

    Args:
        weights: ``[*batch, *grid, N, prod(kernel_size)]``; ignored where no key fills
            the slot.
        dout: cotangent ``[*batch, *grid, N, Dv]`` of the output. The other arguments
            are those of :func:`jax_na.na_av`.

    Returns:
        ``out [*batch, *grid, N, Dv]``; with ``dout`` also ``weights`` and ``value``.
    """
    rank, shape = len(kernel_size), np.shape(weights)
    heads, value_dim = shape[-2], np.shape(value)[-1]
    geometry = _Geometry.make(
        shape, np.shape(value), kernel_size, stride, dilation, is_causal, frame
    )
    flat_weights, flat_value = _flatten(weights, rank), _flatten(value, rank)
    totals: dict[str, tuple[int, ...]] = {"out": (*flat_weights.shape[:3], value_dim)}
    if dout is not None:
        dout = _flatten(dout, rank)
        totals |= {"weights": flat_weights.shape, "value": flat_value.shape}

    def evaluate(part: Callable[[Any], Any]) -> dict[str, Array]:
        sums = {name: np.zeros(size) for name, size in totals.items()}
        for sample in range(len(flat_weights)):
            chosen, _ = geometry.slots(sample)
            held = chosen >= 0
            w = part(np.where(held, _heads_first(flat_weights[sample], heads), 0.0))
            v = part(_heads_first(flat_value[sample], heads))[:, chosen]
            v = np.where(held[..., None], v, 0.0)
            out = np.einsum("hts,htsd->htd", w, v)
            sums["out"][sample] = _heads_last(out, heads)
            if dout is None:
                continue
            do = part(_heads_first(dout[sample], heads))
            dweights = np.where(held, np.einsum("htd,htsd->hts", do, v), 0.0)
            dvalue = np.zeros((heads, *flat_value.shape[1::2]))
            for head in range(heads):
                products = w[head][..., None] * do[head][:, None]
                np.add.at(dvalue[head], chosen[held], products[held])
            sums["weights"][sample] = _heads_last(dweights, heads)
            sums["value"][sample] = _heads_last(dvalue, flat_value.shape[2])
        return sums

    shapes = {
        "out": (*shape[:-1], value_dim),
        "weights": shape,
        "value": np.shape(value),
    }
    return _results(evaluate, shapes)


def _results(
    evaluate: Callable[[Callable[[Any], Any]], dict[str, Array]],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, Result]:
    """Evaluates with the operands as they are and with their absolute values."""
    signed, absolute = evaluate(lambda operand: operand), evaluate(np.abs)
    return {
        name: Result(
            signed[name].reshape(shapes[name]), absolute[name].reshape(shapes[name])
        )
        for name in signed
    }
