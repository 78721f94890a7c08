"""Reward functions written for TRL, used unchanged."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxrl_post.errors import InputError, nearest, shown
from jaxrl_post.tasks.lookup import resolve
from jaxrl_post.types import Completion, Message, Prompts, Verdict

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, **columns) -> list[float | None]``, or an async one."""


class _NoSuchState(InputError, AttributeError):
    pass


@dataclass(frozen=True)
class TrainerState:
    """How far training is: what reward functions find in TRL's ``trainer_state``.

    Attributes:
      global_step: steps (rollout batches) that are done.
      max_steps: those of the run, up to the end of the stage.
    """

    global_step: int
    max_steps: int

    def __getattr__(self, name: str) -> Any:
        # Of the many that transformers' has, which a function may not miss in silence.
        raise _NoSuchState(
            f"trainer_state.{name}: here it has global_step and max_steps alone."
        )


def from_reward_function(
    functions: str | RewardFunction | Sequence[str | RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    success_threshold: float = 1.0,
    conversational: bool = False,
) -> RewardFunctionJudge:
    """A judge made of one or several functions with TRL's signature.

    Args:
      functions: functions, or their names ``module:function``. They are called by
        keyword with ``prompts``, ``completions`` and every column of the rows as a list
        of the same length (None where a row lacks the column), in training with
        ``completion_ids`` and ``trainer_state`` too; what a function without
        ``**kwargs`` doesn't name is left out. To run in the judge pool they must be
        importable: no lambdas and closures.
      weights: one per function, 1 each by default.
      success_threshold: a completion whose weighted sum reaches it has succeeded.
      conversational: what TRL passes for its two kinds of data sets. False: prompts are
        texts (the contents of all messages, a blank line between them) and completions
        are texts. True: prompts are lists of messages, and a completion is a list with
        one assistant message.
    """
    if isinstance(functions, str) or callable(functions):
        functions = [functions]
    found = tuple(resolve(f) if isinstance(f, str) else f for f in functions)
    if weights is None:
        weights = [1.0] * len(found)
    if not found or len(weights) != len(found):
        raise InputError(
            f"Got {len(found)} reward functions and {len(weights)} weights."
        )
    return RewardFunctionJudge(
        found, tuple(map(float, weights)), success_threshold, conversational
    )


@dataclass(frozen=True)
class RewardFunctionJudge:
    """Reward: the weighted sum of what the functions return; make it with
    `from_reward_function`.

    Functions may also take TRL's ``log_extra(column, values)`` and ``log_metric(name,
    value)``: the first is kept with the completions, the second logged as
    ``reward/<name>``. ``completion_ids``, a list of token ids for each completion, are
    there where all of these are a `types.Completion`; ``trainer_state`` where the judge
    was told it. Async functions wait at the same time.

    A function's None takes no part in the sum, and where all return None so does the
    judge (TRL makes 0 of it). A NaN is an error. ``extra`` holds each function's own
    value as ``reward/<function's name>``.

    >>> def length(completions, **kwargs):
    ...     return [float(len(text)) for text in completions]
    >>> def unsure(completions, answer):
    ...     return [None for _ in answer]
    >>> judge = from_reward_function([length, unsure], weights=[0.5, 1.0])
    >>> prompts = Prompts(("q",), ((),), ({"answer": "4"},), (None,))
    >>> judge(prompts, ["four"])[0].reward
    2.0
    """

    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    success_threshold: float
    conversational: bool
    trainer_state: TrainerState | None = None

    def takes(self, argument: str) -> bool:
        """Whether one of the functions takes an argument, by name or by ``**``."""
        parameters = [
            p for f in self.functions for p in inspect.signature(f).parameters.values()
        ]
        return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)

    def at(self, state: TrainerState) -> RewardFunctionJudge:
        """The same judge at another time, where a function wants to know."""
        return replace(self, trainer_state=state) if self.takes(_STATE) else self

    @property
    def name(self) -> str:
        """The functions' names, for logs."""
        return " + ".join(map(_name, self.functions))

    def check(self, prompts: Prompts) -> None:
        """Holds the functions' parameters against the columns of some rows.

        Raises:
          InputError: a function wants a column that there is not.
        """
        given = {*self._arguments(prompts, []), *_LOGGING, _IDS, _STATE}
        for function in self.functions:
            for p in inspect.signature(function).parameters.values():
                needed = p.default is p.empty and p.kind is not p.VAR_KEYWORD
                if needed and p.kind is not p.VAR_POSITIONAL and p.name not in given:
                    raise InputError(
                        f"The reward function {_name(function)} wants {p.name!r}, and "
                        f"the rows have no such column; {nearest(p.name, given)}"
                    )

    def rehearse(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        """Calls the functions on two answers to the first prompt, as a judge would be.

        Only what no answer excuses counts; that a function raises at one may be the
        answer's fault.

        Returns:
          One verdict, whose ``extra["wrong"]`` says what a function returned in the
          place of a list of one reward for each answer; None where all is well.
        """
        wrong = None
        try:
            self(prompts.take([0, 0]), [Completion("", []), Completion("0", [0])])
        except InputError as error:
            wrong = str(error)
        except Exception:
            pass
        return [Verdict(None, extra={"wrong": wrong})]

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        count = len(completions)
        logged: dict[str, list[Any]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != count:
                raise ValueError(
                    f"log_extra({column!r}) got {len(values)} values for {count} "
                    "completions."
                )
            logged[column] = list(values)

        def log_metric(name: str, value: float) -> None:
            logged[f"reward/{name}"] = [float(value)] * count

        arguments = self._arguments(prompts, completions)
        arguments |= {"log_extra": log_extra, "log_metric": log_metric}
        values = [
            _checked(function, returned, count)
            for function, returned in zip(
                self.functions, _call_all(self.functions, arguments), strict=True
            )
        ]
        names = [_name(function) for function in self.functions]
        verdicts = []
        for i, row in enumerate(zip(*values, strict=True)):
            judged = [
                w * v for w, v in zip(self.weights, row, strict=True) if v is not None
            ]
            reward = sum(judged) if judged else None
            success = None if reward is None else reward >= self.success_threshold
            extra = {column: told[i] for column, told in logged.items()}
            extra |= {
                f"reward/{name}": value for name, value in zip(names, row, strict=True)
            }
            verdicts.append(Verdict(reward, success, extra=extra))
        return verdicts

    def _arguments(
        self, prompts: Prompts, completions: Sequence[str]
    ) -> dict[str, Any]:
        keys = dict.fromkeys(key for row in prompts.columns for key in row)
        arguments: dict[str, Any] = {
            key: [row.get(key) for row in prompts.columns] for key in keys
        }
        if self.conversational:
            arguments["prompts"] = [list(turns) for turns in prompts.messages]
            arguments["completions"] = [
                [{"role": "assistant", "content": text}] for text in completions
            ]
        else:
            arguments["prompts"] = [_text(turns) for turns in prompts.messages]
            arguments["completions"] = list(completions)
        ids = [text.ids for text in completions if isinstance(text, Completion)]
        if len(ids) == len(completions):
            arguments[_IDS] = ids
        if self.trainer_state is not None:
            arguments[_STATE] = self.trainer_state
        return arguments


_LOGGING = ("log_extra", "log_metric")
_IDS, _STATE = "completion_ids", "trainer_state"


def _call_all(
    functions: Sequence[RewardFunction], arguments: Mapping[str, Any]
) -> list[Any]:
    """What the functions return; those that are async wait at the same time."""
    returned = [_call(function, arguments) for function in functions]
    waiting = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]

    async def wait() -> list[Any]:
        return await asyncio.gather(*(returned[i] for i in waiting))

    for i, value in zip(waiting, asyncio.run(wait()) if waiting else (), strict=True):
        returned[i] = value
    return returned


def _call(function: RewardFunction, arguments: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = {p.name for p in parameters}
        arguments = {k: v for k, v in arguments.items() if k in accepted}
    return function(**arguments)


def _checked(function: RewardFunction, values: Any, count: int) -> list[float | None]:
    name = _name(function)
    if values is None or not hasattr(values, "__len__"):
        raise InputError(
            f"The reward function {name} returned {shown(values)}, no list of rewards."
        )
    if len(values) != count:
        raise InputError(
            f"The reward function {name} returned {len(values)} rewards for {count} "
            "completions; it must return one for each, None where there is none."
        )
    return [None if value is None else _reward(value, name) for value in values]


def _reward(value: Any, name: str) -> float:
    try:
        reward = float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise ValueError(
            f"{name} returned {shown(value)} as a reward; it must be a finite number, "
            "or None where there is none."
        )
    return reward


def _text(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
