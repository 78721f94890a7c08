"""The compiled programs of a sampler: prefill, the first tokens, the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_post import vocabulary
from jaxrl_post.generation.choice import Choice
from jaxrl_post.generation.kept import Kept
from jaxrl_post.generation.random import key_words, uniforms
from jaxrl_post.generation.slots import Contexts, Log, Queue, Slots, shard_rows
from jaxrl_post.models.cache import Cache
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.stack import unstack_params


class Programs:
    """Jitted functions of arrays; they hold no state but what they were compiled for.

    Attributes:
      max_new_tokens: T.
      steps: K.

    In all of them `grouped` says that slots are whole groups in the contexts' order, so
    that a group reads its context in one product and nothing is refilled. Otherwise any
    slot may have any context, which is gathered for it, a layer at a time.
    """

    def __init__(
        self,
        policy: Policy,
        choose_tokens: Callable[..., Choice],
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        steps: int,
    ) -> None:
        """
        Args:
          policy: the model.
          choose_tokens: `choice.choose_tokens` with its truncations.
          max_new_tokens: T.
          stop_tokens: ids that end a sequence.
          steps: K, most tokens of a dispatch.
        """
        self._policy, self._choose_tokens = policy, choose_tokens
        self.max_new_tokens, self.steps = max_new_tokens, steps
        self._stops = tuple(stop_tokens)
        static = ("greedy", "grouped")
        self.prepare = jax.jit(self._prepare)
        self.prefill = jax.jit(self._prefill, static_argnames="columns")
        self.gather = jax.jit(Kept.gather, static_argnames=("width", "room"))
        self.extend = jax.jit(self._read, static_argnames="columns")
        self.restore = jax.jit(Slots.restore)
        self.widen = jax.jit(Contexts.widen, static_argnums=1)
        self.install = jax.jit(Contexts.install, donate_argnums=0)
        self.start = jax.jit(self._start, static_argnames=(*static, "capacity"))
        self.decode = jax.jit(
            self._decode, static_argnames=static, donate_argnames="slots"
        )
        self.resize = jax.jit(Slots.resize, static_argnums=1)
        self.compact = jax.jit(Slots.compact, static_argnums=1)

    def _prepare(self, params):
        """Layers apart, and matrices in the dtype that they are multiplied in."""
        cache = jax.eval_shape(functools.partial(self._policy.init_cache, 1, 1))
        dtype = jax.tree.leaves(cache.keys)[0].dtype

        def narrow(x):
            wide = jnp.issubdtype(x.dtype, jnp.floating) and (
                x.dtype.itemsize > dtype.itemsize
            )
            # Vectors (the scales of norms) take part in float32 arithmetic.
            return x.astype(dtype) if wide and x.ndim > 1 else x

        return jax.tree.map(narrow, unstack_params(params))

    def _prefill(self, params, contexts, mask, *, columns: int) -> Contexts:
        """Contexts ``[C, S]``, so many columns at a time; S a multiple of them."""
        count, size = contexts.shape
        cache, before = self._policy.init_cache(count, size), jnp.zeros(count, int)
        return self._read(params, cache, before, contexts, mask, columns)

    def _read(self, params, cache: Cache, before, contexts, mask, columns) -> Contexts:
        """Contexts ``[C, S]`` behind what a cache holds, ``[C]`` tokens `before`."""
        contexts, mask = shard_rows((contexts, mask))
        count, size = contexts.shape
        segments = mask.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=-1) - 1, 0)
        positions += before[:, None]
        last = size - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
        is_last = jnp.arange(size)[None] == last[:, None]

        def chunk(carry, at):
            cache, found = carry
            tokens, positions, segments, is_last = at
            hidden, cache = self._policy.hidden(
                params, tokens, positions, segments, cache
            )
            here = jnp.take_along_axis(
                hidden, jnp.argmax(is_last, axis=-1)[:, None, None], axis=1
            )[:, 0]
            found = jnp.where(is_last.any(axis=-1, keepdims=True), here, found)
            return (cache, found), None

        parts = [
            jnp.swapaxes(x.reshape(count, -1, columns), 0, 1)
            for x in (contexts, positions, segments, is_last)
        ]
        width = self._policy.unembedding(params).shape[-1]
        dtype = jax.tree.leaves(cache.keys)[0].dtype
        found = jnp.zeros((count, width), dtype)
        (cache, found), _ = lax.scan(chunk, (cache, found), parts)
        prefix = cache.unstack().as_ring().as_prefix()
        return shard_rows(Contexts(prefix, found, before + segments.sum(axis=-1)))

    def _start(
        self,
        params,
        contexts: Contexts,
        sequence,
        row,
        first,
        key,
        temperature,
        *,
        greedy,
        grouped,
        capacity,
    ) -> tuple[Slots, Log, jax.Array]:
        """Slots with their first sequences, whose first tokens the contexts predict.

        `first` is the first sequence that is left for later.
        """
        size = sequence.size
        if grouped:
            members = size // contexts.lengths.size
            hidden, start = (
                jnp.repeat(x, members, axis=0)
                for x in (contexts.hidden, contexts.lengths)
            )
        else:
            hidden, start = contexts.hidden[row], contexts.lengths[row]
        empty = jnp.zeros((size,), jnp.int32)
        slots = Slots(
            cache=self._policy.init_cache(size, capacity).unstack().as_ring(),
            sequence=sequence,
            row=row,
            start=start,
            count=empty,
            token=empty,
            clock=jnp.zeros((), jnp.int32),
            next=first,
        )
        log = Log.empty(size, 1)
        words = key_words(key)
        slots, log = self._choose(
            params, slots, log, hidden, words, temperature, greedy
        )
        return slots, log, slots.status()

    def _decode(
        self,
        params,
        contexts: Contexts,
        slots: Slots,
        queue: Queue,
        key,
        temperature,
        *,
        greedy,
        grouped,
    ) -> tuple[Slots, Log, jax.Array]:
        """Up to K more tokens for every slot; fewer where all have ended, or a sequence
        fills the cache."""
        room, words = slots.capacity, key_words(key)

        def goes_on(state):
            slots, log = state
            alive = slots.sequence >= 0
            left = alive.any() | (slots.next < queue.limit)
            if room < self.max_new_tokens - 1:
                left &= (jnp.where(alive, slots.count, 0) <= room).all()
            return left & (log.size < self.steps)

        def advance(state):
            slots, log = state
            if not grouped:
                slots = slots.refill(contexts, queue)
            begun = (slots.sequence >= 0) & (slots.count > 0)
            prefix = contexts.prefix.replace(index=None if grouped else slots.row)
            hidden, cache = self._policy.hidden(
                params,
                slots.token[:, None],
                jnp.maximum(slots.start + slots.count - 1, 0)[:, None],
                jnp.where(begun, slots.sequence + 1, 0)[:, None],
                slots.cache.replace(prefix=prefix, length=slots.clock % room),
            )
            assert cache is not None  # as one was given
            hidden = hidden[:, 0]
            if not grouped:
                hidden = jnp.where(begun[:, None], hidden, contexts.hidden[slots.row])
            slots = slots.replace(
                cache=cache.replace(prefix=None, length=slots.cache.length),
                clock=slots.clock + 1,
            )
            return self._choose(params, slots, log, hidden, words, temperature, greedy)

        log = Log.empty(slots.sequence.size, self.steps)
        slots, log = lax.while_loop(goes_on, advance, (slots, log))
        return slots, log, slots.status()

    def _choose(
        self, params, slots: Slots, log: Log, hidden, words, temperature, greedy
    ) -> tuple[Slots, Log]:
        """Each slot's next token from its last hidden state; ended ones are empty."""
        logits = vocabulary.logits(
            hidden,
            self._policy.unembedding(params),
            temperature=temperature,
            softcap=self._policy.logit_softcap,
            vocab_size=self._policy.vocab_size,
        )

        random = uniforms(words, slots.sequence, slots.count)
        choice = self._choose_tokens(logits, random, greedy=greedy)
        stops = jnp.asarray(self._stops, jnp.int32)
        ended = (choice.tokens[:, None] == stops[None]).any(axis=-1)
        ended |= slots.count + 1 >= self.max_new_tokens
        alive = slots.sequence >= 0
        log = log.append(
            sequence=slots.sequence,
            index=slots.count,
            tokens=choice.tokens,
            logps=choice.logps,
            sampler_logps=choice.sampler_logps,
            ended=ended & alive,
        )
        slots = slots.replace(
            token=choice.tokens,
            count=slots.count + 1,
            sequence=jnp.where(ended, -1, slots.sequence),
        )
        return shard_rows(slots), shard_rows(log)
