"""What an algorithm is here: terms, group transforms, a teacher, a modulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import optax

from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.recipes.reprompt import Reprompt
from jaxrl_post.transforms import scale_by_information
from jaxrl_post.vocabulary import Logits

Scores = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Views:
    """One chunk of tokens as the models of a recipe see it.

    Attributes:
      student: logits of the policy that is trained.
      teacher: of the self-teacher behind its own context; None unless a term asks.
      reference: of the reference policy behind the student's context; likewise.
      tokens: the sampled token ids.
    """

    student: Logits
    tokens: jax.Array
    teacher: Logits | None = None
    reference: Logits | None = None


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    Attributes:
      name: under which its value is logged, ``loss/<name>`` if there are several.
      scores: ``scores(views)``: what the term needs from the vocabulary, as numbers
        per token, by name. Terms that use one name mean the same number by it.
      loss: ``loss(scores, batch)``: the loss of every token, ``[B, T]``; unmasked.
      weight: factor of the term.
      needs: which views beside the student's it reads: "teacher", "reference".
      mask: ``mask(batch)``, the ``[B, T]`` tokens that count; None for
        `Batch.loss_mask`. It must not depend on the model: denominators are computed
        from it for the whole batch at once.
      reduction: mode of `losses.reduce`.
      denominator: ``denominator(batch)``, what reduction "constant" divides by.
      metrics: ``metrics(scores, batch)``: further ``[B, T]`` arrays by name, logged
        as means over the term's tokens.
    """

    name: str
    scores: Callable[[Views], Scores]
    loss: Callable[[Scores, Batch], jax.Array]
    weight: float = 1.0
    needs: frozenset[str] = frozenset()
    mask: Callable[[Batch], jax.Array] | None = None
    reduction: str = "token_mean"
    denominator: Callable[[Batch], jax.Array] | None = None
    metrics: Callable[[Scores, Batch], Scores] | None = None

    def __post_init__(self) -> None:
        unknown = set(self.needs) - {"teacher", "reference"}
        if unknown:
            raise ValueError(
                f"Term {self.name!r} needs {sorted(unknown)}; a term may need "
                "'teacher' and 'reference'."
            )


@dataclass(frozen=True)
class Teacher:
    """Where the self-teacher's parameters come from.

    Attributes:
      kind: "none"; "live", the student under stop-gradient; "frozen", the parameters
        that training began with; "ema", their moving average, in float32;
        "trust_region", the logits ``(1 - rate) * frozen + rate * live``.
      rate: of the average, ``teacher <- (1 - rate) * teacher + rate * student``, or of
        that mixture.
      every: optimizer updates between two such steps.
    """

    kind: Literal["none", "live", "frozen", "ema", "trust_region"] = "none"
    rate: float = 0.05
    every: int = 1

    def __str__(self) -> str:
        if self.kind not in ("ema", "trust_region"):
            return self.kind
        often = "" if self.every == 1 else f" every {self.every} updates"
        return f"{self.kind}, rate {self.rate:g}{often}"

    @property
    def keeps_parameters(self) -> bool:
        """Whether it has parameters of its own beside the student's."""
        return self.kind in ("ema", "frozen", "trust_region")

    def __post_init__(self) -> None:
        kinds = ("none", "live", "frozen", "ema", "trust_region")
        if self.kind not in kinds:
            raise ValueError(
                f"teacher kind is {self.kind!r}; it is one of {', '.join(kinds)}."
            )
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"teacher rate is {self.rate}; it lies in [0, 1].")
        if self.every < 1:
            raise ValueError(f"teacher every is {self.every}; it is at least 1.")


@dataclass(frozen=True)
class Information:
    """How the optimizer's steps follow the information gain (PGPO, arXiv 2606.03620).

    Attributes:
      sensitivity, max_multiplier, min_multiplier, smoothing, delay: of
        `transforms.scale_by_information`, which ends the optimizer's chain.
      average: of `information.information_gain`.
      scale_decay: whether the decoupled weight decay is multiplied too.
      mask: ``mask(batch)``, the ``[B, T]`` tokens whose entropies are averaged; None
        for `Batch.loss_mask`.
    """

    sensitivity: float = 1.0
    max_multiplier: float = 2.0
    min_multiplier: float = 0.0
    average: str = "sequence"
    smoothing: float | None = None
    delay: int = 0
    scale_decay: bool = True
    mask: Callable[[Batch], jax.Array] | None = None

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optax transformation that multiplies the finished update."""
        return scale_by_information(
            self.sensitivity,
            max_multiplier=self.max_multiplier,
            min_multiplier=self.min_multiplier,
            smoothing=self.smoothing,
            delay=self.delay,
        )

    def __str__(self) -> str:
        return f"times min(exp({self.sensitivity:g} I), {self.max_multiplier:g})"


GroupTransform = Callable[[Groups], Groups]
"""Changes judged groups before they become a batch. May return fewer groups than it
was given (dynamic sampling): the trainer then draws more prompts."""

Advantages = Callable[..., Any]
"""``advantages(rewards, where=judged)``, all ``[P, G]``; see `group_relative`."""


@dataclass(frozen=True)
class Recipe:
    """An algorithm, as data that the trainer composes.

    Attributes:
      name: for logs.
      terms: the summands of the loss; their weighted sum is minimised.
      advantages: rewards to advantages, or None where no term reads them.
      group_transforms: applied in order to the judged groups.
      teacher: the self-teacher, if a term needs "teacher".
      reprompt: what the teacher sees; None where batches come with teacher contexts.
      information: how steps are modulated; None for not at all.
      mask_truncated: leave out sequences that hit the length limit.
      log_entropy: log the policy's entropy (one more number per token).
      max_sampling_rounds: how often the trainer may draw prompts for one step, when
        transforms drop groups. Groups still missing then are filler, which the metric
        ``sampling/kept_groups`` shows. 0: no limit.
    """

    name: str
    terms: tuple[Term, ...]
    advantages: Advantages | None = None
    group_transforms: tuple[GroupTransform, ...] = ()
    teacher: Teacher = field(default_factory=Teacher)
    reprompt: Reprompt | None = None
    information: Information | None = None
    mask_truncated: bool = False
    log_entropy: bool = True
    max_sampling_rounds: int = 10

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"Recipe {self.name!r} has no terms.")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Recipe {self.name!r} has two terms of one name: {names}."
            )
        if "teacher" in self.needs and self.teacher.kind == "none":
            raise ValueError(
                f"Recipe {self.name!r} has a term that needs a teacher, but its "
                "teacher is 'none'; give it Teacher('live'), 'frozen' or 'ema'."
            )

        if self.information is not None and "teacher" not in self.needs:
            raise ValueError(
                f"Recipe {self.name!r} modulates steps by the teacher's information, "
                "but no term needs a teacher."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Views beside the student's that some term reads."""
        return frozenset().union(*(term.needs for term in self.terms))

    @property
    def needs_entropy(self) -> bool:
        """Whether the student's entropy is computed although no term asks for it."""
        return self.log_entropy or self.information is not None

    def __str__(self) -> str:
        lines = [f"{self.name}"]
        for term in self.terms:
            needs = f", reads {', '.join(sorted(term.needs))}" if term.needs else ""
            lines.append(f"  {term.weight:g} x {term.name} ({term.reduction}{needs})")
        if self.teacher.kind != "none":
            lines.append(f"  teacher: {self.teacher}")
        if self.information is not None:
            lines.append(f"  steps: {self.information}")
        for transform in self.group_transforms:
            lines.append(f"  groups: {transform}")
        return "\n".join(lines)


def weighted(*terms: Term) -> tuple[Term, ...]:
    """The terms whose weight is not zero; the others would cost and add nothing."""
    return tuple(term for term in terms if term.weight)
