"""Recipes by name, for configs; composers call the functions themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.recipes import mixed
from jaxrl_post.recipes.compose import with_information, with_injection
from jaxrl_post.recipes.grpo import PRESETS as GRPO_PRESETS
from jaxrl_post.recipes.grpo import grpo
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.recipes.reprompt import Reprompt
from jaxrl_post.recipes.sdpo import pgpo, sdpo
from jaxrl_post.recipes.search import best_of_k, multi_turn
from jaxrl_post.reduction import MODES
from jaxrl_post.tasks.lookup import check_types, resolve

_RECIPES: Mapping[str, Callable[..., Recipe]] = {
    "best_of_k": best_of_k,
    "grpo": grpo,
    "hapo": mixed.hapo,
    "luffy": mixed.luffy,
    "multi_turn": multi_turn,
    "pgpo": pgpo,
    "replace_sft": mixed.replace_sft,
    "sdpo": sdpo,
    "sft": mixed.sft,
    "srft": mixed.srft,
}
_PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "grpo": GRPO_PRESETS,
    **mixed.PRESETS,
}
_FORWARDS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "sdpo": (Reprompt,),
    "pgpo": (sdpo, Reprompt),
    **dict.fromkeys(("hapo", "luffy", "srft", "replace_sft"), (grpo,)),
}
"""To whom a recipe hands the arguments on that are not its own."""
_LAYERS: Mapping[str, Callable[..., Recipe]] = {
    "injection": lambda recipe, fields: with_injection(recipe, fields),
    "information": lambda recipe, fields: with_information(recipe, **fields),
}
"""Arguments that any recipe may have: what is put on top of it, in this order."""


def grpo_presets() -> tuple[str, ...]:
    """Names that `preset` may have for "grpo"."""
    return tuple(GRPO_PRESETS)


def make(name: str, **arguments: Any) -> Recipe:
    """The recipe `name` with these arguments.

    Args:
      name: a built-in recipe, or ``my_module:my_recipe``, a function that returns one.
      **arguments: of that function; ``preset``, for built-in recipes, names a set of
        arguments that the others override; ``injection`` and ``information``, each a
        mapping, put HAPO's gate or PGPO's step size on top of any recipe, see
        `with_injection` and `with_information`.

    Raises:
      InputError: unknown name, preset or argument, with the nearest one that exists.

    >>> make("grpo", preset="dr_grpo", max_length=64).terms[0].reduction
    'constant'
    """
    if ":" in name:
        try:
            factory: Callable[..., Recipe] = resolve(name)
        except ValueError as error:
            raise InputError(f"recipe.name: {error}") from error
    elif name in _RECIPES:
        factory = _RECIPES[name]
    else:
        raise InputError(f"recipe.name={name!r}: {nearest(name, _RECIPES)}")
    known = dict(inspect.signature(factory).parameters)
    layers = {k: arguments.pop(k) for k in _LAYERS if k in arguments and k not in known}
    if "preset" in arguments and "preset" not in known:
        preset = arguments.pop("preset")
        choices = _PRESETS.get(name, {})
        if not isinstance(preset, str) or preset not in choices:
            raise InputError(
                f"recipe.preset={preset!r}: {nearest(str(preset), choices)}"
            )
        arguments = {**choices[preset], **arguments}
    takers = (factory, *_FORWARDS.get(name, ()))
    known = {k: p for f in takers for k, p in inspect.signature(f).parameters.items()}
    free = name not in _RECIPES and any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not free and (unknown := [key for key in arguments if key not in known]):
        problems = "; ".join(f"recipe.{k}: {nearest(k, known)}" for k in unknown)
        raise InputError(f"Recipe {name!r} has no such argument: {problems}")
    check_types(factory, arguments, "recipe")
    try:
        recipe = factory(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"recipe {name!r}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise InputError(f"{name!r} returned {type(recipe).__name__}, not a Recipe.")
    for term in recipe.terms:
        if term.reduction not in MODES:
            hint = nearest(str(term.reduction), MODES)
            raise InputError(f"recipe.reduction={term.reduction!r}: {hint}")
    for layer, fields in layers.items():
        if not isinstance(fields, Mapping):
            raise InputError(f"recipe.{layer}={fields!r}: expected a mapping.")
        try:
            recipe = _LAYERS[layer](recipe, fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"recipe.{layer}: {error}") from error
    return recipe
