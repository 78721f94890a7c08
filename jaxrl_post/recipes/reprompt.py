"""What the self-teacher is shown: which solution, which feedback, for which sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxrl_post.recipes.groups import Groups
from jaxrl_post.tasks.reprompt import DEFAULT, Templates, strip_thinking
from jaxrl_post.types import Verdict

DEMONSTRATIONS = ("first", "random", "shortest", "reference", "none")
FEEDBACK = ("never", "without_demonstration", "always")


class Privileged(NamedTuple):
    """What the teacher knows of one sample's question beyond the question.

    Attributes:
      demonstration: a right solution, or None.
      feedback: what was wrong with this sample, or None.
    """

    demonstration: str | None = None
    feedback: str | None = None

    def __bool__(self) -> bool:
        return self.demonstration is not None or self.feedback is not None


@dataclass(frozen=True)
class Reprompt:
    """How teacher contexts come from judged groups (SDPO, arXiv 2601.20802).

    A sample for which there is neither a solution nor feedback, blank ones included, is
    not distilled.

    Attributes:
      demonstration: which successful sibling's completion is shown: the "first" in the
        group, as the reference implementation does; a "random" one; the "shortest";
        or the data's own solution, "reference"; or "none".
      feedback: when the judge's feedback on the sample is shown: "never"; only
        "without_demonstration", the reference implementation's default; "always".
      exclude_self: a sample is never shown its own completion, so that the only success
        of a group has no demonstration. Without it a successful sample may be.
      success_threshold: reward from which a sibling counts as a success; None: what the
        judge calls one.
      leave_out_correct: do not distil samples that are successes themselves.
      balance_groups: weight a group by ``sqrt(p (1 - p))``, p its success rate.
      remove_thinking: take ``<think>...</think>`` out of demonstrations.
      max_length: tokens of a teacher context; what exceeds it is cut from demonstration
        and feedback, never from the question.
      templates: the wording; from a config, a mapping with some of its fields.
    """

    demonstration: Literal["first", "random", "shortest", "reference", "none"] = "first"
    feedback: Literal["never", "without_demonstration", "always"] = "never"
    exclude_self: bool = True
    success_threshold: float | None = None
    leave_out_correct: bool = False
    balance_groups: bool = False
    remove_thinking: bool = True
    max_length: int = 10_240
    templates: Templates = field(default=DEFAULT)

    def __post_init__(self) -> None:
        if isinstance(self.templates, Mapping):
            object.__setattr__(self, "templates", Templates(**self.templates))
        for name, choices in (
            ("demonstration", DEMONSTRATIONS),
            ("feedback", FEEDBACK),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"reprompt {name}={value!r}; it is one of {', '.join(choices)}."
                )
        if self.demonstration == "none" and self.feedback == "never":
            raise ValueError(
                "demonstration='none' and feedback='never' leave the teacher nothing "
                "to know; allow one of them."
            )

    def choose(
        self, groups: Groups, rng: np.random.Generator
    ) -> list[list[Privileged]]:
        """What the teacher is shown for each sample, P rows of G.

        Args:
          groups: judged groups.
          rng: for ``demonstration="random"``.
        """
        return [self._choose_group(groups, p, rng) for p in range(len(groups))]

    def successes(self, groups: Groups) -> np.ndarray:
        """``[P, G]`` bool, samples that may serve as demonstrations."""
        return np.array(
            [[self._is_success(v) for v in row] for row in groups.verdicts], bool
        ).reshape(groups.judged.shape)

    def weights(self, groups: Groups) -> np.ndarray:
        """``[P, G]`` float32, the weight of each sample's distillation."""
        share = self.successes(groups).mean(1, keepdims=True)
        balanced = (
            np.sqrt(share * (1 - share)) if self.balance_groups else share * 0 + 1
        )
        return np.broadcast_to(balanced, groups.judged.shape).astype(np.float32)

    def _is_success(self, verdict: Verdict) -> bool:
        if self.success_threshold is None:
            return bool(verdict.success)
        return verdict.reward is not None and verdict.reward >= self.success_threshold

    def _choose_group(
        self, groups: Groups, p: int, rng: np.random.Generator
    ) -> list[Privileged]:
        verdicts, texts = groups.verdicts[p], groups.completions[p]
        right = [g for g, verdict in enumerate(verdicts) if self._is_success(verdict)]
        chosen = []
        for g, verdict in enumerate(verdicts):
            if self.leave_out_correct and g in right:
                chosen.append(Privileged())
                continue
            siblings = [i for i in right if i != g or not self.exclude_self]
            demonstration = None
            if self.demonstration == "reference":
                demonstration = groups.prompts.demonstrations[p]
            elif siblings and self.demonstration != "none":
                demonstration = texts[self._pick(siblings, groups.lengths[p], rng)]
            if demonstration is not None and self.remove_thinking:
                demonstration = strip_thinking(demonstration)
            demonstration = _if_said(demonstration)
            told = self.feedback == "always" or (
                self.feedback == "without_demonstration" and demonstration is None
            )
            feedback = _if_said(verdict.feedback) if told else None
            chosen.append(Privileged(demonstration, feedback))
        return chosen

    def _pick(self, siblings, lengths, rng) -> int:
        if self.demonstration == "shortest":
            return min(siblings, key=lambda i: lengths[i])
        if self.demonstration == "random":
            return siblings[int(rng.integers(len(siblings)))]
        return siblings[0]


def _if_said(text: str | None) -> str | None:
    """`text`, or None where it is blank: that tells the teacher nothing."""
    return text if text and text.strip() else None
