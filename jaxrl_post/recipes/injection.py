"""Demonstrations in the place of rollouts: HAPO's gate, LUFFY's one in each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from jaxrl_post.injection import (
    inject,
    injection_probability,
    posterior_mean,
    sample_confidence,
    update_posterior,
)
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.thresholds import (
    ThresholdSchedule,
    check_threshold,
    threshold_schedule,
)


@dataclass(frozen=True)
class Injection:
    """Replaces one rollout of a group by the prompt's demonstration, where it is due.

    HAPO (arXiv 2603.11321): S of a group's N rollouts succeeded, the posterior of the
    success rate is Beta(1 + S, 1 + N - S), and where its mean ``c = (1 + S)/(2 + N)``
    (Eq. 6) is below the threshold the worst rollout gives way (Eq. 7, Algorithm 1).
    Advantages are of the group as it then is. A group whose prompt has no available
    demonstration stays as it is. The demonstration counts as a rollout with its own
    reward: text and verdict take the replaced one's place too.

    Attributes:
      threshold: gamma: a number, a schedule, or the fields of one; see
        `thresholds.threshold_schedule`.
      gate: "mean", the paper's; "thompson", open where a draw from the posterior is
        below the threshold; "always", open.
      position: which rollout gives way: the "worst", one that could not be judged
        before all others; or the "last", whatever it earned. LUFFY samples one rollout
        less instead; to sample it and drop it keeps the groups of prompts without a
        demonstration whole.
      tie: which of several worst: the "first", or a "random" one. The paper does not
        say.
      success_threshold: a rollout succeeded if the judge's reward is at least this. A
        rollout that could not be judged did not.
      replace_successes: open the gate for groups in which every rollout succeeded
        too, and permit a threshold that leads there.
    """

    threshold: float | Mapping[str, Any] | ThresholdSchedule = 0.8
    gate: Literal["mean", "thompson", "always"] = "mean"
    position: Literal["worst", "last"] = "worst"
    tie: Literal["first", "random"] = "first"
    success_threshold: float = 1.0
    replace_successes: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("gate", ("mean", "thompson", "always")),
            ("position", ("worst", "last")),
            ("tie", ("first", "random")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name}={value!r}; it is one of {', '.join(choices)}."
                )
        object.__setattr__(self, "threshold", threshold_schedule(self.threshold))

    def __str__(self) -> str:
        where = f"in place of the {self.position} rollout"
        if self.gate == "always":
            return f"the demonstration {where}"
        of = "c" if self.gate == "mean" else "p ~ posterior"
        return f"the demonstration {where}, where {of} < {self._schedule}"

    @property
    def _schedule(self) -> ThresholdSchedule:
        return threshold_schedule(self.threshold)

    def check_group_size(self, group_size: int) -> None:
        """Warns of a threshold that never injects.

        Raises:
          ValueError: the threshold replaces successes although it must not.
        """
        if self.gate == "mean":
            check_threshold(
                self._schedule, group_size, replace_successes=self.replace_successes
            )

    def __call__(self, groups: Groups) -> Groups:
        given = groups.demonstrations
        if given is None:
            raise ValueError(
                "Injection needs Groups.demonstrations; the trainer fills them for "
                "recipes with demonstrations=True."
            )
        size = groups.rewards.shape[1]
        self.check_group_size(size)
        successes = self._successes(groups)
        prior = groups.posterior
        posterior = update_posterior(
            np.ones((len(groups), 2)) if prior is None else prior, successes, size
        )
        confidence = posterior_mean(posterior)
        of_rows = np.repeat(confidence[:, None], size, 1)
        key = jax.random.key(groups.seed)
        due = self._gate(groups, posterior) & (
            (successes < size) | self.replace_successes
        )
        rows = {
            "tokens": given.tokens,
            "mask": given.mask,
            "sampler_logps": given.sampler_logps,
            "stopped": given.stopped,
            "rewards": given.rewards,
        }
        own = {name: getattr(groups, name) for name in rows}
        own |= {"judged": groups.judged, "is_teacher": np.zeros_like(groups.mask)}
        rows |= {"judged": given.available, "is_teacher": given.is_teacher}
        if groups.observed is not None:
            own["observed"] = groups.observed
            rows["observed"] = np.zeros_like(given.mask)
        new, replaced = inject(
            own,
            rows,
            gate=due,
            available=given.available,
            scores=self._scores(groups),
            tie=self.tie,
            key=key,
        )
        new = {name: np.asarray(x) for name, x in new.items()}
        injected = np.asarray(replaced)
        return replace(
            groups,
            **new,
            completions=_replaced(groups.completions, given.texts, injected),
            verdicts=_replaced(groups.verdicts, given.verdicts, injected),
            extras={**groups.extras, "confidence": of_rows.astype(np.float32)},
            posterior=None if prior is None else posterior,
            metrics={
                **groups.metrics,
                "injection/rate": injected.any(1).astype(float),
                "injection/confidence": confidence,
                **_histogram(confidence),
                "injection/zero_std_groups": _alike(new["rewards"], new["judged"]),
                **self._expected(groups, successes),
            },
        )

    def _successes(self, groups: Groups) -> np.ndarray:
        """``[P]``, S of each group: what the judge says, not shaped rewards."""
        return np.array(
            [
                sum(
                    v.reward is not None and v.reward >= self.success_threshold
                    for v in row
                )
                for row in groups.verdicts
            ]
        )

    def _gate(self, groups: Groups, posterior: np.ndarray) -> np.ndarray:
        if self.gate == "always":
            return np.ones(len(groups), bool)
        if self.gate == "thompson":
            sure = sample_confidence(posterior, np.random.default_rng(groups.seed))
        else:
            sure = posterior_mean(posterior)
        return sure < self._schedule(groups.progress)

    def _scores(self, groups: Groups) -> np.ndarray:
        """``[P, G]``, of which the lowest is replaced."""
        if self.position == "last":
            return -np.arange(groups.judged.shape[1]) * np.ones(groups.judged.shape)
        return np.where(groups.judged, groups.rewards, -np.inf)

    def _expected(self, groups: Groups, successes: np.ndarray) -> Mapping[str, Any]:
        """How often a gate without memory would open at this success rate."""
        if self.gate == "always":
            return {}
        size = groups.rewards.shape[1]
        probability = injection_probability(
            successes.mean() / size,
            size,
            threshold=self._schedule(groups.progress),
            sampled=self.gate == "thompson",
        )
        return {"injection/probability": np.full(len(groups), float(probability))}


def _histogram(confidence: np.ndarray) -> Mapping[str, np.ndarray]:
    """``[P]`` by bin, 1 where the confidence lies in it; named by its lower edge."""
    bins = np.minimum(np.floor(10 * confidence + 1e-9), 9)
    return {
        f"injection/confidence_bins/{i / 10:.1f}": (bins == i).astype(float)
        for i in range(10)
    }


def _replaced(own, given, where: np.ndarray):
    """Rows of G entries, with the given one where it replaced a rollout."""
    return tuple(
        tuple(given[p] if where[p, g] else x for g, x in enumerate(row))
        for p, row in enumerate(own)
    )


def _alike(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """``[P]``, 1 for groups whose rewards are all equal: their advantages are 0."""
    highest = np.where(judged, rewards, -np.inf).max(1)
    lowest = np.where(judged, rewards, np.inf).min(1)
    return (highest <= lowest).astype(float)
