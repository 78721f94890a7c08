"""The threshold of HAPO's gate over a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jaxrl_post.numerics import check_choice, check_number

KINDS = ("constant", "sigmoid", "step", "annealed")


@dataclass(frozen=True)
class ThresholdSchedule:
    """The threshold gamma as a function of how much of the run is done.

    HAPO allows a constant, a sigmoid or a step function of training progress; their
    form the paper does not say. With g0 = start, g1 = end and p the progress:

    - "constant": g0.
    - "sigmoid": `g0 + (g1 - g0) (s(p) - s(0)) / (s(1) - s(0))`, where
      `s(p) = 1 / (1 + exp(-steepness (p - at)))`; exactly g0 and g1 at the ends.
    - "step": g0 while p < at, then g1.
    - "annealed": `g0 + (g1 - g0) p`. Not in the paper; unlike a constant, it makes
      injections end: the gate of N rollouts is off once gamma <= 1 / (N + 2).

    Values are Python floats, for `injection.should_inject`, which compares what a float
    prints as. A constant 0.8 is therefore exact; between the ends of a schedule a tie
    with a confidence is decided by the last bit, and means nothing.

    Args:
      kind: one of the four.
      start: gamma at progress 0, in [0, 1].
      end: gamma at progress 1, in [0, 1]; a constant has none.
      at: progress of the step, or of the middle of the sigmoid, in [0, 1].
      steepness: of the sigmoid, above 0.

    Raises:
      ValueError: an unknown kind, a number outside its interval.

    Source: HAPO, arXiv 2603.11321, Algorithm 1.

    >>> [ThresholdSchedule("annealed", 0.8)(p) for p in (0.0, 0.5, 1.0)]
    [0.8, 0.4, 0.0]
    >>> [ThresholdSchedule("step", 0.8, 0.3, at=0.6)(p) for p in (0.5, 0.6)]
    [0.8, 0.3]
    >>> [ThresholdSchedule("sigmoid", 0.8)(p) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.8, 0.744, 0.4, 0.0]
    """

    kind: str = "constant"
    start: float = 0.8
    end: float = 0.0
    at: float = 0.5
    steepness: float = 10.0

    def __post_init__(self) -> None:
        check_choice("threshold.kind", self.kind, KINDS)
        for name in ("start", "end", "at"):
            check_number(f"threshold.{name}", getattr(self, name), 0, 1)
        # Any larger, and exp overflows.
        check_number("threshold.steepness", self.steepness, 0, 500, open_low=True)

    def __call__(self, progress: float) -> float:
        """Gamma when a share `progress` of the run, in [0, 1], is done.

        Raises:
          ValueError: progress outside [0, 1].
        """
        check_number("progress", progress, 0, 1)
        done = self._done(progress)
        return (1 - done) * self.start + done * self.end

    def __str__(self) -> str:
        if self.kind == "constant":
            return f"{self.start:g}"
        return f"gamma, {self.kind} from {self.start:g} to {self.end:g}"

    @property
    def highest(self) -> float:
        """The largest gamma of the run."""
        return self.start if self.kind == "constant" else max(self.start, self.end)

    def _done(self, progress: float) -> float:
        """The share of the way from `start` to `end`."""
        if self.kind == "constant":
            return 0.0
        if self.kind == "step":
            return float(progress >= self.at)
        if self.kind == "annealed":
            return float(progress)
        low, here, high = (self._logistic(p) for p in (0.0, progress, 1.0))
        return (here - low) / (high - low)

    def _logistic(self, progress: float) -> float:
        return 1 / (1 + math.exp(-self.steepness * (progress - self.at)))


def threshold_schedule(
    setting: float | Mapping[str, Any] | ThresholdSchedule,
) -> ThresholdSchedule:
    """A schedule from a config: a number is a constant, a mapping its fields.

    Args:
      setting: gamma, or the fields of `ThresholdSchedule`, or one of those.

    Raises:
      ValueError: an unknown field, or a bad value of one.

    >>> threshold_schedule(0.8)(0.3)
    0.8
    >>> threshold_schedule({"kind": "annealed", "start": 0.6})(0.5)
    0.3
    """
    if isinstance(setting, ThresholdSchedule):
        return setting
    if isinstance(setting, Mapping):
        fields = tuple(ThresholdSchedule.__dataclass_fields__)
        for name in setting:
            check_choice("threshold field", name, fields)
        return ThresholdSchedule(**setting)
    return ThresholdSchedule(start=setting)


def check_threshold(
    schedule: ThresholdSchedule, group_size: int, *, replace_successes: bool = False
) -> None:
    """Refuses a threshold that replaces successes, warns of one that never injects.

    Above `(N + 1) / (N + 2)` the gate is open even for a group in which every rollout
    succeeded, and an injection there replaces a success; at most `1 / (N + 2)` a
    constant never opens it. A schedule may fall there.

    Args:
      schedule: of the run.
      group_size: N, rollouts per group.
      replace_successes: whether a success may be replaced.

    Raises:
      ValueError: a threshold too high, with the remedies.

    Source: HAPO, arXiv 2603.11321, Eqs. 6 and 7.

    >>> check_threshold(threshold_schedule(0.8), 8)  # at most 0.9: fine
    """
    highest = Fraction(str(schedule.highest)) * (group_size + 2)
    if highest > group_size + 1 and not replace_successes:
        limit = (group_size + 1) / (group_size + 2)
        raise ValueError(
            f"threshold={schedule.highest:g} is above (N + 1)/(N + 2) = {limit:.4g} "
            f"for group_size={group_size}: the gate would be open even where every "
            "rollout succeeded. Lower the threshold, enlarge the group, or allow it "
            "by replace_successes=true."
        )
    if highest <= 1:
        warnings.warn(
            f"threshold={schedule.highest:g} is at most 1/(N + 2) for "
            f"group_size={group_size}: nothing will ever be injected.",
            stacklevel=2,
        )
