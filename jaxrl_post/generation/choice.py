"""The choice of the next token: greedy, or sampled from what truncation leaves.

Everything is reductions over the vocabulary, no sorting and no noise per entry: a few
passes over the logits, right and unchanged where the vocabulary is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_post.numerics import check_number


class Choice(NamedTuple):
    """One token per row.

    Attributes:
      tokens: ``[B]`` int32.
      logps: ``[B]`` log-probability under the logits as they are.
      sampler_logps: ``[B]`` log-probability under the distribution that was sampled
        from: truncated and renormalised; 0 for a greedy choice.
    """

    tokens: jax.Array
    logps: jax.Array
    sampler_logps: jax.Array


def choose_tokens(
    logits: jax.Array,
    uniforms: jax.Array,
    *,
    greedy: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Choice:
    """Chooses a token per row, given random numbers.

    Truncations apply in this order, each to what the former leave, renormalised:
    `top_k` keeps the k likeliest tokens; `top_p` the fewest of the likeliest whose
    probabilities reach ``top_p`` together; `min_p` those at least ``min_p`` times as
    likely as the likeliest. At least one token stays.

    Differs from transformers in that all tokens tied with the last kept one are kept;
    there `top_p` keeps some of them, as sorting happens to order them.

    Args:
      logits: ``[B, V]``, temperature applied. An entry that may not be chosen is so
        low that its probability rounds to 0.
      uniforms: ``[B, 2]`` in [0, 1), independent.
      greedy: the likeliest token, the first of equals; truncations change nothing.
      top_k, top_p, min_p: None for no such truncation.

    Source: nucleus sampling 1904.09751, min-p 2407.01082.

    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    >>> choice = choose_tokens(logits, jnp.array([[0.0, 0.9]]), top_k=2)
    >>> int(choice.tokens[0]), jnp.exp(choice.logps), jnp.exp(choice.sampler_logps)
    (1, Array([0.3], dtype=float32), Array([0.375], dtype=float32))
    """
    relative = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(relative)
    if greedy:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        kept = None
    else:
        kept = truncate(weights, top_k=top_k, top_p=top_p, min_p=min_p)
        tokens = _sample(kept, uniforms)
    chosen = jnp.take_along_axis(relative, tokens[:, None], axis=-1)[:, 0]
    logps = chosen - jnp.log(weights.sum(axis=-1))
    if kept is None:
        return Choice(tokens, logps, jnp.zeros_like(logps))
    return Choice(tokens, logps, chosen - jnp.log(kept.sum(axis=-1)))


def truncate(
    weights: jax.Array,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> jax.Array:
    """Zeros in place of the weights ``[B, V]`` that the truncations of
    `choose_tokens` cut; weights are probabilities over the row's largest one.

    >>> truncate(jnp.array([[1.0, 0.6, 0.4]]), top_p=0.5).tolist()
    [[1.0, 0.0, 0.0]]
    """
    if top_k is not None:
        weights = _keep_largest(weights, lambda kept: (kept > 0).sum(axis=-1) >= top_k)
    if top_p is not None and top_p < 1:
        target = top_p * weights.sum(axis=-1)
        weights = _keep_largest(weights, lambda kept: kept.sum(axis=-1) >= target)
    if min_p is not None:
        weights = jnp.where(weights >= min_p, weights, 0)
    return weights


def check_truncation(
    top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Refuses numbers that `choose_tokens` has no meaning for."""
    check_number("top_k", top_k, 1)
    check_number("top_p", top_p, 0, 1, open_low=True)
    check_number("min_p", min_p, 0, 1, open_low=True)


def _keep_largest(
    weights: jax.Array, enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Keeps the fewest largest weights that are `enough`, all if nothing is.

    The threshold is found exactly by halving: non-negative floats are ordered as
    their bits are, so 30 passes over the row do instead of a sort.
    """
    bits = lax.bitcast_convert_type(weights.astype(jnp.float32), jnp.int32)
    top = 0x3F800000  # the bits of 1.0, every row's largest weight

    def halve(_, bounds):
        low, high = bounds  # enough with the threshold low, not with high
        middle = (low + high) // 2
        good = enough(jnp.where(bits >= middle[:, None], weights, 0))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    rows = jnp.zeros_like(bits, shape=bits.shape[:1])
    low, _ = lax.fori_loop(0, 30, halve, (rows, rows + (top + 1)))
    return jnp.where(bits >= low[:, None], weights, 0)


def _sample(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """An index drawn in proportion to the weights ``[B, V]``; ``[B]`` int32.

    In two steps, a block of about sqrt(V) entries and an entry of it: short sums are
    exact enough and cheap, and two numbers resolve probabilities that one float32
    cannot.
    """
    batch, vocab = weights.shape
    width = 1 << (math.isqrt(vocab - 1)).bit_length()
    blocks = -(-vocab // width)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * width - vocab)))
    grid = padded.reshape(batch, blocks, width)
    block = _invert(grid.sum(axis=-1), uniforms[:, 0])
    row = jnp.take_along_axis(grid, block[:, None, None], axis=1)[:, 0]
    return block * width + _invert(row, uniforms[:, 1])


def _invert(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """The first index at which the cumulative share exceeds `uniforms`."""
    cumulative = jnp.cumsum(weights, axis=-1)
    reached = cumulative > uniforms[:, None] * cumulative[:, -1:]
    # Rounding may let a sum pass the mark at an entry of weight 0, or never: rank
    # entries (no weight, not reached, reached) and take the first of the best.
    rank = (weights > 0) * (1 + reached.astype(jnp.int32))
    return jnp.argmax(rank, axis=-1).astype(jnp.int32)
