"""Turns from a sampler: behind kept caches where there are any, else read again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import chex
import jax
import numpy as np

from jaxrl_post.generation import Conversation, Rollouts, Sampler, pad_contexts
from jaxrl_post.generation.plan import power_of_two
from jaxrl_post.training.turns import Turn
from jaxrl_post.training.widths import fit_width, pad_left

_OF_TURN = 1 << 21
"""Folded into the key of first turns, and a turn's number added, for those after."""
_LEAST = 16
"""Observations are not padded to less: each width is a program to compile."""


class Dialogue:
    """The turns of the answers to some prompts."""

    def __init__(
        self,
        sampler: Sampler,
        params: Callable[[], chex.ArrayTree],
        *,
        key: jax.Array,
        context_limit: int,
        temperature: float | None = None,
        mesh: jax.sharding.Mesh | None = None,
        keeps: bool = True,
    ) -> None:
        """
        Args:
          sampler: what turns are sampled by.
          params: the policy's parameters, the same at every turn.
          key: of first turns.
          context_limit: tokens of a prompt, at most.
          temperature: in place of the sampler's own.
          mesh: that the parameters lie on.
          keeps: whether caches may be kept. They lie on the device until the last turn;
            where answers have one, or the device is to do something else meanwhile,
            they should not.
        """
        self._sampler, self._params, self._key = sampler, params, key
        self._limit = context_limit + sampler.max_new_tokens
        self._temperature, self._mesh = temperature, mesh
        self._kept = Conversation(sampler) if keeps else None
        self._at: dict[int, int] = {}

    def begin(
        self,
        contexts: np.ndarray,
        mask: np.ndarray,
        *,
        group_size: int,
        ended: Callable[[np.ndarray, Rollouts], None] | None = None,
    ) -> Rollouts:
        """First turns, as `Sampler.generate` returns them."""
        sample = self._sampler.generate if self._kept is None else self._kept.begin
        with self._on_mesh():
            rollouts = sample(
                self._params(),
                contexts,
                mask,
                key=self._key,
                group_size=group_size,
                temperature=self._temperature,
                ended=ended,
            )
        self._at = {row: row for row in range(len(rollouts.tokens))}
        return rollouts

    def go_on(self, turn: Turn) -> Rollouts:
        """The next turn of answers that have had all turns before, in their order."""
        key = jax.random.fold_in(self._key, _OF_TURN + turn.number)
        with self._on_mesh():
            if self._kept is None or not self._kept.goes_on:
                whole = [[*a, *b] for a, b in zip(*turn[2:], strict=True)]
                contexts, mask = pad_contexts(whole)
                width = fit_width(contexts.shape[1], self._limit)
                padded = pad_left(contexts, width), pad_left(mask, width)
                call = self._sampler.call(
                    self._params(),
                    *padded,
                    key=key,
                    temperature=self._temperature,
                    varies=True,
                )
                return self._sampler.collect(call, len(contexts))
            read = [[a[-1], *b] for a, b in zip(*turn[2:], strict=True)]
            room = max(_LEAST, power_of_two(max(map(len, read))))
            mask = np.arange(room) < np.array([[len(ids)] for ids in read])
            tokens = np.zeros(mask.shape, np.int32)
            tokens[mask] = np.concatenate(read)
            longest = max(map(len, turn.before)) + room
            rollouts = self._kept.go_on(
                self._params(),
                np.array([self._at[row] for row in turn.rows]),
                tokens,
                mask,
                width=fit_width(longest, self._limit + room),
                key=key,
                temperature=self._temperature,
            )
        self._at = {row: i for i, row in enumerate(turn.rows)}
        return rollouts

    def _on_mesh(self):
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()
