"""Looking for an answer without learning: what learning at test time is compared to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.tasks.reprompt import DEFAULT, Templates


def best_of_k() -> Recipe:
    """Samples of the base, each by itself.

    >>> print(best_of_k())
    best_of_k
      nothing is learned
    """
    return Recipe("best_of_k", (), learns=False)


def multi_turn(*, templates: Templates | Mapping[str, Any] = DEFAULT) -> Recipe:
    """Each attempt reads the feedback on those before it.

    The question is shown with the feedback alone, not with the attempts; the oldest is
    left out first where all of it is longer than `task.max_prompt_length`. One attempt
    a step (`training.group_size` 1) is the baseline of SDPO, arXiv 2601.20802, section
    5; those of one step do not read of each other.

    Args:
      templates: the wording; from a config, a mapping with some of its fields.

    >>> print(multi_turn())
    multi_turn
      nothing is learned
      prompts: with the feedback on earlier attempts
    """
    if isinstance(templates, Mapping):
        templates = Templates(**templates)
    return Recipe("multi_turn", (), learns=False, history=templates)
