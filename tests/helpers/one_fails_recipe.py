"""GRPO whose groups cannot be transformed in process 1."""

from __future__ import annotations

import dataclasses

import jax

from jaxrl_post import recipes


def fail_in_one(groups):
    """Raises in process 1, where nobody waits for what the others say."""
    if jax.process_index() == 1:
        raise RuntimeError("only here")
    return groups


def make():
    """The recipe."""
    return dataclasses.replace(recipes.make("grpo"), group_transforms=(fail_in_one,))
