"""What is put on top of any recipe: PGPO's step size, HAPO's gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxrl_post.recipes.injection import Injection
from jaxrl_post.recipes.recipe import GroupTransform, Information, Recipe, Teacher
from jaxrl_post.recipes.reprompt import Reprompt
from jaxrl_post.recipes.sdpo import distilled_tokens


def with_information(
    recipe: Recipe,
    *,
    teacher: Teacher | Mapping[str, Any] | None = None,
    reprompt: Reprompt | Mapping[str, Any] | None = None,
    **information: Any,
) -> Recipe:
    """Any recipe with PGPO's step size: updates times ``min(exp(alpha I), rho_max)``.

    I needs a teacher that is shown a solution. Where the recipe distils from one, that
    one is measured; where it does not, the teacher's forward pass is a cost of its own.

    Args:
      recipe: to modulate.
      teacher: a `Teacher`, or its fields; None: the recipe's own, else the default of
        SDPO, a moving average at rate 0.05.
      reprompt: a `Reprompt`, or its fields; None: the recipe's own, else the default.
      **information: of `Information`.

    Source: arXiv 2606.03620, whose section 4 leaves other base algorithms open.

    >>> from jaxrl_post.recipes import grpo
    >>> print(with_information(grpo(), sensitivity=0.5))
    grpo
      1 x policy_gradient (token_mean)
      teacher: ema, rate 0.05
      steps: times min(exp(0.5 I), 2)
    """
    if isinstance(teacher, Mapping):
        teacher = Teacher(**teacher)
    if isinstance(reprompt, Mapping):
        reprompt = Reprompt(**reprompt)
    if teacher is None:
        own = recipe.teacher
        teacher = Teacher("ema", 0.05) if own.kind == "none" else own
    return replace(
        recipe,
        teacher=teacher,
        reprompt=reprompt or recipe.reprompt or Reprompt(),
        information=Information(**{"mask": distilled_tokens, **information}),
    )


def with_injection(
    recipe: Recipe, injection: Injection | Mapping[str, Any] | None = None
) -> Recipe:
    """Any recipe behind HAPO's gate: demonstrations in the place of failed rollouts.

    The recipe's terms find them in `Batch.is_teacher`. SDPO's leave their tokens out,
    and distil the failed siblings towards them; GRPO's would take them for the policy's
    own, which they are not: `hapo` is GRPO with a term for them. A recipe that has an
    `Injection` gets this one in its place: `luffy` behind a gate.

    Args:
      recipe: to put behind the gate.
      injection: an `Injection`, or its fields; None for the default one, the paper's.

    Raises:
      ValueError: the recipe samples nothing that could give way.

    >>> from jaxrl_post.recipes import sdpo
    >>> print(with_injection(sdpo(), {"threshold": 0.5}))
    sdpo
      1 x distillation (sequence_mean_over_all, reads teacher)
      teacher: ema, rate 0.05
      groups: the demonstration in place of the worst rollout, where c < 0.5
    """
    if not isinstance(injection, Injection):
        injection = Injection(**(injection or {}))
    if not recipe.rollouts:
        raise ValueError(
            f"Recipe {recipe.name!r} samples no rollouts that could give way."
        )
    others = (t for t in recipe.group_transforms if not isinstance(t, Injection))
    transforms: tuple[GroupTransform, ...] = (injection, *others)
    return replace(recipe, group_transforms=transforms, demonstrations=True)
