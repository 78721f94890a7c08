"""Attention a block of scores at a time, forward and backward.

The portable reference: what every kernel is tested against, and what runs where there
is none.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30
"""Score of a masked pair. Finite: a query that sees nothing, such as padding, then
yields finite numbers instead of NaN."""

SAVED_NAME = "attention"
"""Name, for `jax.checkpoint` policies, of what the backward pass of attention reads
besides its inputs."""


class _Options(NamedTuple):
    """What is known when the program is made."""

    causal: bool
    windowed: bool
    scale: float
    softcap: float | None
    query_chunk: int
    key_chunk: int


def chunked_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    offset: jax.typing.ArrayLike | None = None,
    window: jax.typing.ArrayLike | None = None,
    positions: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    query_chunk: int = 256,
    key_chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention whose memory is linear in T and N, also in the backward pass.

    ``out_t = sum_n softmax_n(scale * q_t . k_n) v_n`` over the n that t sees: those of
    its own segment (segment 0 sees nothing and is not seen), not after slot
    ``offset + t`` and within the `window`. Maximum, normaliser and sum run along over
    blocks of keys; the backward pass computes each block of scores again from the
    logarithm of the normaliser. Blocks that lie after all their queries or before
    their windows are left out. Differentiable once, in queries, keys and values.

    Args:
      queries: ``[B, T, H, d]``.
      keys, values: ``[B, Hkv, N, d]``; H is a multiple of Hkv.
      query_segments, key_segments: ``[B, T]`` and ``[B, N]`` int32.
      offset: slot of the first query among the keys, an int32 scalar that may be
        traced; None: not causal.
      window: number of slots that a query sees, its own included, an int32 scalar
        that may be traced; None: all.
      positions: ``[B, T]`` and ``[B, N]`` int32, by which the window counts in the
        place of slots.
      scale: of the scores; None: ``1 / sqrt(d)``.
      softcap: ``c`` where scores are ``c * tanh(scores / c)``.
      query_chunk, key_chunk: the size of a block.

    Returns:
      The output ``[B, T, H, d]`` and, in at least float32, the logarithm of the
      normaliser ``[B, T, H]``, by which `join` puts together the outputs over several
      sets of keys. Of a query that sees nothing: 0 and -1e30.

    Raises:
      ValueError: a window with neither offset nor positions, or an empty one.

    Source: online softmax, arXiv:1805.02867; in blocks with a backward pass of its own,
    arXiv:2112.05682 and arXiv:2205.14135.

    >>> x = jnp.arange(6.0).reshape(1, 3, 1, 2)
    >>> keys, ones = jnp.swapaxes(x, 1, 2), jnp.ones((1, 3), jnp.int32)
    >>> out, _ = chunked_attention(x, keys, keys, ones, ones, offset=0, scale=0.1)
    >>> out[0, :2, 0].round(2).tolist()  # the second sees both, 1 / (1 + 1/e) the last
    [[0.0, 1.0], [1.46, 2.46]]
    """
    placed = offset is not None or positions is not None
    if window is not None and (not placed or (isinstance(window, int) and window < 1)):
        raise ValueError(
            f"window={window}: counts slots back from a causal query; it needs an "
            "offset, or positions, and at least 1 slot."
        )
    batch, time, heads, dim = queries.shape
    kv_heads, slots = keys.shape[1:3]
    options = _Options(
        causal=offset is not None,
        windowed=window is not None,
        scale=1 / math.sqrt(dim) if scale is None else scale,
        softcap=softcap,
        query_chunk=min(query_chunk, time),
        key_chunk=min(key_chunk, slots),
    )
    q = queries.reshape(batch, time, kv_heads, heads // kv_heads, dim)
    q = jnp.moveaxis(q, 1, 3)
    # Filled up to whole chunks by segment 0, which nobody sees.
    q = fill_up(q, 3, options.query_chunk)
    by_query, by_key = ((), ()) if positions is None else ((x,) for x in positions)
    query_segments = jnp.stack([query_segments, *by_query], axis=-1)
    key_segments = jnp.stack([key_segments, *by_key], axis=-1)
    query_segments = fill_up(query_segments, 1, options.query_chunk)
    keys, values = (fill_up(x, 2, options.key_chunk) for x in (keys, values))
    key_segments = fill_up(key_segments, 1, options.key_chunk)
    start = (
        jnp.asarray(0 if offset is None else offset, jnp.int32),
        None if window is None else jnp.asarray(window, jnp.int32),
    )
    segments = (query_segments, key_segments)
    out, norm = _attention(q, keys, values, segments, start, options)
    out, norm = (jnp.moveaxis(x[:, :, :, :time], 3, 1) for x in (out, norm))
    return out.reshape(batch, time, heads, dim), norm.reshape(batch, time, heads)


def join(parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The attention over all keys, from that over disjoint sets of them.

    Args:
      parts: outputs ``[..., d]`` and logarithms of normalisers ``[...]`` of each set.
    """
    norms = jnp.stack([norm for _, norm in parts])
    shares = jax.nn.softmax(norms, axis=0)
    outs = [x * share[..., None] for (x, _), share in zip(parts, shares, strict=True)]
    return sum(outs[1:], outs[0]).astype(parts[0][0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, keys, values, segments, start, options: _Options):
    """Whole chunks: q ``[B, Hkv, G, T, d]``; output alike, and ``[B, Hkv, G, T]``.

    Segments are ``[B, T, 1]``, or with positions behind them ``[B, T, 2]``; `start` is
    the first query's slot, and the window.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def of_queries(chunk):
        at, q, query_segments = chunk

        def add_keys(j, carry):
            highest, norm, out = carry
            block, value, key_segments = _keys_of(j, keys, values, segments, options)
            seen = _seen(at, j, query_segments, key_segments, start, options)
            scores = jnp.where(seen, _scores(q, block, options), MASKED)
            higher = jnp.maximum(highest, scores.max(axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0)
            shrink = jnp.exp(highest - higher)
            more = jnp.einsum(
                "bkgtn,bknd->bkgtd",
                weights.astype(value.dtype),
                value,
                preferred_element_type=wide,
            )
            return (
                higher,
                norm * shrink + weights.sum(axis=-1),
                out * shrink[..., None] + more,
            )

        shape = q.shape[:-1]
        empty = (
            jnp.full(shape, MASKED, wide),
            jnp.zeros(shape, wide),
            jnp.zeros(q.shape, wide),
        )
        first, last = _key_chunks(at, start, keys.shape[2], options)
        highest, norm, out = lax.fori_loop(first, last, add_keys, empty)
        norm_or_one = jnp.where(norm > 0, norm, 1)
        out = (out / norm_or_one[..., None]).astype(q.dtype)
        return out, jnp.where(norm > 0, highest + jnp.log(norm_or_one), MASKED)

    outs, norms = lax.map(of_queries, _query_chunks(options, q, segments[0]))
    return _whole(outs), _whole(norms)


def _attention_forward(q, keys, values, segments, start, options):
    out, norm = _attention(q, keys, values, segments, start, options)
    out = checkpoint_name(out, SAVED_NAME)
    norm = checkpoint_name(norm, SAVED_NAME)
    return (out, norm), (q, keys, values, segments, start, out, norm)


def _attention_backward(options: _Options, residuals, cotangents):
    q, keys, values, segments, start, out, norm = residuals
    d_out, d_norm = cotangents
    wide = jnp.promote_types(q.dtype, jnp.float32)
    dot = functools.partial(jnp.einsum, preferred_element_type=wide)
    # What the softmax's derivative subtracts: sum_n p_n dp_n = d_out . out.
    mean = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1) - d_norm

    def of_queries(carry, chunk):
        at, q, query_segments, d_out, mean, norm = chunk

        def add_keys(j, carry):
            d_q, d_keys, d_values = carry
            block, value, key_segments = _keys_of(j, keys, values, segments, options)
            seen = _seen(at, j, query_segments, key_segments, start, options)
            scores = _scores(q, block, options)
            weights = jnp.where(seen, scores - norm[..., None], -jnp.inf)
            weights = jnp.exp(weights)
            d_scores = weights * (
                dot("bkgtd,bknd->bkgtn", d_out, value) - mean[..., None]
            )
            if options.softcap is not None:
                d_scores *= 1 - jnp.square(scores / options.softcap)
            d_scores = (d_scores * options.scale).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_keys = _add_at(d_keys, j, dot("bkgtn,bkgtd->bknd", d_scores, q))
            d_values = _add_at(d_values, j, dot("bkgtn,bkgtd->bknd", weights, d_out))
            return d_q + dot("bkgtn,bknd->bkgtd", d_scores, block), d_keys, d_values

        first, last = _key_chunks(at, start, keys.shape[2], options)
        d_q, *carry = lax.fori_loop(
            first, last, add_keys, (jnp.zeros(q.shape, wide), *carry)
        )
        return tuple(carry), d_q.astype(q.dtype)

    chunks = _query_chunks(options, q, segments[0], d_out, mean, norm)
    empty = (jnp.zeros(keys.shape, wide), jnp.zeros(values.shape, wide))
    (d_keys, d_values), d_q = lax.scan(of_queries, empty, chunks)
    narrow = (d_keys.astype(keys.dtype), d_values.astype(values.dtype))
    return _whole(d_q), *narrow, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _scores(q, block, options: _Options):
    """``[B, Hkv, G, T, N]`` of one block, in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgtd,bknd->bkgtn", q, block, preferred_element_type=wide)
    scores *= options.scale
    if options.softcap is None:
        return scores
    return options.softcap * jnp.tanh(scores / options.softcap)


def _seen(at, j, query_segments, key_segments, start, options: _Options):
    """``[B, 1, 1, T, N]``: which keys of chunk `j` the queries of chunk `at` see."""
    back = query_segments[:, :, None] - key_segments[:, None]
    seen = (back[..., 0] == 0) & (query_segments[..., :1] > 0)
    back, (first, window) = back[..., -1], start
    if options.causal:
        rows = first + at * options.query_chunk + jnp.arange(options.query_chunk)
        columns = j * options.key_chunk + jnp.arange(options.key_chunk)
        slots = rows[None, :, None] - columns[None, None, :]
        seen &= slots >= 0
        if query_segments.shape[-1] == 1:  # no positions
            back = slots
    if options.windowed:
        seen &= back < window
    return seen[:, None, None]


def _key_chunks(at, start, slots: int, options: _Options):
    """The first chunk of keys that some query of chunk `at` may see, and the end."""
    first, last = jnp.int32(0), jnp.int32(slots // options.key_chunk)
    start, window = start
    if options.causal:
        lowest = start + at * options.query_chunk
        end = (lowest + options.query_chunk - 1) // options.key_chunk + 1
        last = jnp.minimum(last, end)
        if options.windowed:
            first = jnp.maximum(0, lowest - window + 1) // options.key_chunk
    return jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)


def _keys_of(j, keys, values, segments, options: _Options):
    """Keys, values and segments of chunk `j`."""
    size = options.key_chunk

    def cut(x, axis):
        return lax.dynamic_slice_in_dim(x, j * size, size, axis)

    return cut(keys, 2), cut(values, 2), cut(segments[1], 1)


def _add_at(whole, j, block):
    """`block` added to chunk `j` of the slots."""
    size = block.shape[2]
    old = lax.dynamic_slice_in_dim(whole, j * size, size, 2)
    return lax.dynamic_update_slice_in_dim(whole, old + block, j * size, 2)


def _query_chunks(options: _Options, q, query_segments, *others):
    """The number of each chunk of queries, and what belongs to it, to scan over."""
    size = options.query_chunk
    count = q.shape[3] // size

    def cut(x, axis):
        parts = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis, 0)

    rest = [cut(x, 3) for x in others]
    return (jnp.arange(count), cut(q, 3), cut(query_segments, 1), *rest)


def _whole(chunks):
    """``[chunks, B, Hkv, G, size, ...]`` as ``[B, Hkv, G, T, ...]``."""
    parts = jnp.moveaxis(chunks, 0, 3)
    return parts.reshape(*parts.shape[:3], -1, *parts.shape[5:])


def fill_up(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind, up to a multiple of `size`; as segments they are padding."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
