"""jaxrl_post: post-train language models by reinforcement learning and
self-distillation, in JAX.

Importing this package imports nothing else, not even jax; each name below is fetched
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_post import (
        advantages,
        generation,
        information,
        injection,
        isolation,
        losses,
        models,
        recipes,
        sharding,
        tasks,
        training,
        transforms,
        vocabulary,
    )
    from jaxrl_post.errors import ConfigError, InputError
    from jaxrl_post.generation import Sampler
    from jaxrl_post.models import Policy
    from jaxrl_post.recipes import Batch, Recipe, Term
    from jaxrl_post.reduction import Reduction
    from jaxrl_post.training import TrainState, make_update_step
    from jaxrl_post.training.config import Config, load_config
    from jaxrl_post.types import Judge, Message, Prompts, Verdict

__version__ = "0.1.0"

__all__ = (
    "Batch",
    "Config",
    "ConfigError",
    "InputError",
    "Judge",
    "Message",
    "Policy",
    "Prompts",
    "Recipe",
    "Reduction",
    "Sampler",
    "Term",
    "TrainState",
    "Verdict",
    "__version__",
    "advantages",
    "generation",
    "information",
    "injection",
    "isolation",
    "load_config",
    "losses",
    "make_update_step",
    "models",
    "recipes",
    "sharding",
    "tasks",
    "training",
    "transforms",
    "vocabulary",
)

_HOMES = {
    "Batch": "recipes",
    "Config": "training.config",
    "ConfigError": "errors",
    "InputError": "errors",
    "Judge": "types",
    "Message": "types",
    "Policy": "models",
    "Prompts": "types",
    "Recipe": "recipes",
    "Reduction": "reduction",
    "Sampler": "generation",
    "Term": "recipes",
    "TrainState": "training",
    "Verdict": "types",
    "load_config": "training.config",
    "make_update_step": "training",
}


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    elif name in __all__:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
