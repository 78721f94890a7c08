"""Running a recipe: state, update step, loop, evaluation, checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_post.training.config import Config, load_config
    from jaxrl_post.training.evaluation import evaluate_run
    from jaxrl_post.training.loop import Interrupted, RunResult, run
    from jaxrl_post.training.state import TrainState, init_state
    from jaxrl_post.training.update import make_score_step, make_update_step

_HOMES = {
    "Config": "config",
    "Interrupted": "loop",
    "RunResult": "loop",
    "TrainState": "state",
    "evaluate_run": "evaluation",
    "init_state": "state",
    "load_config": "config",
    "make_score_step": "update",
    "make_update_step": "update",
    "run": "loop",
}

__all__ = [
    "Config",
    "Interrupted",
    "RunResult",
    "TrainState",
    "evaluate_run",
    "init_state",
    "load_config",
    "make_score_step",
    "make_update_step",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
