"""The self-teacher's contexts: questions with what it is shown, as token arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_post.generation import (
    pad_contexts,
    quote_special_tokens,
    tokenize_prompts,
)
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.recipes.reprompt import Privileged, Reprompt
from jaxrl_post.tasks.reprompt import reprompt_messages
from jaxrl_post.training.widths import fit_width, pad_left
from jaxrl_post.types import Message


@dataclass(frozen=True)
class TeacherContexts:
    """What a batch needs of the teacher's side; shapes as in `Batch`.

    Attributes:
      contexts, context_mask: ``[Ct, St]``, each distinct context once; their number is
        rounded up to a power of two, so that few shapes occur.
      index: ``[P, G]`` int32, each sample's context; any where it is not distilled.
      distilled: ``[P, G]`` bool.
      weights: ``[P, G]`` float32.
      metrics: shares, by name.
    """

    contexts: np.ndarray
    context_mask: np.ndarray
    index: np.ndarray
    distilled: np.ndarray
    weights: np.ndarray
    metrics: Mapping[str, float]


def make_teacher_contexts(
    groups: Groups,
    reprompt: Reprompt,
    tokenizer: Any,
    rng: np.random.Generator,
    *,
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> TeacherContexts:
    """Chooses, words and tokenises what the teacher is shown.

    Args:
      groups: judged groups.
      reprompt: how.
      tokenizer: a transformers tokenizer.
      rng: for random choices.
      chat_template_arguments: as for the student's prompts.
    """
    chosen = reprompt.choose(groups, rng)
    seen: dict[tuple[int, Privileged], int] = {}
    rows: list[list[int]] = []
    shortened = 0
    index = np.zeros(groups.judged.shape, np.int32)
    distilled = np.zeros(groups.judged.shape, bool)
    for p, privileged_row in enumerate(chosen):
        for g, privileged in enumerate(privileged_row):
            if not privileged:
                continue
            key = (p, privileged)
            if key not in seen:
                seen[key] = len(rows)
                ids, cut = fit_context(
                    tokenizer,
                    groups.prompts.messages[p],
                    privileged,
                    reprompt,
                    chat_template_arguments,
                )
                rows.append(ids)
                shortened += cut
            index[p, g], distilled[p, g] = seen[key], True
    if not rows:  # the batch keeps its form; nothing is distilled
        first = groups.contexts[0][groups.context_mask[0]].tolist()
        rows = [first]
    success = reprompt.successes(groups)
    demonstrated = [[c.demonstration is not None for c in row] for row in chosen]
    told = [[c.feedback is not None for c in row] for row in chosen]
    metrics = {
        "teacher/reprompted": float(distilled.mean()),
        "teacher/demonstrated": float(np.mean(demonstrated)),
        "teacher/feedback": float(np.mean(told)),
        "teacher/success_groups": float(success.any(1).mean()),
        "teacher/contexts": float(len(seen)),
        "teacher/shortened": shortened / len(rows),
    }
    count = 1 << (len(rows) - 1).bit_length()
    contexts, mask = pad_contexts(rows + [rows[0]] * (count - len(rows)))
    # A question that alone exceeds the limit stays whole.
    width = max(
        fit_width(contexts.shape[1], reprompt.max_length), int(mask.sum(1).max())
    )
    return TeacherContexts(
        contexts=pad_left(contexts, width),
        context_mask=pad_left(mask, width),
        index=index,
        distilled=distilled,
        weights=reprompt.weights(groups),
        metrics=metrics,
    )


def fit_context(
    tokenizer: Any,
    messages: Sequence[Message],
    privileged: Privileged,
    reprompt: Reprompt,
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> tuple[list[int], bool]:
    """Token ids of one teacher context, and whether something had to be cut.

    What exceeds `Reprompt.max_length` is cut from the end of the demonstration and the
    feedback, in proportion to their lengths: question, instruction and generation
    prompt stay whole, unless they alone are too long. Names of special tokens in
    demonstration and feedback are text: they end no turn.
    """

    def encode(*inserted):
        demonstration, feedback = (
            text and quote_special_tokens(tokenizer, text) for text in inserted
        )
        conversation = reprompt_messages(
            messages,
            demonstration=demonstration,
            feedback=feedback,
            templates=reprompt.templates,
        )
        return tokenize_prompts(
            tokenizer, [conversation], chat_template_arguments=chat_template_arguments
        )[0]

    demonstration, feedback = privileged
    ids = encode(demonstration, feedback)
    if len(ids) <= reprompt.max_length:
        return ids, False
    pieces = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        if text
        else []
        for text in (demonstration, feedback)
    ]
    share = 1.0
    while len(ids) > reprompt.max_length and share > 0:
        # Tokens at a cut may merge differently: ask for a little less each time.
        total = share * sum(map(len, pieces))
        share = max(0.0, share * (1 - (len(ids) - reprompt.max_length) / total) - 0.01)
        kept = [
            tokenizer.decode(
                piece[: int(share * len(piece))], clean_up_tokenization_spaces=False
            )
            or None
            for piece in pieces
        ]
        ids = encode(*kept)
    return ids, True
