"""How much of a demonstration is given, and from where on the policy goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class PrefixSchedule:
    """Which share of each demonstration is given (LUFFY, arXiv 2504.14945, its code).

    The first ``floor(share * length)`` tokens are given, the end token counted in the
    length; the policy writes the rest, in the same sequence. A whole demonstration,
    share 1, leaves nothing to write.

    Attributes:
      lowest, highest: of the shares, in [0, 1]; equal for a fixed one.
      kind: "random", drawn evenly between the two for each prompt; "linear", from
        `highest` when training begins down to `lowest` at its end, the same for all
        prompts of a step.

    >>> PrefixSchedule(0.2, 0.8, "linear").shares(2, 0.5, np.random.default_rng(0))
    array([0.5, 0.5])
    """

    lowest: float = 1.0
    highest: float = 1.0
    kind: Literal["random", "linear"] = "random"

    def __post_init__(self) -> None:
        if self.kind not in ("random", "linear"):
            raise ValueError(f"prefix kind={self.kind!r}; it is one of random, linear.")
        if not 0 <= self.lowest <= self.highest <= 1:
            raise ValueError(
                f"prefix lowest={self.lowest} and highest={self.highest}: shares lie "
                "in [0, 1], the lowest first."
            )

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return f"first {self.lowest:.0%}"
        if self.kind == "random":
            return f"first {self.lowest:.0%} to {self.highest:.0%}, at random"
        return f"first {self.highest:.0%}, falling to {self.lowest:.0%}"

    def shares(
        self, count: int, progress: float, rng: np.random.Generator
    ) -> np.ndarray:
        """``[count]`` float64, the share for each prompt.

        Args:
          count: prompts.
          progress: share of the run's steps that are done, in [0, 1).
          rng: for "random".
        """
        if self.kind == "random":
            return rng.uniform(self.lowest, self.highest, count)
        return np.full(count, self.highest - progress * (self.highest - self.lowest))
