"""Decoding: each context is computed once, its samples run side by side in waves."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from jaxrl_post import vocabulary
from jaxrl_post.generation.choice import check_truncation, choose_tokens
from jaxrl_post.generation.rollouts import Rollouts
from jaxrl_post.models.cache import Cache, Prefix
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.stack import unstack_params
from jaxrl_post.numerics import check_number
from jaxrl_post.sharding.mesh import BATCH_AXES, auto_axes


class _Contexts(struct.PyTreeNode):
    """C prefilled contexts: what their samples share.

    Attributes:
      prefix: keys and values of the contexts.
      hidden: ``[C, D]`` hidden state of each context's last token.
      lengths: ``[C]`` number of tokens.
    """

    prefix: Prefix
    hidden: jax.Array
    lengths: jax.Array


class _Wave(struct.PyTreeNode):
    """B sequences in the course of decoding.

    Attributes:
      cache: keys and values of the tokens chosen so far, but the last.
      rollouts: the tokens chosen so far, with room for all.
      uniforms: ``[B, T, 2]`` random numbers for every token.
      positions: ``[B]`` position of the last chosen token.
      done: ``[B]`` ended, or a filler row.
      step: [] number of tokens chosen.
    """

    cache: Cache
    rollouts: Rollouts
    uniforms: jax.Array
    positions: jax.Array
    done: jax.Array
    step: jax.Array


class Sampler:
    """Samples from a policy, G responses to each of P contexts.

    A context is prefilled once, and its keys and values are stored once for all its
    samples. At most `slots` sequences are decoded side by side; more run in waves.
    Decoding runs in compiled dispatches of up to `steps_per_dispatch` tokens, which end
    early when every sequence has ended; the host looks in between, one dispatch behind
    the device.

    A sequence's random numbers depend on the call's key, its row in the result and the
    number of the token, on nothing else: not on slots, waves, padding or the mesh.

    For each shape of contexts ``[P, S]`` and group size there is one program each for
    prefill and decoding. Pad S to a few lengths (`generation.pad_contexts`); P matters
    only up to the next power of two, and not at all where it fills the slots.

    Under `jax.set_mesh` sequences are split over the mesh's batch axes.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_new_tokens: int,
        slots: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        pad_token: int = 0,
        steps_per_dispatch: int = 32,
    ) -> None:
        """Nothing is compiled before the first `generate`.

        Args:
          policy: the model.
          max_new_tokens: T, length limit of a response.
          slots: sequences decoded at one time; None: all of a call.
          temperature: that logits are divided by; 0: greedy.
          top_k, top_p, min_p: truncations, see `choice.choose_tokens`.
          stop_tokens: ids that end a response; each is part of the response it ends.
          pad_token: fills `Rollouts.tokens` after the end; may be a stop token.
          steps_per_dispatch: tokens between two looks of the host.

        Raises:
          ValueError: a number out of its range, an id that is no token.
        """
        check_number("max_new_tokens", max_new_tokens, 1)
        check_number("slots", slots, 1)
        check_number("temperature", temperature, 0)
        check_number("steps_per_dispatch", steps_per_dispatch, 1)
        check_truncation(top_k, top_p, min_p)
        for token in stop_tokens:
            check_number("stop_tokens: id", token, 0, policy.vocab_size - 1)
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.slots = slots
        self.temperature = temperature
        self._choose_tokens = functools.partial(
            choose_tokens, top_k=top_k, top_p=top_p, min_p=min_p
        )
        self._stop_tokens = tuple(stop_tokens)
        self._pad_token = pad_token
        self._steps_per_dispatch = steps_per_dispatch
        self._prefill = jax.jit(self._prefill_contexts)
        self._start = jax.jit(self._start_wave, static_argnames="greedy")
        self._decode = jax.jit(
            self._decode_steps, static_argnames="greedy", donate_argnames="wave"
        )
        self._prepare = jax.jit(self._decoding_params)

    def generate(
        self,
        params: chex.ArrayTree,
        contexts: np.ndarray,
        context_mask: np.ndarray,
        *,
        key: jax.Array,
        group_size: int = 1,
        temperature: float | None = None,
    ) -> Rollouts:
        """Samples `group_size` responses to every context.

        Args:
          params: the policy's parameters, as training holds them.
          contexts: ``[P, S]`` int token ids, padded anywhere.
          context_mask: ``[P, S]``, true for tokens.
          key: random key.
          group_size: G.
          temperature: in place of the sampler's own; costs no compilation (but
            between greedy and not).

        Returns:
          `Rollouts` of ``P * G`` rows, on the host.

        Raises:
          ValueError: an empty context; shapes that disagree; a context that with
            `max_new_tokens` exceeds the positions that the model was made for.
        """
        contexts, mask = np.asarray(contexts, np.int32), np.asarray(context_mask) != 0
        self._check(contexts, mask, group_size)
        temperature = self.temperature if temperature is None else temperature
        check_number("temperature", temperature, 0)
        greedy = temperature == 0
        choice = {"temperature": np.float32(temperature or 1), "greedy": greedy}

        rows = len(contexts) * group_size
        result = self._empty_rollouts(rows, np.zeros, np.full)
        decoding_params = self._prepare(params)
        for groups, parts in self._waves(len(contexts), group_size):
            shared = self._prefill(params, *_fill(contexts, mask, groups))
            for sequences in parts:
                wave = self._start(decoding_params, shared, key, sequences, **choice)
                rollouts = self._run(decoding_params, shared.prefix, wave, choice)
                real = sequences.ravel() >= 0
                for whole, part in zip(jax.tree.leaves(result), rollouts, strict=True):
                    whole[sequences.ravel()[real]] = part[real]
        return result

    def _run(self, params, prefix, wave, choice) -> list[np.ndarray]:
        """Decodes a wave to its end."""
        ended = wave.done.all()
        for _ in range(-(-(self.max_new_tokens - 1) // self._steps_per_dispatch)):
            dispatched = self._decode(params, prefix, wave, **choice)
            # The look at the dispatch before the one just made: the device has work
            # while the host waits. Of an ended wave a dispatch makes nothing.
            if bool(ended):
                wave = dispatched[0]
                break
            wave, ended = dispatched
        return [_to_host(x) for x in jax.tree.leaves(wave.rollouts)]

    def _waves(
        self, prompts: int, group_size: int
    ) -> Iterator[tuple[range, list[np.ndarray]]]:
        """C prompts at a time, and the waves that their sequences are decoded in.

        A wave is the rows ``[C, M]`` of its sequences in the result, -1 for fillers:
        C whole groups, or where `slots` is smaller than a group (on each shard of the
        batch) a part of each of C groups.
        """
        sizes = auto_axes()
        shards = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
        needed = -(-prompts // shards)
        slots = (self.slots or needed * group_size * shards) // shards
        if not slots:
            raise ValueError(
                f"slots={self.slots} is less than one sequence for each of the "
                f"{shards} shards of the batch; set it to a multiple of {shards}."
            )
        parts = -(-group_size // slots)
        members = -(-group_size // parts)
        groups = shards * min(slots // members, _power_of_two(needed))
        for first in range(0, prompts, groups):
            group = np.arange(first, first + groups)[:, None]
            waves = []
            for part in range(parts):
                member = np.arange(part * members, (part + 1) * members)[None]
                real = (group < prompts) & (member < group_size)
                rows = np.where(real, group * group_size + member, -1)
                waves.append(rows.astype(np.int32))
            yield range(first, first + groups), waves

    def _decoding_params(self, params):
        """Layers apart, and matrices in the dtype that they are multiplied in."""
        cache = jax.eval_shape(functools.partial(self.policy.init_cache, 1, 1))
        dtype = jax.tree.leaves(cache.keys)[0].dtype

        def narrow(x):
            wide = jnp.issubdtype(x.dtype, jnp.floating) and (
                x.dtype.itemsize > dtype.itemsize
            )
            # Vectors (the scales of norms) take part in float32 arithmetic.
            return x.astype(dtype) if wide and x.ndim > 1 else x

        return jax.tree.map(narrow, unstack_params(params))

    def _prefill_contexts(self, params, contexts, mask) -> _Contexts:
        contexts, mask = _shard_rows((contexts, mask))
        count, size = contexts.shape
        segments = mask.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=-1) - 1, 0)
        cache = self.policy.init_cache(count, size)
        hidden, filled = self.policy.hidden(
            params, contexts, positions, segments, cache
        )
        assert filled is not None  # as a cache was given
        last = size - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return _Contexts(filled.unstack().as_prefix(), hidden, segments.sum(axis=-1))

    def _start_wave(
        self, params, contexts, key, sequences, temperature, *, greedy
    ) -> _Wave:
        """The first tokens, chosen from the contexts' hidden states."""
        members = sequences.shape[1]
        sequences = sequences.reshape(-1)
        batch = sequences.size
        rollouts = self._empty_rollouts(batch, jnp.zeros, jnp.full)
        capacity = max(1, self.max_new_tokens - 1)

        def uniforms(sequence):
            own = jax.random.fold_in(key, sequence)
            return jax.random.uniform(own, (self.max_new_tokens, 2), jnp.float32)

        wave = _Wave(
            cache=self.policy.init_cache(batch, capacity).unstack(),
            rollouts=rollouts,
            uniforms=jax.vmap(uniforms)(sequences),
            positions=jnp.repeat(contexts.lengths, members) - 1,
            done=sequences < 0,
            step=jnp.zeros((), jnp.int32),
        )
        hidden = jnp.repeat(contexts.hidden, members, axis=0)
        return self._choose(params, wave, hidden, temperature, greedy)

    def _decode_steps(
        self, params, prefix, wave, temperature, *, greedy
    ) -> tuple[_Wave, jax.Array]:
        """Up to `steps_per_dispatch` more tokens, and whether all have ended."""
        limit = jnp.minimum(wave.step + self._steps_per_dispatch, self.max_new_tokens)

        def unfinished(wave):
            return (wave.step < limit) & ~wave.done.all()

        def advance(wave):
            at = wave.step - 1
            tokens = lax.dynamic_slice_in_dim(wave.rollouts.tokens, at, 1, axis=1)
            segments = (~wave.done).astype(jnp.int32)[:, None]
            hidden, cache = self.policy.hidden(
                params,
                tokens,
                wave.positions[:, None],
                segments,
                wave.cache.replace(prefix=prefix),
            )
            assert cache is not None
            wave = wave.replace(cache=cache.replace(prefix=None))
            return self._choose(params, wave, hidden[:, 0], temperature, greedy)

        wave = lax.while_loop(unfinished, advance, wave)
        return wave, wave.done.all()

    def _choose(self, params, wave, hidden, temperature, greedy) -> _Wave:
        """Chooses each sequence's next token from its last hidden state."""
        logits = vocabulary.logits(
            hidden,
            self.policy.unembedding(params),
            temperature=temperature,
            softcap=self.policy.logit_softcap,
            vocab_size=self.policy.vocab_size,
        )
        uniforms = lax.dynamic_index_in_dim(wave.uniforms, wave.step, 1, keepdims=False)
        choice = self._choose_tokens(logits, uniforms, greedy=greedy)

        alive = ~wave.done
        stops = jnp.asarray(self._stop_tokens, jnp.int32)
        stopping = (choice.tokens[:, None] == stops[None]).any(axis=-1) & alive

        def write(whole, column, otherwise):
            column = jnp.where(alive, column, otherwise).astype(whole.dtype)
            return lax.dynamic_update_slice(whole, column[:, None], (0, wave.step))

        old = wave.rollouts
        rollouts = Rollouts(
            tokens=write(old.tokens, choice.tokens, self._pad_token),
            mask=write(old.mask, alive, False),
            logps=write(old.logps, choice.logps, 0),
            sampler_logps=write(old.sampler_logps, choice.sampler_logps, 0),
            stopped=old.stopped | stopping,
        )
        return _shard_rows(
            wave.replace(
                rollouts=rollouts,
                positions=wave.positions + alive,
                done=wave.done | stopping,
                step=wave.step + 1,
            )
        )

    def _empty_rollouts(self, rows: int, zeros, full) -> Rollouts:
        shape = (rows, self.max_new_tokens)
        return Rollouts(
            tokens=full(shape, self._pad_token, np.int32),
            mask=zeros(shape, bool),
            logps=zeros(shape, np.float32),
            sampler_logps=zeros(shape, np.float32),
            stopped=zeros(rows, bool),
        )

    def _check(self, contexts: np.ndarray, mask: np.ndarray, group_size: int) -> None:
        check_number("group_size", group_size, 1)
        if contexts.ndim != 2 or contexts.shape != mask.shape:
            raise ValueError(
                f"contexts {contexts.shape} and context_mask {mask.shape} must both be "
                "[P, S]."
            )
        lengths = mask.sum(axis=-1)
        if not len(lengths):
            raise ValueError("contexts holds no rows; sampling needs at least one.")
        if not lengths.all():
            raise ValueError(
                f"context {np.argmin(lengths)} is empty; a response needs at least one "
                "token before it, such as the tokenizer's first token."
            )
        limit = getattr(self.policy.config, "max_positions", None)
        if limit is not None and lengths.max() + self.max_new_tokens > limit:
            raise ValueError(
                f"context {np.argmax(lengths)} has {lengths.max()} tokens; with "
                f"max_new_tokens={self.max_new_tokens} it exceeds the model's {limit} "
                "positions. Shorten the prompts (max_prompt_length) or max_new_tokens."
            )


def _fill(
    contexts: np.ndarray, mask: np.ndarray, rows: range
) -> tuple[np.ndarray, np.ndarray]:
    """The contexts and masks of `rows`; rows that do not exist are empty."""
    contexts, mask = contexts[rows.start : rows.stop], mask[rows.start : rows.stop]
    missing = ((0, len(rows) - len(contexts)), (0, 0))
    return np.pad(contexts, missing), np.pad(mask, missing)


def _shard_rows(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The leading axis of every array split over the mesh's batch axes."""
    axes = tuple(axis for axis in auto_axes() if axis in BATCH_AXES)
    if not axes:
        return tree

    def shard(x):
        if not x.ndim:
            return x
        spec = P(axes, *[P.UNCONSTRAINED] * (x.ndim - 1))
        return lax.with_sharding_constraint(x, spec)

    return jax.tree.map(shard, tree)


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array, in every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
