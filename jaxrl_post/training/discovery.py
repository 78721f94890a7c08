"""Looking for the first success on one question within a budget of attempts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jaxrl_post.errors import InputError
from jaxrl_post.tasks.reprompt import Templates
from jaxrl_post.training.completions import completions_file
from jaxrl_post.training.config import Config, RecipeConfig
from jaxrl_post.training.metrics import read_metrics, replace_text
from jaxrl_post.training.stages import make_stages

METHODS = ("sdpo", "best_of_k", "multi_turn")
FILE_NAME = "discovery.jsonl"

Method = Literal["sdpo", "best_of_k", "multi_turn"]


def discovery_config(
    config: Config, method: Method, question: str | int, attempts: int | None = None
) -> Config:
    """The config of a run that looks for one question's first success.

    Args:
      config: its recipe, which learns from feedback, is that of the method "sdpo"; the
        steps, prompts and group size are by default the budget.
      method: "sdpo": the feedback goes into the weights, step by step;
        "best_of_k": nothing is learned; "multi_turn": the feedback goes into the
        context, an attempt a step.
      question: id, or row number from 0.
      attempts: the budget.

    Raises:
      InputError: a recipe that learns nothing from failures, a budget of no whole
        steps, or a config with stages.

    Source: SDPO, arXiv 2601.20802, section 5.
    """
    if config.stages:
        raise InputError("stages: a search has none; leave them out of the config.")
    if config.run.replay is not None:
        raise InputError("run.replay: a search samples; set it to null.")
    training, section, recipe = config.training, config.recipe, None
    groups, size = training.prompts_per_step, training.group_size
    budget = training.steps * groups * size
    budget = budget if attempts is None else attempts
    if budget < 1:
        raise InputError(f"--attempts {budget}: must be at least 1.")
    own = make_stages(config)[0].recipe
    if method == "sdpo":
        recipe = own.reprompt
        if recipe is None or (recipe.feedback == "never" and own.learns):
            raise InputError(
                f"recipe.name={section.name!r}: learns nothing as long as nothing "
                "succeeds; use sdpo or pgpo with recipe.feedback=always."
            )
    else:
        arguments: dict[str, Any] = {}
        if method == "multi_turn":
            groups = size = 1
            if own.reprompt is not None:
                arguments = {"templates": _plain(own.reprompt.templates)}
        section = RecipeConfig(method, arguments)
    if budget % (groups * size):
        raise InputError(
            f"--attempts {budget}: must be a multiple of {groups * size}, the attempts "
            "of a step (training.prompts_per_step x training.group_size)."
        )
    return replace(
        config,
        task=replace(config.task, questions=(question,)),
        recipe=section,
        training=replace(
            training,
            steps=budget // (groups * size),
            prompts_per_step=groups,
            group_size=size,
            updates_per_step=1,
            stop_at_success=True,
        ),
    )


def _plain(templates: Templates) -> dict[str, str]:
    return dict(vars(templates))


def attempts_of(run_dir: Path) -> list[dict[str, Any]]:
    """A run's attempts at its question, in order, up to its last step's.

    Returns:
      A row for each: ``attempt`` from 1, ``step``, ``reward``, ``success``,
      ``feedback``, and ``discovery@k``, whether one of the first k = ``attempt`` was a
      success.
    """
    rows: list[dict[str, Any]] = []
    found = False
    for step in range(1, read_metrics(run_dir)[-1]["step"] + 1):
        for line in completions_file(run_dir, step).read_text("utf-8").splitlines():
            saved = json.loads(line)
            found |= bool(saved["success"])
            kept = {name: saved[name] for name in ("reward", "success", "feedback")}
            number = len(rows) + 1
            rows.append({"attempt": number, "step": step, **kept, "discovery@k": found})
    return rows


def write_discovery(run_dir: Path) -> list[dict[str, Any]]:
    """Writes ``discovery.jsonl`` into a run's folder; its rows are `attempts_of`."""
    rows = attempts_of(run_dir)
    replace_text(run_dir / FILE_NAME, "".join(json.dumps(r) + "\n" for r in rows))
    return rows


def first_success(rows: Sequence[dict[str, Any]]) -> int | None:
    """The number of the first attempt that was a success, from 1; None: there is none.

    >>> first_success(
    ...     [{"attempt": 1, "success": None}, {"attempt": 2, "success": True}]
    ... )
    2
    """
    return next((row["attempt"] for row in rows if row["success"]), None)


def discovery_at_k(
    firsts: Sequence[int | None], budgets: Sequence[int]
) -> dict[int, float]:
    """The share of searches that have found an answer within k attempts.

    Args:
      firsts: of each search, the attempt that was the first success; None: none was,
        in at least ``max(budgets)`` attempts.
      budgets: values of k.

    >>> discovery_at_k([3, None], [1, 4])
    {1: 0.0, 4: 0.5}
    """
    return {
        k: sum(first is not None and first <= k for first in firsts) / len(firsts)
        for k in budgets
    }


def powers_of_two(budget: int) -> list[int]:
    """1, 2, 4, ... up to the budget, which ends the list whatever it is.

    >>> powers_of_two(6)
    [1, 2, 4, 6]
    """
    return sorted({min(1 << i, budget) for i in range(budget.bit_length() + 1)})
