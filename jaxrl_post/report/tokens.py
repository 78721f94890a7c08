"""Completions token by token, coloured by what the teacher would change."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

_FULL = 3.0
"""Nats at which a colour is full: a token twenty times as likely, or as unlikely."""

LEGEND = (
    '<p class="note">Colours: log(teacher / student) of each token. '
    '<span class="up" style="--a:.6">the teacher, with its own context, finds it '
    'likelier</span>, <span class="down" style="--a:.6">less likely</span>; full at '
    f"{_FULL:g} nats.</p>"
)


def colored(row: Mapping[str, Any]) -> str:
    """The response in HTML, a span for each token; empty where no teacher was asked.

    Args:
      row: of ``completions/``, with ``pieces``, ``logps`` and ``teacher_logps``.

    >>> print(
    ...     colored(
    ...         {"pieces": ["a", "<"], "logps": [-1, -2], "teacher_logps": [-1, -0.5]}
    ...     )
    ... )
    <span>a</span><span class="up" style="--a:0.50" title="+1.50">&lt;</span>
    """
    names = ("pieces", "logps", "teacher_logps")
    columns = [row.get(name) for name in names]
    if not all(isinstance(column, list) and column for column in columns):
        return ""
    if len({len(column) for column in columns if column}) != 1:
        return ""  # not ours
    return "".join(
        _token(str(piece), teacher - student)
        for piece, student, teacher in zip(*columns, strict=True)
    )


def _token(piece: str, change: float) -> str:
    strength = f"{min(abs(change) / _FULL, 1):.2f}"
    if strength == "0.00":
        return f"<span>{html.escape(piece)}</span>"
    kind = "up" if change > 0 else "down"
    return (
        f'<span class="{kind}" style="--a:{strength}" title="{change:+.2f}">'
        f"{html.escape(piece)}</span>"
    )
