"""Judging answers to science questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_post.tasks.science.language import ProgramError, compile_program
from jaxrl_post.types import Prompts, Verdict

_FINAL = re.compile(r"\banswer:? +(\S[^\n]*?)[.\s]*\Z")
_INTEGER = re.compile(r"[-+]?[0-9]{1,12}")
_SEQUENCE = re.compile(r"[A-Z]{1,32}")


def final_answer(completion: str) -> str | None:
    """What follows the last ``answer`` of a completion, up to its end.

    >>> final_answer("17*6=60+42=102 answer 102")
    '102'
    >>> final_answer("102") is None
    True
    """
    tail = completion[completion.rfind("answer") :] if "answer" in completion else ""
    match = _FINAL.search(tail)
    return match.group(1) if match else None


def _failing_case(program: str, cases: Sequence[Sequence[int]]) -> str | None:
    """The first case that the program gets wrong, in words; None if there is none."""
    run = compile_program(program)
    for x, expected in cases:
        try:
            value = run(x)
        except ProgramError as error:
            return f"x={x}: {error}"
        if value != expected:
            return f"x={x} gives {value}, not {expected}"
    return None


def judge_one(columns: Mapping[str, Any], completion: str) -> Verdict:
    """The verdict on one completion, from the columns of its question."""
    extra = {"domain": columns["domain"], "level": columns["level"], "parsed": True}
    found = final_answer(completion)
    wrong: str | None
    if columns["domain"] == "programs":
        try:
            wrong = _failing_case(found or "", columns["cases"])
        except ProgramError:
            found = wrong = None
    elif columns["answer"].isalpha():
        parsed = found is not None and _SEQUENCE.fullmatch(found)
        found = found if parsed else None
        wrong = None if found == columns["answer"] else f"got {found}"
    else:
        parsed = found is not None and _INTEGER.fullmatch(found)
        found = str(int(found)) if found is not None and parsed else None
        wrong = None if found == columns["answer"] else f"got {found}"
    extra["answer"] = found
    if found is None:
        feedback = "no result to read. end with answer and the result."
        return Verdict(0.0, False, feedback, extra | {"parsed": False})
    if wrong is None:
        return Verdict(1.0, True, None, extra)
    return Verdict(0.0, False, f"{wrong}. {columns['method']}.", extra)


class ScienceJudge:
    """Reward 1 for the exact answer, 0 otherwise; feedback on every wrong attempt.

    ``Verdict.extra`` holds ``parsed``, ``answer``, ``domain`` and ``level``.
    """

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return [
            judge_one(columns, completion)
            for columns, completion in zip(prompts.columns, completions, strict=True)
        ]
