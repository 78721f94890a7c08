"""Errors that are the user's to mend, and the words that help to mend them.

The command line turns an `InputError` into one message and exit code 2; every other
exception is ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_MOST_KNOWN = 40
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 60
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8


class InputError(ValueError):
    """What was asked for cannot be done as it was asked; the message says why."""


class ConfigError(InputError):
    """A config, or an override of it, that cannot be used.

    Attributes:
      problems: one line each, all that were found at once.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            message = f"{source}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            message = f"{source}: {len(self.problems)} problems{lines}"
        super().__init__(message)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of another library's error, as a part of a line.

    >>> one_line(OSError("no\\n  such file"))
    'OSError: no such file'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def shown(value: object) -> str:
    """A value as errors show it: in one short line, however large or deep it is.

    >>> shown("temperature"), shown(list(range(100)))
    ("'temperature'", '[0, 1, 2, 3, 4, 5, 6, 7, ...]')
    """
    return _REPR.repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: the nearest known one, or all.

    Of more than 40 the first eight, and how many there are.

    >>> nearest("temprature", ["temperature", "top_k"])
    "did you mean 'temperature'?"
    >>> nearest("zzz", ["temperature", "top_k"])
    'known: temperature, top_k.'
    >>> nearest("zzz", [f"row-{i:02}" for i in range(64)])[-31:]
    'row-06, row-07, ...; 64 in all.'
    """
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    if len(known) > _MOST_KNOWN:
        return f"known: {', '.join(known[:8])}, ...; {len(known)} in all."
    return f"known: {', '.join(known)}." if known else "none are known."
