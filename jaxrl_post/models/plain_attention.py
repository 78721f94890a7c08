"""Attention that holds all scores: short sequences, and the single query of a ring.

Axes of its products stand as XLA's CPU backend multiplies them, batch and heads first:
written with time before the heads, all scores are transposed, forward and backward, and
with a single query the cache is, which takes ten times as long as the product.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_post.models.chunked import MASKED


def plain_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    *,
    softcap: float | None = None,
    ring: bool = False,
) -> jax.Array:
    """Softmax attention over a prefix's and the own slots together.

    The two parts are scored separately and normalised jointly: a prefix is neither
    copied for each sequence that it serves nor concatenated.

    Args:
      queries: ``[B, T, H, d]``.
      keys: ``[B, Hkv, N, d]``; of a ring, ``[B, Hkv, d, N]``.
      values: ``[B, Hkv, N, d]``.
      seen: ``[B, T, N]`` bool.
      prefix: keys and values ``[C, Hkv, S, d]`` (keys of a ring as there), of which
        each serves ``B // C`` adjacent sequences and is read once for them, and what is
        seen of them, ``[B, 1 or T, S]`` bool.
      softcap: ``c`` where scores are ``c * tanh(scores / c)``.
      ring: see `models.cache.Cache`.

    Returns:
      ``[B, T, H, d]``.

    >>> query, keys, values = jnp.ones((1, 1, 1, 2)), jnp.ones((3, 2)), jnp.eye(3, 2)
    >>> seen = jnp.array([[[True, True, False]]])
    >>> plain_attention(query, keys[None, None], values[None, None], seen).tolist()
    [[[[0.5, 0.5]]]]
    """
    batch, time, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    # Of a key's heads and the times: one axis of queries.
    q = queries.reshape(batch, time, kv_heads, heads // kv_heads, dim)
    q = jnp.moveaxis(q * (1.0 / math.sqrt(dim)), 1, 3)
    pairs = "bkgtd,bkdn->bkgtn" if ring else "bkgtd,bknd->bkgtn"

    def score(q, keys):
        scores = jnp.einsum(pairs, q, keys, preferred_element_type=wide)
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    def mix(weights, values):
        return jnp.einsum("bkgtn,bknd->bkgtd", weights.astype(q.dtype), values)

    scores = jnp.where(seen[:, None, None], score(q, keys), MASKED)
    top = scores.max(-1, keepdims=True)
    if prefix is not None:
        prefix_keys, prefix_values, seen = prefix
        members = batch // prefix_keys.shape[0]
        # A group's queries are more queries of one sequence to its prefix.
        before = score(_gather_members(q, members), prefix_keys)
        before = _spread_members(before, members)
        before = jnp.where(seen[:, None, None], before, MASKED)
        top = jnp.maximum(top, before.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = mix(weights, values)
    if prefix is not None:
        weights = jnp.exp(before - top)
        total = total + weights.sum(-1, keepdims=True)
        shared = mix(_gather_members(weights, members), prefix_values)
        out = _spread_members(shared, members) + out
    out = jnp.moveaxis((out / total).astype(q.dtype), 3, 1)
    return out.reshape(queries.shape)


def _gather_members(x: jax.Array, members: int) -> jax.Array:
    """``[C * M, Hkv, g, ...]`` to ``[C, Hkv, M * g, ...]``."""
    if members == 1:
        return x
    batch, kv_heads, group, *rest = x.shape
    x = x.reshape(batch // members, members, kv_heads, group, *rest)
    return jnp.swapaxes(x, 1, 2).reshape(-1, kv_heads, members * group, *rest)


def _spread_members(x: jax.Array, members: int) -> jax.Array:
    """The way back."""
    if members == 1:
        return x
    rows, kv_heads, many, *rest = x.shape
    x = x.reshape(rows, kv_heads, members, many // members, *rest)
    return jnp.swapaxes(x, 1, 2).reshape(rows * members, kv_heads, -1, *rest)
