"""Sampled tokens as texts and verdicts, each process judging its share of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.generation import Rollouts, decode_responses
from jaxrl_post.generation.rollouts import Array
from jaxrl_post.isolation import JudgePool, Judging
from jaxrl_post.sharding import processes
from jaxrl_post.tasks import Task
from jaxrl_post.tasks.rewards import RewardFunctionJudge, TrainerState
from jaxrl_post.types import Completion, Judge, Prompts, Verdict


def read_and_judge(
    tokenizer: Any,
    pool: JudgePool,
    judge: Judge,
    prompts: Prompts,
    tokens: Array,
    mask: Array,
) -> tuple[list[str], list[Verdict]]:
    """Texts and verdicts of answers, the same in every process.

    Args:
      tokenizer: a transformers tokenizer.
      pool: of this process.
      judge: of the task.
      prompts: one for each answer.
      tokens, mask: ``[B, T]``, as sampled.

    Raises:
      InputError: the judge cannot be run in one of the processes.
    """

    def own(rows: slice) -> list[tuple[str, Verdict]]:
        texts = decode_responses(tokenizer, tokens[rows], mask[rows])
        seen = with_tokens(judge, texts, kept_tokens(tokens[rows], mask[rows]))
        verdicts = judge_rows(pool, judge, prompts, seen, rows)
        return list(zip(texts, verdicts, strict=True))

    both = processes.in_shares(len(prompts), own)
    return [text for text, _ in both], [verdict for _, verdict in both]


def kept_tokens(tokens: Array, mask: Array) -> Iterator[list[int]]:
    """The tokens of each row that are in the mask."""
    for row, kept in zip(np.asarray(tokens), np.asarray(mask) != 0, strict=True):
        yield row[kept].tolist()


def with_tokens(
    judge: Judge, texts: Sequence[str], tokens: Iterable[Sequence[int]]
) -> Sequence[str]:
    """The texts; where the judge reads tokens, too, with these."""
    if not isinstance(judge, RewardFunctionJudge) or not judge.takes("completion_ids"):
        return texts
    return list(map(Completion, texts, tokens))


def tell(task: Task, state: TrainerState) -> None:
    """Has a task's reward functions know how far training is."""
    if isinstance(task.judge, RewardFunctionJudge):
        task.judge = task.judge.at(state)


def rehearse(pool: JudgePool, tasks: Mapping[str, Task], state: TrainerState) -> None:
    """Has tasks' reward functions judge two answers before anything is loaded.

    Args:
      pool: of this process.
      tasks: by the config's section, for messages; only reward functions are tried,
        and those of several tasks once.
      state: how far training is.

    Raises:
      InputError: a function does not return one reward for each answer.
    """
    tried: list[Judge] = []
    for key, task in tasks.items():
        tell(task, state)
        judge = task.judge
        if isinstance(judge, RewardFunctionJudge) and judge not in tried:
            tried.append(judge)
            (verdict,) = pool.judge(judge.rehearse, task.prompts(0, 0, 1), [""])
            if wrong := verdict.extra.get("wrong"):
                raise InputError(f"{key}: {wrong}")


@contextmanager
def judging_early(
    tokenizer: Any, pool: JudgePool, judge: Judge, prompts: Prompts
) -> Iterator[EarlyAnswers]:
    """Judges answers as they end, in one process, while others are decoded.

    Args:
      tokenizer, pool, judge: as in `read_and_judge`.
      prompts: one for each answer that will come.

    Raises:
      InputError: the judge cannot be run.
    """
    with pool.judging(judge, prompts) as judging:
        yield EarlyAnswers(tokenizer, judging, judge, len(prompts))


class EarlyAnswers:
    """Takes answers in the order in which they end; gives back all in that of rows."""

    def __init__(
        self, tokenizer: Any, judging: Judging, judge: Judge, count: int
    ) -> None:
        self._tokenizer, self._judging, self._judge = tokenizer, judging, judge
        self._texts = [""] * count

    def add(self, rows: np.ndarray, part: Rollouts) -> None:
        """Answers in these rows: what `Sampler.generate` calls `ended` with."""
        texts = decode_responses(self._tokenizer, part.tokens, part.mask)
        for row, text in zip(rows.tolist(), texts, strict=True):
            self._texts[row] = text
        tokens = kept_tokens(part.tokens, part.mask)
        self._judging.give(rows.tolist(), with_tokens(self._judge, texts, tokens))

    def answers(self) -> tuple[list[str], list[Verdict]]:
        """The texts and verdicts of all, as `read_and_judge` gives them."""
        return self._texts, self._judging.verdicts()


def judge_rows(
    pool: JudgePool, judge: Judge, prompts: Prompts, texts: Sequence[str], rows: slice
) -> list[Verdict]:
    """The verdicts of the answers to some of the prompts."""
    asked = prompts.take(list(range(*rows.indices(len(prompts)))))
    return list(pool.judge(judge, asked, texts)) if len(asked) else []


def judge_texts(
    pool: JudgePool, judge: Judge, prompts: Prompts, texts: Sequence[str]
) -> list[Verdict]:
    """The verdicts of texts, each process judging its share of them."""
    return processes.in_shares(
        len(texts), lambda rows: judge_rows(pool, judge, prompts, texts[rows], rows)
    )
