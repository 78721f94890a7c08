"""What the rest of the package knows of a language model: a few pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import chex
import jax

from jaxrl_post.models.cache import Cache
from jaxrl_post.models.experts import Load


class HiddenFn(Protocol):
    """`Policy.hidden`: tokens in, final hidden states out; see `Policy`."""

    def __call__(
        self,
        params: chex.ArrayTree,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]: ...


class RoutingFn(Protocol):
    """`Policy.routing`: as `HiddenFn`, and the loads of the experts."""

    def __call__(
        self,
        params: chex.ArrayTree,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None, Load]: ...


@dataclass(frozen=True)
class Policy:
    """A language model as pure functions of its parameters.

    Nothing here multiplies hidden states by the unembedding: that is
    `vocabulary.map_logits`, the one place where logits exist.

    Attributes:
      config: the architecture's numbers; only `models` looks inside.
      hidden: ``hidden(params, tokens, positions, segment_ids, cache=None)`` returns
        the final (normalised) hidden states ``[B, T, D]`` and the cache with these
        tokens' keys and values written after those it held. ``tokens``,
        ``positions`` and ``segment_ids`` are ``[B, T]`` int32. A token attends to
        the tokens of its own segment that do not come after it, and to the cache's
        prefix; segment 0 is padding and attends to nothing that matters.
      unembedding: ``unembedding(params)``, the ``[V, D]`` matrix behind the logits.
        V may exceed `vocab_size` by padding rows, which come last.
      logical_axes: a tree like the parameters whose leaves are tuples with one axis
        name per dimension; `sharding.rules` maps the names to mesh axes.
      init: ``init(key)``, random parameters in float32.
      init_cache: ``init_cache(batch, capacity)``, an empty `Cache`.
      vocab_size: number of tokens that exist; rows above are never sampled.
      logit_softcap: ``c`` where the family's logits are ``c * tanh(logits / c)``.
      routing: what `hidden` returns and, in the same pass, what the routers did with
        the tokens of each row, padding not counted: a `Load` ``[L, B, ...]``. None:
        the model has no experts.
    """

    config: Any
    hidden: HiddenFn
    unembedding: Callable[[chex.ArrayTree], jax.Array]
    logical_axes: chex.ArrayTree
    init: Callable[[jax.Array], chex.ArrayTree]
    init_cache: Callable[[int, int], Cache]
    vocab_size: int
    logit_softcap: float | None = None
    routing: RoutingFn | None = None
