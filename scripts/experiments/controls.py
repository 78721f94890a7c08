"""Recipes that take PGPO's explanation apart, for `recipe.name` in a config; a teacher.

``recipe.name=scripts.experiments.controls:replayed`` is PGPO whose multipliers are
given beforehand; ``...:misled`` shows some samples a wrong sibling's answer;
``...:braked`` takes shorter steps as the teacher's entropy rises; ``...:by_sequence``
gives all tokens of a sequence the same credit. ``...:verbose`` is a task: the science
task, whose worked solutions are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import recipes
from jaxrl_post.recipes.recipe import Information, Recipe
from jaxrl_post.recipes.reprompt import Privileged, Reprompt
from jaxrl_post.reduction import Reduction
from jaxrl_post.tasks import Row, RowsTask, science
from jaxrl_post.transforms import ScaleByInformationState, scale_by_information

_NO_CAP = 1e9


@dataclass(frozen=True)
class Replayed(Information):
    """An information gain that is measured, and multipliers that ignore it.

    They are kept in the state, so that other ones are the same program.

    Attributes:
      multipliers: of the updates in order, all positive; the last one stays.
    """

    multipliers: tuple[float, ...] = (1.0,)

    def transform(self) -> optax.GradientTransformationExtraArgs:
        inner = scale_by_information(1.0, max_multiplier=_NO_CAP)

        def init(params):
            return inner.init(params), jnp.log(jnp.asarray(self.multipliers))

        def update(updates, state, params=None, *, information=None, **extra):
            del information
            scale, gains = state
            gain = gains[jnp.minimum(scale.finite, len(gains) - 1)]
            updates, scale = inner.update(
                updates, scale, params, information=gain, **extra
            )
            return updates, (scale, gains)

        return optax.GradientTransformationExtraArgs(init, update)

    def __str__(self) -> str:
        return f"times {len(self.multipliers)} given multipliers"


class BrakeState(NamedTuple):
    """State of a `Braked` transformation.

    Attributes:
      seen: [] int32, updates so far.
      reference: [] mean teacher entropy (nats) of the first of them.
      scale: that of the multiplier.
    """

    seen: jax.Array
    reference: jax.Array
    scale: ScaleByInformationState


@dataclass(frozen=True)
class Braked(Information):
    """Steps times ``min(1, reference / H)``, H the teacher's entropy; not in a paper.

    A prototype saw it rise 20 to 40 steps before a collapse, the gain still positive.

    Attributes:
      window: updates whose mean entropy is the reference; they are not braked.
    """

    window: int = 5
    scores: tuple[str, str] = ("nothing", "teacher_entropy")

    def transform(self) -> optax.GradientTransformationExtraArgs:
        inner = scale_by_information(1.0, max_multiplier=1.0)

        def init(params):
            zero = jnp.zeros(())
            return BrakeState(jnp.zeros((), jnp.int32), zero, inner.init(params))

        def update(updates, state, params=None, *, information, **extra):
            if isinstance(information, Reduction):
                information = information.mean()
            entropy = -information  # the gain of nothing over the teacher
            seen, early = state.seen, state.seen < self.window
            mean = (state.reference * seen + entropy) / (seen + 1)
            reference = jnp.where(early, mean, state.reference)
            gain = jnp.where(early, 0.0, jnp.log(reference / entropy))
            updates, scale = inner.update(
                updates, state.scale, params, information=gain, **extra
            )
            return updates, BrakeState(seen + 1, reference, scale)

        return optax.GradientTransformationExtraArgs(init, update)

    def __str__(self) -> str:
        return f"times min(1, teacher entropy of the first {self.window} / now)"


@dataclass(frozen=True)
class Misleading(Reprompt):
    """Some samples are shown a wrong sibling's answer as the solution.

    Attributes:
      share: of the samples that are shown any sibling's.
    """

    share: float = 0.0

    def _choose_group(self, groups, p, rng: np.random.Generator) -> list[Privileged]:
        chosen = super()._choose_group(groups, p, rng)
        wrong = [
            text
            for text, verdict in zip(
                groups.completions[p], groups.verdicts[p], strict=True
            )
            if not self._is_success(verdict) and text.strip()
        ]
        for g, shown in enumerate(chosen):
            # Both are drawn in any case: the share does not shift what others draw.
            hit, which = rng.random() < self.share, rng.random()
            if hit and wrong and shown.demonstration is not None:
                text = wrong[int(which * len(wrong))]
                chosen[g] = shown._replace(demonstration=text)
        return chosen


def misled(*, share: float, of: str = "sdpo", **arguments: Any) -> Recipe:
    """SDPO or PGPO whose teacher is shown a wrong answer for a share of the samples."""
    recipe = recipes.make(of, **arguments)
    assert recipe.reprompt is not None
    reprompt = Misleading(**vars(recipe.reprompt), share=share)
    return replace(recipe, reprompt=reprompt)


def replayed(
    *, multipliers: Sequence[float], share: float = 0.0, **arguments: Any
) -> Recipe:
    """PGPO with these multipliers in the place of its own."""
    recipe = misled(share=share, of="pgpo", **arguments)
    assert recipe.information is not None
    information = Replayed(mask=recipe.information.mask, multipliers=tuple(multipliers))
    return replace(recipe, name="replayed", information=information)


def braked(*, window: int = 5, share: float = 0.0, **arguments: Any) -> Recipe:
    """SDPO whose steps become shorter as its teacher becomes less sure."""
    recipe = misled(share=share, of="pgpo", **arguments)
    assert recipe.information is not None
    (term,) = recipe.terms

    def scores(views):
        found = term.scores(views)
        return {**found, "nothing": jnp.zeros_like(found["logps"])}

    return replace(
        recipe,
        name="braked",
        terms=(replace(term, scores=scores),),
        information=Braked(mask=recipe.information.mask, window=window),
    )


def by_sequence(**arguments: Any) -> Recipe:
    """SDPO on the sampled tokens, which get the mean credit of their sequence."""
    recipe = recipes.make("sdpo", alpha=1.0, support="sampled", **arguments)
    (term,) = recipe.terms

    def loss(scores, batch):
        gap = jnp.where(batch.loss_mask, scores["logps"] - scores["teacher_logps"], 0)
        count = jnp.maximum(batch.loss_mask.sum(-1, keepdims=True), 1)
        mean = gap.sum(-1, keepdims=True) / count
        return term.loss({**scores, "teacher_logps": scores["logps"] - mean}, batch)

    whole = replace(term, loss=loss, tokenwise=False)
    return replace(recipe, name="by_sequence", terms=(whole,))


def verbose(split: str = "train", **options: Any) -> RowsTask:
    """The science task with a teacher who writes all working twice.

    Args: as of `tasks.science.load`.
    """
    task = science.load(split, **options)
    found = task.rows(range(len(task)))
    fields = (found.ids, found.messages, found.columns, found.demonstrations)
    rows = [_twice(Row(*row)) for row in zip(*fields, strict=True)]
    return RowsTask("verbose", rows, task.judge)


def _twice(row: Row) -> Row:
    assert row.demonstration is not None
    working, mark, answer = row.demonstration.rpartition("answer ")
    return replace(row, demonstration=f"{working}{working}{mark}{answer}")
