"""What a question of the science task is, and the arithmetic its solutions share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

SPLITS = ("train", "validation", "test")
LEVELS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Question:
    """One question with its worked solution and the usual wrong ones.

    Attributes:
      kind: what is asked (``"force"``); a kind belongs to one domain.
      variant: the surface feature that varies within a kind (the object, the metal).
      text: the question, one line of lowercase English.
      solution: a short working that ends with ``answer`` and the answer.
      answer: the answer alone.
      misconceptions: wrong solutions, each by a systematic wrong procedure, the
        commonest first. None of them is judged right.
      method: the sentence that feedback on a wrong answer ends with.
      cases: input and output pairs that a program must reproduce; empty elsewhere.
    """

    domain: str
    level: int
    kind: str
    variant: str
    text: str
    solution: str
    answer: str
    misconceptions: tuple[str, ...]
    method: str
    cases: tuple[tuple[int, int], ...] = ()


Maker = Callable[[Random], Question | None]
"""Draws a question; None where the draw is degenerate (a misconception is right)."""


def split_of(text: str) -> str:
    """The split that a question belongs to: 80 % train, 10 % validation, 10 % test.

    A hash of the text decides, so that the splits are disjoint by construction,
    whatever the seed.

    >>> split_of("a 7 kg cart accelerates at 6 m/s2. force in N?")
    'train'
    """
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return SPLITS[max(0, bucket - 7)]


def product(a: int, b: int) -> str:
    """``a*b`` with its working; tens and units apart where `a` has two digits.

    >>> product(7, 6), product(17, 6)
    ('7*6=42', '17*6=60+42=102')
    """
    if a < 10:
        return f"{a}*{b}={a * b}"
    return f"{a}*{b}={a // 10 * 10 * b}+{a % 10 * b}={a * b}"


def last_number(working: str) -> int:
    """The result of a working: the number after its last ``=``."""
    return int(working.rsplit("=", 1)[1])


def numeric(
    domain: str,
    level: int,
    kind: str,
    variant: str,
    text: str,
    working: str,
    wrong_workings: tuple[str, ...],
    method: str,
) -> Question | None:
    """A question whose answer is the integer that its working ends with."""
    answer = last_number(working)
    if any(last_number(wrong) == answer for wrong in wrong_workings):
        return None
    return Question(
        domain,
        level,
        kind,
        variant,
        text,
        solution=f"{working} answer {answer}",
        answer=str(answer),
        misconceptions=tuple(f"{w} answer {last_number(w)}" for w in wrong_workings),
        method=method,
    )
