"""A procedural science task: five domains, five levels, exact short answers.

Questions are drawn from ranges by a seeded generator, belong to a split by a hash of
their text, and carry a worked solution, the usual wrong solutions, and a method that
feedback on a wrong attempt names. See ``docs/science.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from random import Random
from typing import Literal

from jaxrl_post.tasks.base import Row, RowsTask
from jaxrl_post.tasks.science import biology, chemistry, materials, physics, programs
from jaxrl_post.tasks.science.calculator import WithCalculator
from jaxrl_post.tasks.science.judge import ScienceJudge, final_answer, judge_one
from jaxrl_post.tasks.science.question import LEVELS, SPLITS, Question, split_of

__all__ = [
    "DOMAINS",
    "LEVELS",
    "SPLITS",
    "Question",
    "ScienceJudge",
    "draw",
    "final_answer",
    "judge_one",
    "load",
    "questions",
    "row",
    "split_of",
]

_MAKERS = {
    "chemistry": chemistry.MAKERS,
    "physics": physics.MAKERS,
    "biology": biology.MAKERS,
    "materials": materials.MAKERS,
    "programs": programs.MAKERS,
}
DOMAINS = tuple(_MAKERS)

_SIZES = {"train": 512, "validation": 64, "test": 64}


def draw(rng: Random, split: str, domain: str, level: int) -> Question:
    """One question of a split; every draw is independent, so texts may repeat."""
    while True:
        question = rng.choice(_MAKERS[domain][level])(rng)
        if question is not None and split_of(question.text) == split:
            return question


def questions(split: str, domain: str, level: int, seed: int = 0) -> Iterator[Question]:
    """The different questions of one cell, in an order that `seed` decides.

    Ends when 1,500 draws in a row bring nothing new.
    """
    rng = Random(f"{split} {domain} {level} {seed}")
    seen: set[str] = set()
    misses = 0
    while misses < 1_500:
        question = rng.choice(_MAKERS[domain][level])(rng)
        misses += 1
        if question is None or question.text in seen:
            continue
        if split_of(question.text) == split:
            seen.add(question.text)
            misses = 0
            yield question


def row(question: Question, name: str) -> Row:
    """A question as the row of a task."""
    return Row(
        id=name,
        messages=({"role": "user", "content": question.text},),
        columns={
            "domain": question.domain,
            "level": question.level,
            "kind": question.kind,
            "answer": question.answer,
            "method": question.method,
            "cases": [list(case) for case in question.cases],
        },
        demonstration=question.solution,
    )


def _checked(name: str, values: Sequence, allowed: Sequence) -> tuple:
    wrong = [value for value in values if value not in allowed]
    if wrong or not values:
        raise ValueError(
            f"science: {name}={list(values)}; choose from {list(allowed)}."
        )
    return tuple(values)


def load(
    split: str = "train",
    levels: Sequence[int] = (1, 2),
    domains: Sequence[str] | None = None,
    size: int | None = None,
    seed: int = 0,
    tool: Literal["none", "calculator"] = "none",
    turns: int = 8,
) -> RowsTask:
    """The science task.

    Args:
      split: ``train``, ``validation`` or ``test``. Disjoint, whatever the seed.
      levels: from 1 (one step) to 5 (beyond the embedded base model).
      domains: some of `DOMAINS`; None for all.
      size: questions per domain and level at most; None for 512 in train and 64 in
        the others.
      seed: decides which questions are drawn.
      tool: "calculator": a turn that ends with ``=`` is answered with what stands
        before it, worked out; set ``sampling.stop: ["="]``.
      turns: of an answer with a tool, at most.

    Returns:
      A task whose first rows are a sample of all: domains and levels take turns.

    Raises:
      ValueError: for an unknown split, level or domain, or no question at all.

    >>> task = load("test", levels=(1,), domains=["physics"], size=2)
    >>> prompts = task.rows([0])
    >>> task.judge(prompts, [prompts.demonstrations[0]])[0].reward
    1.0
    """
    _checked("split", (split,), SPLITS)
    levels = _checked("levels", levels, LEVELS)
    domains = _checked("domains", domains if domains is not None else DOMAINS, DOMAINS)
    size = _SIZES[split] if size is None else size
    if size < 1:
        raise ValueError(f"science: size={size}; it must be at least 1.")
    cells = [
        [
            row(question, f"science-{split}-{seed}-{domain}-{level}-{index}")
            for index, question in enumerate(
                islice(questions(split, domain, level, seed), size)
            )
        ]
        for domain in domains
        for level in levels
    ]
    rows = [row for turn in zip_longest(*cells) for row in turn if row is not None]
    if tool == "none":
        return RowsTask("science", rows, ScienceJudge())
    return RowsTask("science", rows, WithCalculator(ScienceJudge()), turns)
