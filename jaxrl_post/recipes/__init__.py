"""Algorithms as data: what a group becomes, what is minimised, who teaches."""

from jaxrl_post.recipes.batch import Batch as Batch
from jaxrl_post.recipes.batch import split_batch as split_batch
from jaxrl_post.recipes.groups import Groups as Groups
from jaxrl_post.recipes.grpo import grpo as grpo
from jaxrl_post.recipes.recipe import Information as Information
from jaxrl_post.recipes.recipe import Recipe as Recipe
from jaxrl_post.recipes.recipe import Teacher as Teacher
from jaxrl_post.recipes.recipe import Term as Term
from jaxrl_post.recipes.recipe import Views as Views
from jaxrl_post.recipes.registry import grpo_presets as grpo_presets
from jaxrl_post.recipes.registry import make as make
from jaxrl_post.recipes.reprompt import Privileged as Privileged
from jaxrl_post.recipes.reprompt import Reprompt as Reprompt
from jaxrl_post.recipes.sdpo import pgpo as pgpo
from jaxrl_post.recipes.sdpo import sdpo as sdpo
from jaxrl_post.recipes.transforms import DynamicSampling as DynamicSampling
from jaxrl_post.recipes.transforms import OverlongPenalty as OverlongPenalty

__all__ = (
    "Batch",
    "DynamicSampling",
    "Groups",
    "Information",
    "OverlongPenalty",
    "Privileged",
    "Recipe",
    "Reprompt",
    "Teacher",
    "Term",
    "Views",
    "grpo",
    "grpo_presets",
    "make",
    "pgpo",
    "sdpo",
    "split_batch",
)
