"""Finding the final answer in what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Callable

_MARKER = re.compile(
    r"(?P<tag><answer>)|(?P<boxed>\\boxed\s*\{)|####|\banswer(?:\s+is\b|\s*[:=])",
    re.IGNORECASE,
)


_MOST_MARKS = 100
"""Looked at from the end of a text: in a model's endless repetition each mark's content
reaches to the end, and all of them together are quadratic."""


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds; braces inside it are balanced.

    >>> last_boxed(r"\boxed{1} or rather \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> last_boxed("no box") is None
    True
    """
    closing = _closing_braces(text)
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        if match.end() in closing:
            return text[match.end() : closing[match.end()]]
    return None


def last_tagged(text: str) -> str:
    """What follows the last ``<answer>`` up to ``</answer>``, stripped.

    Without the opening tag this is the whole text up to the first closing tag, as in
    SDPO's verifier: a bare answer counts.

    >>> last_tagged("<answer>A</answer> no: <answer> B </answer>")
    'B'
    >>> last_tagged("C")
    'C'
    """
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def final_answer(
    text: str, accept: Callable[[str], bool] = lambda answer: True
) -> str | None:
    r"""The last answer that is marked as one.

    Marks are ``<answer>...</answer>``, ``\boxed{...}``, and to the end of their line
    ``####``, ``answer is``, ``answer:`` and ``answer =``. The last mark whose content
    is acceptable counts, in whatever notation; of more than a hundred, the last ones.

    Args:
      text: a completion.
      accept: a condition on the answer, e.g. that it contains a number.

    Returns:
      The answer without surrounding blanks, full stop and asterisks; None if no answer
      is marked or acceptable.

    >>> final_answer(r"The answer is \boxed{12}.")
    '12'
    >>> final_answer("The answer is 3.\nNo wait. #### 4")
    '4'
    >>> final_answer("12") is None
    True
    """
    closing = _closing_braces(text)
    for match in reversed([*_MARKER.finditer(text)][-_MOST_MARKS:]):
        if match["boxed"]:
            content = text[match.end() : closing.get(match.end(), match.end())]
        elif match["tag"]:
            content = text[match.end() :].partition("</answer>")[0]
        else:
            rest = text[match.end() :].lstrip(" \t:*\r\n")
            content = rest.partition("\n")[0].partition("</answer>")[0]
        content = content.strip().removesuffix(".").strip("* ")
        if content and accept(content):
            return content
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Where the brace closes that was opened just before a position, in one pass."""
    opened: list[int] = []
    closing = {}
    for match in re.finditer(r"[{}]", text):
        if match[0] == "{":
            opened.append(match.end())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing
