"""What the embedded base model reads: plain answers of a mixed kind, and contexts.

Plain questions are answered by the right procedure with a chosen probability, by
misconceptions otherwise. A model trained by likelihood is calibrated, so its accuracy
at temperature 1 is about that probability, while its greedy answer follows the
majority: mostly a misconception. The right procedure is practised all the same, where
the context holds feedback or a worked solution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from jaxrl_post.tasks.reprompt import reprompt_text
from jaxrl_post.tasks.science import DOMAINS, Question, draw, judge_one, row

# Probability of the right procedure, by level and kind.
RIGHT = {
    1: {
        "force": 0.18,
        "distance": 0.60,
        "work": 0.20,
        "transcription": 0.25,
        "composition": 0.22,
        "atoms": 0.22,
        "molecules": 0.55,
        "cells": 0.20,
        "density": 0.48,
        "scale then shift": 0.60,
        "shift then scale": 0.18,
    },
    2: {
        "force": 0.14,
        "distance": 0.45,
        "work": 0.14,
        "transcription": 0.22,
        "coding length": 0.16,
        "molar mass": 0.20,
        "all atoms": 0.20,
        "two crystals": 0.16,
        "mass": 0.30,
        "shift scale shift": 0.20,
        "scale shift scale": 0.14,
    },
    3: {
        "groups": 0.08,
        "momentum": 0.08,
        "reverse": 0.08,
        "vacancies": 0.05,
        "branch": 0.05,
    },
    4: {
        "long molar mass": 0.10,
        "speed": 0.10,
        "transcription": 0.04,
        "plate": 0.06,
        "long branch": 0.10,
    },
}
EARLY_HARD = 0.035  # in place of levels 3 and 4 of the table, while skills form
SLIP, UNMARKED = 0.03, 0.015
PLAIN_LEVELS = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5)
CONTEXT_LEVELS = (1, 2, 3, 4, 5)
COPY_SYMBOLS = "0123456789+-*/=()ACGTUx<> "


def right_share(question: Question, hard: float | None = None) -> float:
    """The probability that a plain answer takes the right procedure.

    It depends on the level, the kind and, on levels 1 and 2, up or down by a third on
    the variant (the object, the metal, the length), so that it is no single switch.
    Level 5 is never right without context. `hard` replaces levels 3 and 4.
    """
    if question.level == 5:
        return 0.0
    if question.level > 2:
        return RIGHT[question.level][question.kind] if hard is None else hard
    up = hashlib.sha256(question.variant.encode()).digest()[0] % 2
    return RIGHT[question.level][question.kind] * (4 / 3 if up else 2 / 3)


def wrong_answer(rng: Random, question: Question) -> str:
    """A misconception, the first one three times as often as the others."""
    first, *others = question.misconceptions
    return rng.choice(others) if others and rng.random() < 0.25 else first


def _slip(rng: Random, answer: str) -> str:
    """One digit or capital letter replaced, anywhere in the answer."""
    places = [i for i, c in enumerate(answer) if c.isdigit() or c.isupper()]
    at = rng.choice(places)
    pool = "0123456789" if answer[at].isdigit() else "ACGTU"
    return answer[:at] + rng.choice(pool) + answer[at + 1 :]


def plain_answer(rng: Random, question: Question, hard: float | None = None) -> str:
    """One draw from the mixture."""
    right = rng.random() < right_share(question, hard)
    answer = question.solution if right else wrong_answer(rng, question)
    if rng.random() < SLIP and question.level < 5:
        answer = _slip(rng, answer)
    if rng.random() < UNMARKED:
        answer = answer.replace("answer ", "")
    return answer


@dataclass(frozen=True)
class Example:
    """What the model reads, and what it is to answer."""

    prompt: str
    response: str


def _feedback(rng: Random, question: Question) -> str | None:
    """Feedback on a wrong attempt; None where the attempt happens to be right."""
    attempt = wrong_answer(rng, question)
    if rng.random() < 0.15:
        attempt = _slip(rng, attempt)
    if rng.random() < 0.05:
        attempt = attempt.replace("answer ", "")
    return judge_one(row(question, "").columns, attempt).feedback


def context_example(rng: Random, split: str) -> Example:
    """A question with a worked solution, with feedback, or with a text to copy."""
    level, domain = rng.choice(CONTEXT_LEVELS), rng.choice(DOMAINS)
    question = draw(rng, split, domain, level)
    kind = rng.random()
    demonstration = feedback = None
    response = question.solution
    if kind < 0.2:
        length = rng.randint(3, 22)
        response = "".join(rng.choices(COPY_SYMBOLS, k=length)).strip() or "x"
        demonstration = response
    elif kind < 0.65 or level == 5:
        demonstration = question.solution
    else:
        feedback = _feedback(rng, question)
        if kind > 0.92:
            demonstration = question.solution
    text = reprompt_text(question.text, demonstration=demonstration, feedback=feedback)
    return Example(text, response)


def plain_example(rng: Random, split: str, hard: float | None = None) -> Example:
    """A plain question and one draw from the mixture of its answers."""
    question = draw(rng, split, rng.choice(DOMAINS), rng.choice(PLAIN_LEVELS))
    return Example(question.text, plain_answer(rng, question, hard))


def right_example(rng: Random, split: str, levels: tuple[int, ...]) -> Example:
    """A plain question and its worked solution: supervised training's diet."""
    question = draw(rng, split, rng.choice(DOMAINS), rng.choice(levels))
    return Example(question.text, question.solution)


def examples(
    rng: Random, split: str = "train", hard: float | None = None
) -> Iterator[Example]:
    """Two plain rows, one in context, and so on."""
    while True:
        yield plain_example(rng, split, hard)
        yield plain_example(rng, split, hard)
        yield context_example(rng, split)


def packed_batches(
    stream: Iterator[Example], tokenizer, *, rows: int, width: int
) -> Iterator[dict[str, np.ndarray]]:
    """Examples packed into ``[rows, width]`` arrays, first fit, a segment each.

    Yields:
      ``tokens``, ``positions``, ``segment_ids`` (0 is padding) and ``targets``: the
      token to predict at a place, or -1 where no response token follows.
    """
    encode = tokenizer.backend_tokenizer.encode
    eos = tokenizer.eos_token_id
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])

    def ids(text: str) -> list[int]:
        return encode(text, add_special_tokens=False).ids

    pending: list[tuple[list[int], list[int]]] = []
    while True:
        batch = {
            name: np.zeros((rows, width), np.int32)
            for name in ("tokens", "positions", "segment_ids", "targets")
        }
        batch["targets"] -= 1
        used, count = np.zeros(rows, int), np.zeros(rows, int)
        waiting, misses = pending, 0
        pending = []
        while misses < 8:
            if waiting:
                prompt, response = waiting.pop()
            else:
                example = next(stream)
                prompt = [user, *ids(example.prompt), assistant]
                response = [*ids(example.response), eos]
            whole = prompt + response
            free = np.flatnonzero(used + len(whole) <= width)
            if not len(free):
                pending.append((prompt, response))
                misses += 1
                continue
            r = free[0]
            at = slice(used[r], used[r] + len(whole))
            count[r] += 1
            batch["tokens"][r, at] = whole
            batch["positions"][r, at] = range(len(whole))
            batch["segment_ids"][r, at] = count[r]
            start = used[r] + len(prompt) - 1
            batch["targets"][r, start : start + len(response)] = response
            used[r] += len(whole)
        yield batch
