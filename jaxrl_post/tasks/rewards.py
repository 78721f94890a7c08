"""Reward functions written for TRL, used unchanged."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_post.errors import InputError, shown
from jaxrl_post.tasks.lookup import resolve
from jaxrl_post.types import Message, Prompts, Verdict

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, **columns) -> list[float | None]``, or an async one."""


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
        of the same length (None where a row lacks the column); what a function without
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

    @property
    def name(self) -> str:
        """The functions' names, for logs."""
        return " + ".join(map(_name, self.functions))

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        arguments = self._arguments(prompts, completions)
        values = [
            _call(function, arguments, len(completions)) for function in self.functions
        ]
        names = [_name(function) for function in self.functions]
        verdicts = []
        for row in zip(*values, strict=True):
            judged = [
                w * v for w, v in zip(self.weights, row, strict=True) if v is not None
            ]
            reward = sum(judged) if judged else None
            success = None if reward is None else reward >= self.success_threshold
            extra = {
                f"reward/{name}": value for name, value in zip(names, row, strict=True)
            }
            verdicts.append(Verdict(reward, success, extra=extra))
        return verdicts

    def _arguments(
        self, prompts: Prompts, completions: Sequence[str]
    ) -> dict[str, list[Any]]:
        keys = dict.fromkeys(key for row in prompts.columns for key in row)
        arguments: dict[str, list[Any]] = {
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
        return arguments


def _call(
    function: RewardFunction, arguments: Mapping[str, list[Any]], count: int
) -> list[float | None]:
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = {p.name for p in parameters}
        arguments = {k: v for k, v in arguments.items() if k in accepted}
    values = function(**arguments)
    if inspect.iscoroutine(values):
        values = asyncio.run(values)
    name = _name(function)
    if values is None or not hasattr(values, "__len__"):
        raise ValueError(f"{name} returned {shown(values)}, no list of rewards.")
    if len(values) != count:
        raise ValueError(
            f"{name} returned {len(values)} rewards for {count} completions."
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
