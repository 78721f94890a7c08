"""What is asked and how it is judged.

`load` opens a task by name; `RowsTask` makes one of a list of rows. Importing this
package imports no data library and never jax: judge processes import it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_post.errors import InputError, nearest, shown
from jaxrl_post.tasks.base import Row, RowsTask, Task, nobody, select
from jaxrl_post.tasks.lookup import check_types, resolve
from jaxrl_post.tasks.rewards import RewardFunctionJudge, from_reward_function
from jaxrl_post.tasks.streams import StreamTask

__all__ = [
    "BUILT_IN",
    "Row",
    "RowsTask",
    "StreamTask",
    "Task",
    "from_reward_function",
    "load",
    "options_of",
    "select",
]

BUILT_IN = (
    "code",
    "gsm8k",
    "math",
    "reasoning_gym",
    "rows",
    "science",
    "sciknoweval",
    "tooluse",
)
"""Names that `load` knows: modules of this package, each with a function ``load``."""


def load(
    name: str, *, split: str = "train", reward: Any = None, **options: Any
) -> Task:
    """Opens a task.

    Args:
      name: one of `BUILT_IN`, or ``my_module:my_function`` for a task of your own; the
        function is called with ``split`` and the options and returns a `Task`.
      split: ``"train"``, ``"test"`` and what else the task offers.
      reward: a reward function with TRL's signature, or its name ``module:function``,
        or several of them, or a mapping with the arguments of `from_reward_function`.
        It takes the place of the task's own judge.
      **options: the task's own; each built-in module documents them at its ``load``.

    Raises:
      InputError: unknown name, unknown option, or a value that the task refuses.
    """
    _check_options(name, options)
    loader = _loader(name)
    check_types(loader, options, f"task {name!r}")
    task = loader(split=split, **options)
    if not isinstance(task, Task):
        raise InputError(f"{name!r} returned {shown(task)}, which is no Task.")
    if isinstance(reward, Mapping):
        check_types(from_reward_function, reward, "reward")
        task.judge = from_reward_function(**reward)
    elif isinstance(reward, int | float):
        raise InputError(f"reward={reward!r}: expected 'module:function', or a list.")
    elif reward is not None:
        task.judge = from_reward_function(reward)
    elif task.judge is nobody:
        nobody(task.rows([]), [])  # better now than in the middle of a run
    if reward is not None and isinstance(task.judge, RewardFunctionJudge):
        task.judge.check(task.prompts(seed=0, cursor=0, count=100))
    return task


def options_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The options that a task takes besides ``split`` and ``reward``.

    Args:
      name: as in `load`. A built-in task's module is imported for it, no data.

    Returns:
      Their names, and the names of those that must be given; None where the task takes
      any.

    Raises:
      InputError: unknown name.

    >>> options_of("reasoning_gym")[1]
    ('dataset',)
    """
    parameters = inspect.signature(_loader(name)).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    named = [p for p in named if p.name != "split"]
    needed = tuple(p.name for p in named if p.default is p.empty)
    return tuple(p.name for p in named), needed


def _loader(name: str) -> Callable[..., Task]:
    if ":" in name:
        return resolve(name)
    if name not in BUILT_IN:
        raise InputError(
            f"Unknown task {name!r}; {nearest(name, BUILT_IN)} "
            "(A task of your own is named 'module:function'.)"
        )
    return importlib.import_module(f"{__name__}.{name}").load


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    if (known := options_of(name)) is None:
        return
    accepted, needed = known
    for option in options:
        if option not in accepted:
            raise InputError(
                f"Task {name!r} has no option {option!r}; " + nearest(option, accepted)
            )
    for option in needed:
        if option not in options:
            raise InputError(f"Task {name!r} needs the option {option!r}.")
