"""Demonstrations of which only the beginning is given, put together with the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jaxrl_post.generation import Rollouts
from jaxrl_post.recipes.groups import Demonstrations


def continue_prefixes(
    given: Demonstrations, kept: np.ndarray, goes_on: np.ndarray, rollouts: Rollouts
) -> Demonstrations:
    """Demonstrations cut after `kept` tokens, the policy's tokens behind the cut.

    Args:
      given: whole demonstrations of P questions.
      kept: ``[P]`` tokens that stay.
      goes_on: ``[P]`` bool, those that are cut; the others stay whole.
      rollouts: the P continuations.

    Returns:
      ``[P, T]`` arrays; a sequence that reaches T without an end has not stopped.
      Rewards, texts and verdicts are the whole demonstrations' still.
    """
    tokens, mask = given.tokens.copy(), given.mask.copy()
    is_teacher, logps = given.is_teacher.copy(), given.sampler_logps.copy()
    stopped = given.stopped.copy()
    width = tokens.shape[1]
    new_mask = np.asarray(rollouts.mask)
    for p in np.flatnonzero(goes_on):
        k = int(kept[p])
        length = int(new_mask[p].sum())
        here = slice(k, min(k + length, width))
        count = here.stop - k
        for row in (tokens[p], mask[p], is_teacher[p], logps[p]):
            row[k:] = 0
        tokens[p, here] = np.asarray(rollouts.tokens)[p, :count]
        logps[p, here] = np.asarray(rollouts.sampler_logps)[p, :count]
        mask[p, here] = True
        stopped[p] = bool(np.asarray(rollouts.stopped)[p]) and count == length
    return replace(
        given,
        tokens=tokens,
        mask=mask,
        is_teacher=is_teacher,
        sampler_logps=logps,
        stopped=stopped,
    )
