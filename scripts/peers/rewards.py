"""What the benchmarks reward: the same functions for every library, without imports."""

from __future__ import annotations

_SHARE = 0.12
"""Of digits among the characters of random tokens: half the completions reach it."""


def digits(completions, **columns) -> list[float]:
    """The share of digits."""
    return [_share(text) for text in map(_text, completions)]


def solved(completions, **columns) -> list[float]:
    """1 for about every second completion, so that each group can teach itself."""
    return [float(_share(text) > _SHARE) for text in map(_text, completions)]


def _share(text: str) -> float:
    return sum(character.isdigit() for character in text) / max(1, len(text))


def _text(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
