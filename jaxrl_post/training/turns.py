"""Answers of several turns: what a task says in between is read, never trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrl_post.generation import (
    EncodedPrompts,
    Rollouts,
    decode_responses,
    quote_special_tokens,
    tokenize_prompts,
)
from jaxrl_post.isolation import JudgePool
from jaxrl_post.isolation.templates import render
from jaxrl_post.tasks import Task
from jaxrl_post.training.judging import judge_texts, kept_tokens, with_tokens
from jaxrl_post.types import Message, Verdict


class Turn(NamedTuple):
    """What answers go on from.

    Attributes:
      number: counted from 0; the first turn is none of these.
      rows: which answers.
      before: token ids of each one's prompt and turns, observations included.
      observed: token ids of what it is told now.
    """

    number: int
    rows: list[int]
    before: list[list[int]]
    observed: list[list[int]]


Generate = Callable[[Turn], Rollouts]
"""Samples a turn of each answer; see `Dialogue.go_on`."""


@dataclass(frozen=True)
class Answers:
    """Judged answers, in rows as sampled.

    Attributes:
      rollouts: ``[B, T]``: all turns of an answer and the observations between them.
        An observation's tokens are in the mask; they have log-probabilities 0.
      written: ``[B, T]`` bool, the tokens in the mask that the policy wrote; None: all.
      texts: of whole answers, observations included.
      verdicts: on them.
    """

    rollouts: Rollouts
    written: np.ndarray | None
    texts: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def go_on(
    rollouts: Rollouts,
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
    contexts: Sequence[Sequence[int]],
    *,
    turns: int,
    tokenizer: Any,
    generate: Generate,
    judge: Callable[[Sequence[int], Sequence[str], Any], Sequence[Verdict]],
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> Answers:
    """Lets the policy go on behind the observations that its first turns were given.

    An answer goes on while its verdict has an observation, its last turn ended by
    itself, turns are left, and T tokens hold the observation and one more.

    Args:
      rollouts: the first turns, ``[B, T]``.
      texts, verdicts: of them.
      contexts: token ids of the prompt of each.
      turns: of an answer, at most.
      tokenizer: a transformers tokenizer.
      generate: samples a turn; what exceeds T is cut off.
      judge: ``judge(rows, texts, tokens)``, the verdicts on whole answers, of which
        these are all tokens.
      chat_template_arguments: as for prompts.
    """
    tokens, mask, logps, sampler_logps, stopped = (
        np.array(x)
        for x in (
            rollouts.tokens,
            rollouts.mask,
            rollouts.logps,
            rollouts.sampler_logps,
            rollouts.stopped,
        )
    )
    written, said, found = mask.copy(), [*texts], [*verdicts]
    width = mask.shape[1]
    for turn in range(1, turns):
        rows: list[int] = []
        added: list[list[int]] = []
        before: list[list[int]] = []
        for row in np.flatnonzero(stopped).tolist():
            if (observation := found[row].observation) is None:
                continue
            length = int(mask[row].sum())
            own = tokens[row, :length].tolist()
            ids = observation_tokens(
                tokenizer, observation, own, chat_template_arguments
            )
            if length + len(ids) < width:
                rows.append(row)
                added.append(ids)
                before.append([*contexts[row], *own])
        if not rows:
            break
        new = generate(Turn(turn, rows, before, added))
        pieces = decode_responses(tokenizer, new.tokens, new.mask)
        for i, row in enumerate(rows):
            start = int(mask[row].sum())
            first = start + len(added[i])
            count = int(np.asarray(new.mask)[i].sum())
            kept = min(count, width - first)
            here = slice(first, first + kept)
            tokens[row, start:first] = added[i]
            tokens[row, here] = np.asarray(new.tokens)[i, :kept]
            mask[row, start : here.stop] = True
            written[row, here] = True
            logps[row, here] = np.asarray(new.logps)[i, :kept]
            sampler_logps[row, here] = np.asarray(new.sampler_logps)[i, :kept]
            stopped[row] = bool(np.asarray(new.stopped)[i]) and kept == count
            if kept < count:
                part = np.asarray(new.tokens)[i : i + 1, :kept]
                pieces[i] = decode_responses(tokenizer, part, np.ones_like(part))[0]
            said[row] += content(found[row].observation or "") + pieces[i]
        whole_texts = [said[row] for row in rows]
        judged = judge(rows, whole_texts, kept_tokens(tokens[rows], mask[rows]))
        for row, verdict in zip(rows, judged, strict=True):
            found[row] = verdict
    whole = Rollouts(
        tokens=tokens,
        mask=mask,
        logps=logps,
        sampler_logps=sampler_logps,
        stopped=stopped,
    )
    return Answers(whole, written, tuple(said), tuple(found))


def in_turns(
    rollouts: Rollouts,
    texts: Sequence[str],
    verdicts: Sequence[Verdict],
    encoded: EncodedPrompts,
    *,
    task: Task,
    pool: JudgePool,
    tokenizer: Any,
    generate: Generate,
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> Answers:
    """First turns, and those that a task of several (``task.turns``) lets follow.

    Args:
      rollouts, texts, verdicts: first turns, G to each prompt, in rows ``p * G + g``.
      encoded: the prompts.
      task, pool: who judges, and where.
      tokenizer, generate, chat_template_arguments: as in `go_on`.
    """
    turns = turns_of(task)
    if turns == 1:
        return Answers(rollouts, None, tuple(texts), tuple(verdicts))
    count = len(encoded.prompts)
    asked = np.repeat(np.arange(count), len(texts) // count)
    ids = [
        row[kept].tolist()
        for row, kept in zip(encoded.contexts, encoded.context_mask, strict=True)
    ]

    def judge(rows, whole, tokens):
        prompts = encoded.prompts.take(asked[rows].tolist())
        seen = with_tokens(task.judge, whole, tokens)
        return judge_texts(pool, task.judge, prompts, seen)

    return go_on(
        rollouts,
        texts,
        verdicts,
        [ids[p] for p in asked],
        turns=turns,
        tokenizer=tokenizer,
        generate=generate,
        judge=judge,
        chat_template_arguments=chat_template_arguments,
    )


def turns_of(task: Task) -> int:
    """How many turns an answer may have; a task that does not say has one."""
    return getattr(task, "turns", 1)


_SPOKEN = "spoken."


def content(observation: str | Message) -> str:
    """The text of an observation."""
    return observation if isinstance(observation, str) else observation["content"]


def observation_tokens(
    tokenizer: Any,
    observation: str | Message,
    own: Sequence[int],
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens between an answer's turn and its next: what a task has observed.

    A text is taken as it is; of a message it is what the chat template makes of it, and
    what opens the next turn. Names of special tokens in either are text.

    Args:
      tokenizer: a transformers tokenizer.
      observation: a text or a message.
      own: tokens of the answer so far, which may end with the token that the template
        would close the turn by.
      chat_template_arguments: as for prompts.
    """
    text = quote_special_tokens(tokenizer, content(observation))
    if not isinstance(observation, str) and tokenizer.chat_template:
        spoken = [{"role": "user", "content": "?"}]
        spoken += [{"role": "assistant", "content": _SPOKEN}]
        spoken += [{**observation, "content": text}]
        (whole,) = render(tokenizer, [spoken], chat_template_arguments or {})
        text = whole.rpartition(_SPOKEN)[2]
        closed = tokenizer.decode(own[-1:])
        text = text.removeprefix(closed) if closed else text
    (ids,) = tokenize_prompts(tokenizer, [text])
    (opening,) = tokenize_prompts(tokenizer, [""])
    return ids[len(opening) :] if ids[: len(opening)] == opening else ids
