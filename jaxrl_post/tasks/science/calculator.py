"""A calculator that a model may use while it answers a science question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxrl_post.tasks.science.language import ProgramError, compile_program
from jaxrl_post.types import Judge, Prompts, Verdict

_CALL = re.compile(r"[0-9+\-*() ]*[0-9)] *=\Z")


def calculate(text: str) -> str | None:
    """What stands before an ``=`` that ends the text, worked out; else None.

    >>> calculate("17*6=102+42="), calculate("answer 7"), calculate("2*(=")
    ('144', None, None)
    """
    call = _CALL.search(text)
    if call is None:
        return None
    try:
        return str(compile_program(call[0].rstrip("= "))(0))
    except ProgramError:
        return None


@dataclass(frozen=True)
class WithCalculator:
    """A judge that works out what an answer leaves open at its end.

    A turn has to end with ``=``: `sampling.stop` is ``["="]``.
    """

    judge: Judge

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return [
            replace(verdict, observation=calculate(completion))
            for verdict, completion in zip(
                self.judge(prompts, completions), completions, strict=True
            )
        ]
