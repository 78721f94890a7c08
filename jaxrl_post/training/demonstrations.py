"""A task's demonstrations: tokenised and judged once, when the data is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.generation import tokenize_prompts
from jaxrl_post.isolation import JudgePool
from jaxrl_post.recipes.groups import Demonstrations
from jaxrl_post.sharding import processes
from jaxrl_post.tasks import Task
from jaxrl_post.training.judging import judge_rows, with_tokens
from jaxrl_post.types import Verdict

_OPENING = "<think>\n"
"""Where the chat template has written it already, demonstrations begin behind it."""


class DemonstrationStore:
    """The verified demonstrations of a task, by the ids of its questions.

    A demonstration is available if it exists, if its tokens and the end token fit
    `max_new_tokens`, and if the task's judge calls it a success: a trajectory that the
    verifier rejects is never trained on. (HAPO, arXiv 2603.11321, calls its teacher
    trajectories verified and does not say by whom, or when.)

    Attributes:
      metrics: ``demonstrations/`` ``available``, ``rejected``, ``too_long`` and
        ``missing``, shares of the questions that add up to 1.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        pool: JudgePool,
        *,
        max_new_tokens: int,
        chat_template_arguments: Mapping[str, Any] | None = None,
        key: str = "task",
    ) -> None:
        """Tokenises and judges every demonstration.

        Args:
          task: whose rows have demonstrations.
          tokenizer: a transformers tokenizer, with an end token.
          pool: where the task's judge runs.
          max_new_tokens: length limit of a response, end token included.
          chat_template_arguments: as for the prompts.
          key: the config's section of the task, for messages.

        Raises:
          InputError: there is no end token, or no demonstration is available.
        """
        if tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end token to close demonstrations.")
        prompts = task.rows(range(len(task)))
        self.max_new_tokens = max_new_tokens
        self._rows = {name: i for i, name in enumerate(prompts.ids)}
        self._texts = _without_opening(
            prompts.demonstrations,
            tokenizer,
            prompts.messages[:1],
            chat_template_arguments,
        )
        found = [i for i, text in enumerate(self._texts) if text is not None]
        encoded = (
            tokenizer([self._texts[i] for i in found], add_special_tokens=False)[
                "input_ids"
            ]
            if found
            else []
        )
        self._tokens = {
            i: np.array([*ids, tokenizer.eos_token_id], np.int32)
            for i, ids in zip(found, encoded, strict=True)
        }
        fits = [i for i in found if len(self._tokens[i]) <= max_new_tokens]
        asked, tokens = prompts.take(fits), (self._tokens[i].tolist() for i in fits)
        texts = [self._texts[i] or "" for i in fits]
        answers = with_tokens(task.judge, texts, tokens)
        verdicts = processes.in_shares(
            len(fits),
            lambda rows: judge_rows(pool, task.judge, asked, answers[rows], rows),
        )
        self._verdicts = dict(zip(fits, verdicts, strict=True))
        verified = sum(map(_is_success, verdicts))
        counts = {
            "available": verified,
            "rejected": len(fits) - verified,
            "too_long": len(found) - len(fits),
            "missing": len(prompts) - len(found),
        }
        if not verified:
            told = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in counts.items())
            raise InputError(
                f"{key}: the recipe needs demonstrations, but none of the "
                f"{len(prompts)} questions has one that fits "
                f"max_new_tokens={max_new_tokens} and that the judge accepts ({told})."
            )
        self.metrics = {
            f"demonstrations/{name}": n / len(prompts) for name, n in counts.items()
        }

    def __str__(self) -> str:
        shares = (
            f"{share:.1%} {name.partition('/')[2].replace('_', ' ')}"
            for name, share in self.metrics.items()
            if share
        )
        return f"demonstrations of {len(self._rows)} questions: {', '.join(shares)}"

    def take(self, ids: Sequence[str]) -> Demonstrations:
        """The whole demonstrations of these questions, in that order."""
        rows = [self._rows[name] for name in ids]
        verdicts = [self._verdicts.get(i) for i in rows]
        available = np.array([v is not None and _is_success(v) for v in verdicts], bool)
        tokens = np.zeros((len(rows), self.max_new_tokens), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for p, i in enumerate(rows):
            if available[p]:
                given = self._tokens[i]
                tokens[p, : len(given)] = given
                mask[p, : len(given)] = True
        rewards = [v.reward or 0.0 if v is not None else 0.0 for v in verdicts]
        return Demonstrations(
            tokens=tokens,
            mask=mask,
            is_teacher=mask,
            sampler_logps=np.zeros(tokens.shape, np.float32),
            stopped=np.ones(len(rows), bool),
            rewards=np.array(rewards, np.float32),
            available=available,
            texts=tuple(self._texts[i] or "" for i in rows),
            verdicts=tuple(verdicts),
        )


def _is_success(verdict: Verdict) -> bool:
    """A judge that knows no success is taken at its full reward."""
    if verdict.success is not None:
        return verdict.success
    return verdict.reward is not None and verdict.reward >= 1.0


def _without_opening(
    texts: Sequence[str | None], tokenizer: Any, messages: Any, arguments: Any
) -> list[str | None]:
    """The texts, what the prompt's end says already taken off their beginning."""
    (ids,) = tokenize_prompts(tokenizer, messages, chat_template_arguments=arguments)
    given = tokenizer.decode(ids).endswith(_OPENING)
    return [
        text.removeprefix(_OPENING) if text is not None and given else text
        for text in texts
    ]
