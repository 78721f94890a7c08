"""Which questions are asked: before others those that are answered now and then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from jaxrl_post.errors import InputError
from jaxrl_post.injection import posterior_mean
from jaxrl_post.recipes.injection import Injection
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.recipes.transforms import CountSuccesses
from jaxrl_post.tasks import Task
from jaxrl_post.training.config import CurriculumConfig
from jaxrl_post.types import Prompts

_COIN = 1 << 32
"""Above every seed of a run: these coins are nobody else's."""


def chances(posterior: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """How likely each question is to be asked when its turn comes.

    ``max(floor, 4 c (1 - c))``, c being the mean of the question's success rate: the
    variance of a reward of 0 or 1 in units of its greatest. A question that was never
    asked has 1.

    Args:
      posterior: ``[P, 2]``, a and b of the Beta distributions of the success rates.
      floor: of solved and of hopeless questions.

    >>> chances(np.array([[1.0, 1.0], [9.0, 1.0], [1.0, 99.0]]), floor=0.1).round(2)
    array([1.  , 0.36, 0.1 ])
    """
    mean = posterior_mean(posterior)
    return np.maximum(floor, 4 * mean * (1 - mean))


def draw(
    task: Task,
    rows: Mapping[str, int],
    posterior: NDArray[np.float64],
    *,
    floor: float,
    seed: int,
    cursor: int,
    count: int,
) -> tuple[Prompts, int]:
    """The next questions of the task's own order, without those passed over.

    Whether the one at a place of the order is, only seed, place and posteriors say, so
    that a resumed run asks the same.

    Args:
      task: whose questions.
      rows: of its R questions, by id.
      posterior: ``[R, 2]``.
      floor: as in `chances`.
      seed: of the run.
      cursor: places of the order that are behind.
      count: of questions wanted.

    Returns:
      The questions, and the cursor behind the last place that was looked at.
    """
    chosen: list[int] = []
    while missing := count - len(chosen):
        turn = [rows[name] for name in task.prompts(seed, cursor, missing).ids]
        for place, (row, chance) in enumerate(
            zip(turn, chances(posterior[turn], floor), strict=True), start=cursor
        ):
            coin = np.random.SeedSequence((seed, _COIN, place))
            if coin.generate_state(1, np.uint64)[0] / 2**64 < chance:
                chosen.append(row)
        cursor += missing
    return task.rows(chosen), cursor


def remembering(recipe: Recipe, curriculum: CurriculumConfig | None) -> Recipe:
    """The recipe with the memory of successes that a curriculum goes by.

    Raises:
      InputError: it samples nothing, or its gate would share that memory unasked.
    """
    if curriculum is None or recipe.posterior_discount is not None:
        return recipe
    if not recipe.rollouts:
        raise InputError(
            f"task.curriculum: recipe {recipe.name!r} samples nothing whose success "
            "could be counted; leave it out."
        )
    if any(isinstance(t, Injection) for t in recipe.group_transforms):
        raise InputError(
            f"task.curriculum: the gate of recipe {recipe.name!r} would remember "
            "earlier visits too; say so by recipe.posterior_discount="
            f"{curriculum.discount:g}, or leave the curriculum out."
        )
    return replace(
        recipe,
        posterior_discount=curriculum.discount,
        group_transforms=(CountSuccesses(), *recipe.group_transforms),
    )
