"""Attention of one new token per sequence to what a ring holds.

The general program writes its products so that they end with a query's time axis; with
a single query XLA's CPU backend then multiplies by the cache transposed, which takes
ten times as long as the products here.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a masked pair; finite, so that a slot without a sequence yields numbers."""


def attend_one(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention over a prefix's and the own slots together.

    Args:
      queries: ``[B, H, d]``.
      keys: ``[B, Hkv, d, N]``.
      values: ``[B, Hkv, N, d]``.
      seen: ``[B, N]`` bool.
      prefix: keys ``[C, Hkv, d, S]`` and values ``[C, Hkv, S, d]``, of which each
        serves ``B // C`` adjacent sequences and is read once for them, and what is seen
        of them, ``[B, S]`` bool.
      softcap: ``c`` where scores are ``c * tanh(scores / c)``.

    Returns:
      ``[B, H, d]``.

    >>> query, keys, values = jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2, 3)), jnp.eye(3, 2)
    >>> seen = jnp.array([[True, True, False]])
    >>> attend_one(query, keys, values[None, None], seen).tolist()
    [[[0.5, 0.5]]]
    """
    batch, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    q = queries.reshape(batch, kv_heads, heads // kv_heads, dim)
    q = q * (1.0 / math.sqrt(dim))

    def score(q, keys):
        scores = jnp.einsum("bkgd,bkdn->bkgn", q, keys, preferred_element_type=wide)
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    scores = jnp.where(seen[:, None, None], score(q, keys), MASKED)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        return jnp.einsum("bkgn,bknd->bkgd", weights, values).reshape(queries.shape)

    shared_keys, shared_values, seen = prefix
    members = batch // shared_keys.shape[0]
    # A group's queries are more queries of one sequence to its prefix.
    before = score(_gather_members(q, members), shared_keys)
    before = _spread_members(before, members)
    before = jnp.where(seen[:, None, None], before, MASKED)
    # Jointly normalised, without a copy of the two side by side.
    top = jnp.maximum(before.max(-1, keepdims=True), scores.max(-1, keepdims=True))
    before, scores = jnp.exp(before - top), jnp.exp(scores - top)
    total = before.sum(-1, keepdims=True) + scores.sum(-1, keepdims=True)
    before = _gather_members(before.astype(q.dtype), members)
    out = jnp.einsum("bkgn,bknd->bkgd", before, shared_values)
    out = _spread_members(out, members)
    out = out + jnp.einsum("bkgn,bknd->bkgd", scores.astype(q.dtype), values)
    return (out / total.astype(q.dtype)).astype(q.dtype).reshape(queries.shape)


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
