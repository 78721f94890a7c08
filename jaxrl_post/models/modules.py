"""A `Policy` of anybody's module: a function from tokens to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.models.cache import init_cache
from jaxrl_post.models.policy import Policy

_MODULE = "module"
"""The user's parameters go by it, so that no name in them is taken for one of ours."""


class Apply(Protocol):
    """A module's forward pass.

    ``tokens`` and ``positions`` ``[B, T]`` int32; ``mask`` ``[B, T, T]`` bool, whether
    the token of a row attends to that of a column: all that lets tokens see each other
    must obey it. Returns ``[B, T, D]``, what the unembedding is multiplied with.
    """

    def __call__(
        self,
        params: chex.ArrayTree,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
    ) -> jax.Array: ...


@dataclass(frozen=True)
class ModuleConfig:
    """What the package asks of a model's config.

    Attributes:
      max_positions: longest sequence that the model was made for; None: any.
      stop_token_ids: tokens that end an answer.
    """

    max_positions: int | None = None
    stop_token_ids: tuple[int, ...] = ()


def policy_of(
    apply: Apply,
    *,
    init: Callable[[jax.Array], chex.ArrayTree],
    unembedding: Callable[[chex.ArrayTree], jax.Array],
    vocab_size: int,
    max_positions: int | None = None,
    stop_token_ids: Sequence[int] = (),
    logical_axes: chex.ArrayTree | None = None,
    logit_softcap: float | None = None,
) -> Policy:
    """A policy that samples and trains, of a module without a cache.

    In the place of keys and values its cache holds tokens, and the whole sequence is
    computed again for each new one: right, and for n tokens n times the work. Where
    sampling has to be fast, make a `Policy` whose ``hidden`` writes and reads the
    keys and values of a `Cache`, as `stack.decoder` does.

    Args:
      apply: the module's forward pass, up to the hidden states.
      init: random parameters from a key.
      unembedding: the ``[V, D]`` matrix behind the logits, of the parameters.
      vocab_size: number of tokens; rows of the unembedding above are never sampled.
      max_positions, stop_token_ids: see `ModuleConfig`.
      logical_axes: see `Policy`; None: nothing is split over a mesh.
      logit_softcap: see `Policy`.

    Returns:
      The policy. Its parameters are ``{"module": those of apply}``.

    >>> table = jnp.eye(4)
    >>> policy = policy_of(
    ...     lambda params, tokens, positions, mask: params["table"][tokens],
    ...     init=lambda key: {"table": table},
    ...     unembedding=lambda params: params["table"],
    ...     vocab_size=4,
    ... )
    >>> tokens = jnp.array([[2, 0]])
    >>> params = policy.init(jax.random.key(0))
    >>> policy.hidden(params, tokens, tokens, jnp.ones_like(tokens))[0].shape
    (1, 2, 4)
    """

    def hidden(params, tokens, positions, segment_ids, cache=None):
        params = params[_MODULE]
        if cache is None:
            mask = _visible(segment_ids, positions)
            return apply(params, tokens, positions, mask), None
        time = tokens.shape[1]
        at = (0, cache.length)
        update = jax.lax.dynamic_update_slice
        own = [
            update(_row(whole), part.astype(jnp.int32), at)
            for whole, part in ((cache.keys, tokens), (cache.values, positions))
        ]
        segments = update(cache.segment_ids, segment_ids.astype(jnp.int32), at)
        written = cache.replace(
            keys=_like(cache.keys, own[0]),
            values=_like(cache.values, own[1]),
            segment_ids=segments,
            length=cache.length + time,
        )
        mask = _visible(segments, own[1])
        start = cache.length
        if (prefix := cache.prefix) is not None:
            index, size = prefix.index, prefix.mask.shape[1]
            if index is None:
                index = jnp.arange(len(tokens)) // (len(tokens) // len(prefix.mask))
            before = [_row(x)[index] for x in (prefix.keys, prefix.values)]
            real = prefix.mask[index]
            behind = jnp.broadcast_to(real[:, None], (*segments.shape, size))
            ahead = jnp.zeros((len(tokens), size, segments.shape[1]), bool)
            first = _visible(real.astype(jnp.int32), before[1])
            mask = jnp.block([[first, ahead], [behind, mask]])
            own = [jnp.concatenate(both, 1) for both in zip(before, own, strict=True)]
            start = start + size
        states = apply(params, own[0], own[1], mask)
        return jax.lax.dynamic_slice_in_dim(states, start, time, axis=1), written

    return Policy(
        config=ModuleConfig(max_positions, tuple(stop_token_ids)),
        hidden=hidden,
        unembedding=lambda params: unembedding(params[_MODULE]),
        logical_axes={_MODULE: _axes(init, logical_axes)},
        init=jax.jit(lambda key: {_MODULE: init(key)}),
        # float32, whose integers reach to 2^24: samplers compute in a cache's dtype
        init_cache=lambda batch, n: init_cache(1, batch, n, 1, 1, jnp.float32),
        vocab_size=vocab_size,
        logit_softcap=logit_softcap,
    )


def _visible(segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """``[B, T, T]``: own segment, not after it; and itself, so that no row is empty."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    earlier = positions[:, None, :] <= positions[:, :, None]
    itself = jnp.eye(segment_ids.shape[1], dtype=bool)[None]
    return (same & earlier & (segment_ids > 0)[:, :, None]) | itself


def _row(stored: Any) -> jax.Array:
    """``[B, N]`` int32 of what a cache stores of the one layer."""
    return stored[0].reshape(len(stored[0]), -1).astype(jnp.int32)


def _like(stored: Any, row: jax.Array) -> Any:
    """The inverse of `_row`."""
    layer = row.astype(jnp.float32).reshape(stored[0].shape)
    return (layer,) if isinstance(stored, tuple) else layer[None]


def _axes(init: Callable, given: chex.ArrayTree | None) -> chex.ArrayTree:
    if given is not None:
        return given
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: (None,) * len(x.shape), shapes)
