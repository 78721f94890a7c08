"""Procedural reasoning problems of the `reasoning-gym` package, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.tasks.base import Row, RowsTask
from jaxrl_post.tasks.extraction import final_answer
from jaxrl_post.types import Prompts, Verdict

SPLIT_SEEDS = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}
"""What a split adds to the seed.

Item i of seed s is item 0 of seed s + i: splits with seeds 0 and 1 would share all
items but one.
"""

INSTRUCTION = "End with the answer between <answer> and </answer>."
"""What is asked for below the question."""


def load(
    split: str = "train",
    *,
    dataset: str,
    size: int = 1000,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    partial_credit: bool = False,
    instruction: str = INSTRUCTION,
) -> RowsTask:
    """Makes problems of one of reasoning-gym's generators.

    Problems are made when the task is opened (most take well under a millisecond, a few
    generators a second). Questions that come twice are kept once, so that generators
    with few questions give fewer than `size`. A question that also occurs among the
    first `size` training questions of this seed is left out of the other splits.

    Args:
      split: ``"train"``, ``"validation"`` or ``"test"``.
      dataset: name of the generator, e.g. ``"chain_sum"``.
      size: number of problems to make.
      seed: of the problems.
      config: options of the generator.
      partial_credit: see `ReasoningGymJudge`.
      instruction: stands below every question.
    """
    if split not in SPLIT_SEEDS:
        raise InputError(f"Unknown split {split!r}; {nearest(split, SPLIT_SEEDS)}")
    if not 0 <= seed <= SPLIT_SEEDS["validation"] - size:
        raise InputError(
            f"seed is {seed}; with {size} problems it must be between 0 and "
            f"{SPLIT_SEEDS['validation'] - size}, so that splits share no problem."
        )
    options = json.dumps(dict(config or {}))
    items = _items(dataset, options, size, seed + SPLIT_SEEDS[split])
    if split != "train":
        for question in _items(dataset, options, size, seed):
            items.pop(question, None)
    rows = [
        Row(
            id=f"{dataset}/{split}/{seed}/{i}",
            messages=(
                {"role": "user", "content": f"{question}\n\n{instruction}".strip()},
            ),
            columns=dict(item),
        )
        for i, (question, item) in enumerate(items.items())
    ]
    return RowsTask(dataset, rows, ReasoningGymJudge(dataset, options, partial_credit))


@dataclass(frozen=True)
class ReasoningGymJudge:
    """The generator's own scorer, applied to the final answer alone.

    The scorers give credit to an answer that merely contains the right one, and some
    give 0.01 for anything. So the answer is extracted first
    (`extraction.final_answer`; the whole completion where none is marked), and only a
    score of 1 is a success. Where the scorer cannot cope with the answer (several raise
    on junk) the score is 0.

    ``extra`` holds ``parsed`` (an answer was marked), the ``answer`` and the ``score``.

    Attributes:
      dataset: name of the generator.
      config: its options, as JSON.
      partial_credit: the reward is the score itself; else 1 for a score of 1, or 0.
    """

    dataset: str
    config: str = "{}"
    partial_credit: bool = False

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        scorer = _generator(self.dataset, self.config, 1, 0)
        return [
            self._verdict(scorer, row, completion)
            for row, completion in zip(prompts.columns, completions, strict=True)
        ]

    def _verdict(self, scorer: Any, row: Mapping[str, Any], completion: str) -> Verdict:
        marked = final_answer(completion)
        answer = completion.strip() if marked is None else marked
        extra = {"parsed": marked is not None, "answer": answer}
        try:
            score = float(scorer.score_answer(answer, dict(row)))
        except Exception as error:
            score, extra["note"] = 0.0, f"the scorer raised {type(error).__name__}"
        success = score >= 1.0
        reward = score if self.partial_credit else float(success)
        return Verdict(reward, success, None, extra | {"score": score})


def _items(
    dataset: str, config: str, size: int, seed: int
) -> dict[str, Mapping[str, Any]]:
    items: dict[str, Mapping[str, Any]] = {}
    for item in _generator(dataset, config, size, seed):
        items.setdefault(item["question"], item)
    return items


@lru_cache(maxsize=8)
def _generator(dataset: str, config: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise InputError(
            f"reasoning-gym cannot be imported ({error}): "
            "pip install 'jaxrl_post[tasks]'."
        ) from error

    if dataset not in DATASETS:
        raise InputError(
            f"reasoning-gym has no generator {dataset!r}; {nearest(dataset, DATASETS)}"
        )
    try:
        return reasoning_gym.create_dataset(
            dataset, size=size, seed=seed, **json.loads(config)
        )
    except (AssertionError, TypeError, ValueError) as error:  # its configs' checks
        raise InputError(
            f"{dataset} cannot be made with size={size} and config={config}: {error}"
        ) from error
