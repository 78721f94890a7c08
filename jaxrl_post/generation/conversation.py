"""Responses that go on behind what is said to them, without being read again."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import numpy as np

from jaxrl_post.generation.kept import Kept
from jaxrl_post.generation.rollouts import Rollouts
from jaxrl_post.generation.sampler import Sampler
from jaxrl_post.generation.schedule import Call, cut
from jaxrl_post.generation.slots import Contexts


class Conversation:
    """A call of a sampler whose sequences may go on.

    Their keys and values stay on the device, so that a turn reads nothing but the token
    that the turn before ended with and what is said behind it. That takes memory for
    all sequences at a time: they have to be decoded side by side, on one device.

    A turn's random numbers depend on its key and the row, as in `Sampler.generate`: the
    tokens are those that it samples from the whole of the context, up to rounding.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._kept: Kept | None = None

    def begin(
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
        """First turns; everything is as in `Sampler.generate`.

        Raises:
          ValueError: as there.
        """
        prompts, width = np.shape(contexts)
        plan = self._sampler.plan(prompts, width, group_size)
        call = self._sampler.call(
            params,
            contexts,
            context_mask,
            key=key,
            group_size=group_size,
            temperature=temperature,
            keeps=plan.at_once,
        )
        lengths = np.repeat(np.asarray(context_mask).sum(axis=-1), group_size)
        return self._run(call, lengths, ended)

    @property
    def goes_on(self) -> bool:
        """Whether the last turns were kept."""
        return self._kept is not None

    def go_on(
        self,
        params: chex.ArrayTree,
        rows: np.ndarray,
        tokens: np.ndarray,
        mask: np.ndarray,
        *,
        key: jax.Array,
        width: int | None = None,
        temperature: float | None = None,
    ) -> Rollouts:
        """The next turns of some sequences.

        Args:
          params: those that the turns before were sampled with.
          rows: ``[n]``, which sequences, as rows of what was returned last.
          tokens: ``[n, W]`` int token ids: the last that the sequence was given, then
            what is said to it, padded on the right.
          mask: ``[n, W]``, true for tokens.
          key: random key.
          width: columns of context that there is room for, each number a program to
            compile; None: as many as are needed.
          temperature: as in `Sampler.generate`.

        Returns:
          `Rollouts` of n rows, on the host.

        Raises:
          ValueError: nothing was kept; too few columns or positions; a sequence that
            nothing is said to.
        """
        if self._kept is None:
            raise ValueError(
                "there is nothing to go on with: sequences are kept where all are "
                "decoded side by side (slots), on one device; sample from whole "
                "contexts with Sampler.generate."
            )
        rows, mask = np.asarray(rows, np.int32), np.asarray(mask) != 0
        tokens, said = np.asarray(tokens, np.int32), mask.sum(axis=-1)
        if not len(rows) or not said.all():
            raise ValueError("every sequence that goes on needs a token to go on from.")
        before = self._lengths[rows] - 1  # the last token is read with what is said
        sampler, room = self._sampler, tokens.shape[1]
        sampler.check_lengths(before + said)
        width = int(before.max()) + room if width is None else width
        if before.max() > width - room:
            raise ValueError(
                f"width={width}: {before.max()} tokens before and {room} columns for "
                "what is said need more."
            )
        programs, plan = sampler.programs, sampler.plan(len(rows), room, 1, varies=True)
        ((whole, _),) = plan.waves()

        def prefill(prompts: range, many: int, columns: int) -> Contexts:
            read = cut(prompts, many, columns, tokens, mask)
            chosen = np.pad(x := rows[prompts.start : prompts.stop], (0, many - len(x)))
            cache, lengths = programs.gather(
                self._kept, chosen, width=width - room, room=read[0].shape[1]
            )
            if prompts.stop == whole.stop:
                self._kept = None  # makes room for what is decoded
            return programs.extend(params, cache, lengths, *read, columns=columns)

        call = Call(
            programs,
            params,
            prefill,
            plan,
            choice=sampler.choice(key, temperature),
            keeps=True,
        )
        return self._run(call, before + said)

    def _run(
        self,
        call: Call,
        lengths: np.ndarray,
        ended: Callable[[np.ndarray, Rollouts], None] | None = None,
    ) -> Rollouts:
        rollouts = self._sampler.collect(call, len(lengths), ended)
        self._kept, self._lengths = call.kept, lengths + rollouts.lengths
        return rollouts
