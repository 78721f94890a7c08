"""Algorithms as data: what a group becomes, what is minimised, who teaches."""

from jaxrl_post.recipes.batch import Batch as Batch
from jaxrl_post.recipes.batch import demonstrated_tokens as demonstrated_tokens
from jaxrl_post.recipes.batch import own_tokens as own_tokens
from jaxrl_post.recipes.batch import split_batch as split_batch
from jaxrl_post.recipes.compose import with_information as with_information
from jaxrl_post.recipes.compose import with_injection as with_injection
from jaxrl_post.recipes.groups import Demonstrations as Demonstrations
from jaxrl_post.recipes.groups import Groups as Groups
from jaxrl_post.recipes.grpo import grpo as grpo
from jaxrl_post.recipes.injection import Injection as Injection
from jaxrl_post.recipes.mixed import hapo as hapo
from jaxrl_post.recipes.mixed import luffy as luffy
from jaxrl_post.recipes.mixed import replace_sft as replace_sft
from jaxrl_post.recipes.mixed import sft as sft
from jaxrl_post.recipes.mixed import srft as srft
from jaxrl_post.recipes.prefix import PrefixSchedule as PrefixSchedule
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
from jaxrl_post.recipes.search import best_of_k as best_of_k
from jaxrl_post.recipes.search import multi_turn as multi_turn
from jaxrl_post.recipes.transforms import DynamicSampling as DynamicSampling
from jaxrl_post.recipes.transforms import OverlongPenalty as OverlongPenalty

__all__ = (
    "Batch",
    "Demonstrations",
    "DynamicSampling",
    "Groups",
    "Information",
    "Injection",
    "OverlongPenalty",
    "PrefixSchedule",
    "Privileged",
    "Recipe",
    "Reprompt",
    "Teacher",
    "Term",
    "Views",
    "best_of_k",
    "demonstrated_tokens",
    "grpo",
    "grpo_presets",
    "hapo",
    "luffy",
    "make",
    "multi_turn",
    "own_tokens",
    "pgpo",
    "replace_sft",
    "sdpo",
    "sft",
    "split_batch",
    "srft",
    "with_information",
    "with_injection",
)
