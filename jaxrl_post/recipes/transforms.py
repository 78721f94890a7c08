"""Group transforms: what may happen to judged groups before they become a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jaxrl_post.advantages import overlong_penalty
from jaxrl_post.errors import InputError
from jaxrl_post.recipes.groups import Groups


@dataclass(frozen=True)
class OverlongPenalty:
    """Adds DAPO's soft length penalty to the rewards; see `advantages`.

    Attributes:
      max_length: tokens at which the penalty is whole.
      buffer: tokens before that over which it grows from 0.
      penalty: its size.
    """

    max_length: int
    buffer: int
    penalty: float = 1.0

    def __call__(self, groups: Groups) -> Groups:
        shaping = overlong_penalty(
            groups.lengths,
            max_length=self.max_length,
            buffer=self.buffer,
            penalty=self.penalty,
        )
        shaped = groups.rewards + np.asarray(shaping, np.float32)
        return replace(groups, rewards=np.where(groups.judged, shaped, 0.0))


@dataclass(frozen=True)
class CountSuccesses:
    """Adds a visit to what is remembered of the questions' success rates.

    Completions of which the judge does not know whether they succeed count for neither
    side.

    Raises:
      InputError: the judge gives rewards and never says what a success is.
    """

    def __call__(self, groups: Groups) -> Groups:
        if groups.posterior is None:
            return groups
        known = [[v.success for v in row] for row in groups.verdicts]
        visits = np.array([(row.count(True), row.count(False)) for row in known])
        if not visits.any() and groups.judged.any():
            raise InputError(
                "task.curriculum goes by successes, and the judge gives rewards but "
                "does not say what a success is; have it set Verdict.success."
            )
        return replace(groups, posterior=groups.posterior + visits)


@dataclass(frozen=True)
class DynamicSampling:
    """Drops groups whose verdicts all have one reward: they teach nothing.

    The trainer draws further prompts until the step is full again (DAPO, arXiv
    2503.14476). It looks at the judge's rewards, not at shaped ones: a length penalty
    must not make a group of failures count as informative.
    """

    def __call__(self, groups: Groups) -> Groups:
        kept = []
        for i, row in enumerate(groups.verdicts):
            rewards = {v.reward for v in row if v.reward is not None}
            if len(rewards) > 1:
                kept.append(i)
        return groups.take(kept)
