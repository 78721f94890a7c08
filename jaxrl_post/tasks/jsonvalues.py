"""Comparing values that came as JSON."""

from __future__ import annotations

import json
from typing import Any


def parsed(text: str) -> Any:
    """What a text says in JSON.

    Raises:
      ValueError: it is none, or is nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; a number is no truth value.

    >>> same({"a": [1, 2.0]}, {"a": [1.0, 2]}), same(1, True), same("1", 1)
    (True, False, False)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return one == other
