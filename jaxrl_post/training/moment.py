"""When in a run a step is made, what it samples from, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import chex
import numpy as np

from jaxrl_post.recipes.groups import Groups


@dataclass(frozen=True)
class Moment:
    """When in a run a step is made, and what is known by then.

    Attributes:
      step: counted from 1.
      progress: share of the stage's steps that are done before it, in [0, 1).
      cursor: prompts drawn before.
      posterior: ``[R, 2]`` float64, of the success rates of the task's R questions,
        for recipes that remember them; else None.
    """

    step: int = 1
    progress: float = 0.0
    cursor: int = 0
    posterior: np.ndarray | None = None


@dataclass(frozen=True)
class Collected:
    """The groups of a step, and what came of making them.

    Attributes:
      groups: at most `prompts_per_step` (fewer only where the recipe's rounds are used
        up).
      cursor: prompts drawn by now.
      posterior: as in `Moment`, after this step's visits.
      metrics: of everything that was sampled.
    """

    groups: Groups
    cursor: int
    posterior: np.ndarray | None
    metrics: dict[str, float]


class Source:
    """What a step's completions are sampled from.

    Attributes:
      params: parameters of the policy.
      shared: whether the device has something else to do as well.
    """

    def __init__(
        self, params: chex.ArrayTree, meanwhile: Callable[[], chex.ArrayTree] | None
    ) -> None:
        """
        Args:
          params: to begin with.
          meanwhile: called when the first completions are sampled, so that the device
            has something to do while they are judged; returns the same parameters, for
            it may donate them.
        """
        self.params, self._meanwhile = params, meanwhile
        self.shared = meanwhile is not None

    def sampled(self) -> None:
        """Some completions are sampled."""
        if self._meanwhile is not None:
            self.params, self._meanwhile = self._meanwhile(), None
