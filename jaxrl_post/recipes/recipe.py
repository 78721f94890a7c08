"""What an algorithm is here: terms, group transforms, a teacher, a modulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import jax
import optax

from jaxrl_post.errors import nearest
from jaxrl_post.information import AdaptiveSensitivity
from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.recipes.prefix import PrefixSchedule
from jaxrl_post.recipes.reprompt import Reprompt
from jaxrl_post.tasks.reprompt import Templates
from jaxrl_post.transforms import scale_by_information
from jaxrl_post.vocabulary import Logits

Scores = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Views:
    """One chunk of tokens as the models of a recipe see it.

    Attributes:
      student: logits of the policy that is trained.
      teacher: of the self-teacher behind its own context; None unless `Recipe.needs`.
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
      over: ``over(batch)``, the ``[B, T]`` tokens that the mean is taken over, where
        those of `mask` are only a part of them: terms that share a batch's tokens out
        among them share its denominator too. None: those of `mask`.
      reduction: mode of `losses.reduce`.
      denominator: ``denominator(batch)``, what reduction "constant" divides by.
      metrics: ``metrics(scores, batch)``: further ``[B, T]`` arrays by name, logged
        as means over the term's tokens.
      tokenwise: whether a token's loss depends on its own scores and its own entries of
        the batch alone, among `Batch.extras` on those of shape ``[B]`` and ``[B, T]``.
        Where that holds for all terms the trainer forms gradients as it computes logits
        (`vocabulary.sum_logits`), which spares it a part of the work.
      off_policy: whether the term may see what an earlier policy sampled: because it
        weights tokens by importance against `Batch.sampler_logps`, or because it is a
        penalty or an imitation, which take tokens as they are. Asked of all terms by
        `training.steps_off_policy`.
    """

    name: str
    scores: Callable[[Views], Scores]
    loss: Callable[[Scores, Batch], jax.Array]
    weight: float = 1.0
    needs: frozenset[str] = frozenset()
    mask: Callable[[Batch], jax.Array] | None = None
    over: Callable[[Batch], jax.Array] | None = None
    reduction: str = "token_mean"
    denominator: Callable[[Batch], jax.Array] | None = None
    metrics: Callable[[Scores, Batch], Scores] | None = None
    tokenwise: bool = False
    off_policy: bool = False

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
      adapt: of `transforms.scale_by_information`; from a config, a mapping.
      weights: "sequence" or "token": the losses of the terms that read the teacher are
        multiplied by ``rho / mean(rho)``, each with the multiplier that its own gain
        would give under `sensitivity`; see `information.local_multipliers`. The mean
        is the one that the terms' reductions take, so that the weights' mean is 1.
        "none": they are not.
      scores: names of the student's and the teacher's entropy among the scores. These
        two are over the whole vocabulary and always there; others a term computes.
    """

    sensitivity: float = 1.0
    max_multiplier: float = 2.0
    min_multiplier: float = 0.0
    average: str = "sequence"
    smoothing: float | None = None
    delay: int = 0
    scale_decay: bool = True
    mask: Callable[[Batch], jax.Array] | None = None
    adapt: AdaptiveSensitivity | None = None
    weights: Literal["none", "sequence", "token"] = "none"
    scores: tuple[str, str] = ("entropy", "teacher_entropy")

    def __post_init__(self) -> None:
        if isinstance(self.adapt, Mapping):
            known = [f.name for f in fields(AdaptiveSensitivity)]
            if unknown := [key for key in self.adapt if key not in known]:
                problems = "; ".join(f"adapt.{k}: {nearest(k, known)}" for k in unknown)
                raise ValueError(f"adapt has no such key: {problems}")
            object.__setattr__(self, "adapt", AdaptiveSensitivity(**self.adapt))
        if not isinstance(self.adapt, AdaptiveSensitivity | None):
            keys = ", ".join(f.name for f in fields(AdaptiveSensitivity))
            raise ValueError(f"adapt is {self.adapt!r}; it is a mapping of {keys}.")
        if self.weights not in ("none", "sequence", "token"):
            raise ValueError(
                f"weights is {self.weights!r}; it is one of none, sequence, token."
            )
        self.transform()  # refuses numbers outside their range

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optax transformation that multiplies the finished update."""
        return scale_by_information(
            self.sensitivity,
            max_multiplier=self.max_multiplier,
            min_multiplier=self.min_multiplier,
            smoothing=self.smoothing,
            delay=self.delay,
            adapt=self.adapt,
        )

    def __str__(self) -> str:
        alpha = "alpha" if self.adapt else f"{self.sensitivity:g}"
        text = f"times min(exp({alpha} I), {self.max_multiplier:g})"
        if self.adapt:
            text += (
                f", alpha from {self.sensitivity:g} until "
                f"P(rho <= {self.adapt.target:g}) = {self.adapt.quantile:g}"
            )
        if self.weights != "none":
            text += f"; losses weighted by {self.weights}"
        return text


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
      teacher: the self-teacher, if a term or `information` needs it.
      reprompt: what the teacher sees; None where batches come with teacher contexts.
      information: how steps are modulated; None for not at all. It reads the teacher:
        where no term does, the teacher's forward pass is its own cost.
      mask_truncated: leave out sequences that hit the length limit.
      log_entropy: log the policy's entropy (one more number per token).
      max_sampling_rounds: how often the trainer may draw prompts for one step, when
        transforms drop groups. Groups still missing then are filler, which the metric
        ``sampling/kept_groups`` shows. 0: no limit.
      demonstrations: tokenise and judge the prompts' demonstrations, for
        `Groups.demonstrations`.
      min_group_size: rollouts that a group needs for its advantages not to vanish.
      rollouts: sample completions. Without them a group is its prompt's demonstration
        alone (SFT).
      prefix: how much of each demonstration is given; the policy writes the rest.
        None: all of it.
      posterior_discount: how much of what earlier visits of a prompt showed of its
        success rate still counts at the next: `Groups.posterior`, kept from step to
        step and in checkpoints. None: nothing is remembered.
      learns: False: completions are sampled and judged, and that is all; there are then
        no terms.
      history: wording in which prompts are shown with the feedback on what was sampled
        for them in earlier steps; None: prompts are the task's.
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
    min_group_size: int = 1
    demonstrations: bool = False
    rollouts: bool = True
    prefix: PrefixSchedule | None = None
    posterior_discount: float | None = None
    learns: bool = True
    history: Templates | None = None

    def __post_init__(self) -> None:
        if self.learns != bool(self.terms):
            what = "has no terms" if self.learns else "learns nothing, but has terms"
            raise ValueError(f"Recipe {self.name!r} {what}.")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Recipe {self.name!r} has two terms of one name: {names}."
            )
        if "teacher" in self.needs and self.teacher.kind == "none":
            raise ValueError(
                f"Recipe {self.name!r} needs a teacher, for a term or its information, "
                "but its teacher is 'none'; give it Teacher('live'), 'frozen' or 'ema'."
            )
        discount = self.posterior_discount
        if discount is not None and not 0 <= discount <= 1:
            raise ValueError(f"posterior_discount is {discount}; it lies in [0, 1].")
        if self.weights_losses and not any(map(self.is_weighted, self.terms)):
            raise ValueError(
                f"Recipe {self.name!r} has information weights for the losses of terms "
                "that read the teacher, but no term does; use weights='none'."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Views beside the student's that some term, or the modulation, reads."""
        own = frozenset() if self.information is None else frozenset({"teacher"})
        return own.union(*(term.needs for term in self.terms))

    @property
    def entropies(self) -> frozenset[str]:
        """Scores that are computed although no term asks for them."""
        logged = {"entropy"} if self.log_entropy else set()
        read = () if self.information is None else self.information.scores
        return frozenset(logged.union(read))

    @property
    def weights_losses(self) -> bool:
        """Whether the information weights losses, beside the steps."""
        return self.information is not None and self.information.weights != "none"

    @property
    def tokenwise(self) -> bool:
        """Whether the loss is one sum of what each token adds by itself."""
        if not all(term.tokenwise for term in self.terms):
            return False
        if not self.weights_losses:
            return True
        # Terms that are weighted and terms that are not are two sums; the weight of a
        # sequence is made of all its tokens.
        assert self.information is not None
        by_token = self.information.weights == "token"
        return by_token and all(map(self.is_weighted, self.terms))

    def is_weighted(self, term: Term) -> bool:
        """Whether it weights the loss of this term, which then reads the teacher."""
        return self.weights_losses and "teacher" in term.needs

    def __str__(self) -> str:
        lines = [f"{self.name}"]
        for term in self.terms:
            needs = f", reads {', '.join(sorted(term.needs))}" if term.needs else ""
            lines.append(f"  {term.weight:g} x {term.name} ({term.reduction}{needs})")
        if self.teacher.kind != "none":
            lines.append(f"  teacher: {self.teacher}")
        if self.information is not None:
            lines.append(f"  steps: {self.information}")
        if not self.rollouts:
            lines.append("  groups: the demonstration alone, nothing is sampled")
        if not self.learns:
            lines.append("  nothing is learned")
        if self.history is not None:
            lines.append("  prompts: with the feedback on earlier attempts")
        for transform in self.group_transforms:
            lines.append(f"  groups: {transform}")
        if self.prefix is not None:
            lines.append(f"  demonstrations: {self.prefix}, continued by the policy")
        if self.posterior_discount is not None:
            lines.append(f"  posteriors: kept, discount {self.posterior_discount:g}")
        return "\n".join(lines)


def weighted(*terms: Term) -> tuple[Term, ...]:
    """The terms whose weight is not zero; the others would cost and add nothing."""
    return tuple(term for term in terms if term.weight)
