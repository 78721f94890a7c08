"""Decoding: each context is computed once, its samples are decoded side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import chex
import jax
import numpy as np

from jaxrl_post.generation.choice import check_truncation, choose_tokens
from jaxrl_post.generation.decoding import Programs
from jaxrl_post.generation.plan import Plan, power_of_two
from jaxrl_post.generation.rollouts import Rollouts
from jaxrl_post.generation.schedule import Call, cut
from jaxrl_post.generation.slots import Contexts, Log
from jaxrl_post.models.policy import Policy
from jaxrl_post.numerics import check_number


class Sampler:
    """Samples from a policy, G responses to each of P contexts.

    A context is prefilled once, and its keys and values are stored once for all its
    samples. At most `slots` sequences are decoded side by side: where one ends, the
    device puts the next in its place, and as the last ones end, fewer slots are
    computed. Decoding runs in compiled dispatches of up to `steps_per_dispatch` tokens,
    which end early when every sequence has ended; the host looks in between, one
    dispatch behind the device.

    A sequence's random numbers depend on the call's key, its row in the result and the
    number of the token, on nothing else: not on slots, the order in which they are
    filled, padding or the mesh.

    For each width S of contexts there is a program for prefill; for decoding one for
    each length of the cache (128, 256, ... up to `max_new_tokens`) and number of slots
    (all, a quarter, a sixteenth, ... but not below 4) that a call comes to. Pad S to a
    few lengths (`generation.pad_contexts`); P matters only up to the next power of two,
    and not at all where it fills the slots several times.

    Under `jax.set_mesh` sequences are split over the mesh's batch axes. There the slots
    are filled in waves of whole groups, so that a group stays on its shard beside its
    context: refilling would move contexts between devices.
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
        prefill_tokens: int = 4096,
        continuous: bool = True,
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
          prefill_tokens: most tokens of a forward pass over contexts, for each shard
            of the batch; more are computed a part at a time.
          continuous: fill and shrink slots as sequences end; False: waves as on a mesh.

        Raises:
          ValueError: a number out of its range, an id that is no token.
        """
        check_number("max_new_tokens", max_new_tokens, 1)
        check_number("slots", slots, 1)
        check_number("temperature", temperature, 0)
        check_number("steps_per_dispatch", steps_per_dispatch, 1)
        check_number("prefill_tokens", prefill_tokens, 1)
        check_truncation(top_k, top_p, min_p)
        for token in stop_tokens:
            check_number("stop_tokens: id", token, 0, policy.vocab_size - 1)
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.slots = slots
        self.temperature = temperature
        self._stop_tokens = np.asarray(stop_tokens, np.int32)
        self._pad_token = pad_token
        self._prefill_tokens, self._continuous = prefill_tokens, continuous
        self.programs = Programs(
            policy,
            functools.partial(choose_tokens, top_k=top_k, top_p=top_p, min_p=min_p),
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            steps=steps_per_dispatch,
        )

    def generate(
        self,
        params: chex.ArrayTree,
        contexts: np.ndarray,
        context_mask: np.ndarray,
        *,
        key: jax.Array,
        group_size: int = 1,
        temperature: float | None = None,
        ended: Callable[[np.ndarray, Rollouts], None] | None = None,
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
          ended: ``ended(rows, part)``, called with what `stream` yields: sequences as
            soon as they have ended, while the device decodes the others.

        Returns:
          `Rollouts` of ``P * G`` rows, on the host.

        Raises:
          ValueError: an empty context; shapes that disagree; a context that with
            `max_new_tokens` exceeds the positions that the model was made for.
        """
        call = self.call(
            params,
            contexts,
            context_mask,
            key=key,
            group_size=group_size,
            temperature=temperature,
        )
        return self.collect(call, len(contexts) * group_size, ended)

    def stream(
        self,
        params: chex.ArrayTree,
        contexts: np.ndarray,
        context_mask: np.ndarray,
        *,
        key: jax.Array,
        group_size: int = 1,
        temperature: float | None = None,
    ) -> Iterator[tuple[np.ndarray, Rollouts]]:
        """As `generate`, each sequence as soon as it has ended.

        While the caller looks at some, say has them judged, the device decodes the
        others (one dispatch ahead).

        Args:
          params, contexts, context_mask, key, group_size, temperature: as there.

        Yields:
          The rows ``[n]`` of sequences in what `generate` returns, and those rows.
          Every row comes once.

        Raises:
          ValueError: as there.
        """
        call = self.call(
            params,
            contexts,
            context_mask,
            key=key,
            group_size=group_size,
            temperature=temperature,
        )
        return self.follow(call, len(contexts) * group_size)

    def call(
        self,
        params: chex.ArrayTree,
        contexts: np.ndarray,
        context_mask: np.ndarray,
        *,
        key: jax.Array,
        group_size: int = 1,
        temperature: float | None = None,
        keeps: bool = False,
        varies: bool = False,
    ) -> Call:
        """A call of `generate` that `collect` runs.

        Args:
          params, contexts, context_mask, key, group_size, temperature: as there.
          keeps: as in `schedule.Call`.
          varies: as in `plan`.
        """
        contexts, mask = np.asarray(contexts, np.int32), np.asarray(context_mask) != 0
        self._check(contexts, mask, group_size)

        def prefill(prompts: range, many: int, columns: int) -> Contexts:
            read = cut(prompts, many, columns, contexts, mask)
            return self.programs.prefill(params, *read, columns=columns)

        return Call(
            self.programs,
            params,
            prefill,
            self.plan(len(contexts), contexts.shape[1], group_size, varies=varies),
            choice=self.choice(key, temperature),
            keeps=keeps,
        )

    def choice(self, key: jax.Array, temperature: float | None) -> dict[str, Any]:
        """How the tokens of a call are chosen, for `schedule.Call`."""
        temperature = self.temperature if temperature is None else temperature
        check_number("temperature", temperature, 0)
        divisor = np.float32(temperature or 1)
        return {"key": key, "temperature": divisor, "greedy": temperature == 0}

    def collect(
        self,
        call: Call,
        count: int,
        ended: Callable[[np.ndarray, Rollouts], None] | None = None,
    ) -> Rollouts:
        """Runs a call of `count` sequences; `ended` as in `generate`."""
        result = self._empty_rollouts(count)
        for rows, part in self.follow(call, count):
            for whole, some in zip(*map(jax.tree.leaves, (result, part)), strict=True):
                whole[rows] = some
            if ended is not None:
                ended(rows, part)
        return result

    def follow(self, call: Call, count: int) -> Iterator[tuple[np.ndarray, Rollouts]]:
        """As `collect`, each sequence as soon as it has ended: see `stream`."""
        found = self._empty_rollouts(count)
        for log in call.run():
            rows = self._record(found, log)
            if len(rows):
                yield rows, jax.tree.map(lambda x, rows=rows: x[rows], found)

    def plan(
        self, prompts: int, width: int, group_size: int, *, varies: bool = False
    ) -> Plan:
        """How a call on contexts of such a shape is cut up, on the mesh that is set.

        Args:
          prompts, width, group_size: P, S and G.
          varies: whether the calls of a run differ in P, so that it is worth computing
            as many as the next power of two rather than compiling for each.
        """
        plan = Plan(
            prompts,
            width,
            group_size,
            self.slots,
            self._prefill_tokens,
            self._continuous,
        )
        if not varies:
            return plan
        each = power_of_two(-(-prompts // plan.shards)) * group_size
        slots = min(each * plan.shards, self.slots or each * plan.shards)
        return replace(plan, slots=slots)

    def _record(self, found: Rollouts, log: Log) -> np.ndarray:
        """Writes a dispatch's tokens to their places; returns the rows that end."""
        real = np.asarray(log.sequence) >= 0
        rows, at = np.asarray(log.sequence)[real], log.index[real]
        tokens = log.tokens[real]
        found.tokens[rows, at] = tokens
        found.mask[rows, at] = True
        found.logps[rows, at] = log.logps[real]
        found.sampler_logps[rows, at] = log.sampler_logps[real]
        found.stopped[rows[np.isin(tokens, self._stop_tokens)]] = True
        return rows[np.asarray(log.ended)[real]]

    def _empty_rollouts(self, rows: int) -> Rollouts:
        shape = (rows, self.max_new_tokens)
        return Rollouts(
            tokens=np.full(shape, self._pad_token, np.int32),
            mask=np.zeros(shape, bool),
            logps=np.zeros(shape, np.float32),
            sampler_logps=np.zeros(shape, np.float32),
            stopped=np.zeros(rows, bool),
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
        self.check_lengths(lengths)

    def check_lengths(self, lengths: np.ndarray) -> None:
        """Refuses contexts of so many tokens ``[P]`` that leave too few positions."""
        limit = getattr(self.policy.config, "max_positions", None)
        if limit is not None and lengths.max() + self.max_new_tokens > limit:
            raise ValueError(
                f"context {np.argmax(lengths)} has {lengths.max()} tokens; with "
                f"max_new_tokens={self.max_new_tokens} it exceeds the model's {limit} "
                "positions. Shorten the prompts (max_prompt_length) or max_new_tokens."
            )
