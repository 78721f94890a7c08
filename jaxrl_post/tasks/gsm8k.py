"""GSM8K: grade-school word problems with a number as the answer (arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.tasks.base import Row, RowsTask
from jaxrl_post.tasks.extraction import final_answer
from jaxrl_post.tasks.sources import local, read, text
from jaxrl_post.types import Prompts, Verdict

INSTRUCTIONS = {
    "hash": "Work it out step by step. End with a line that holds #### and the number.",
    "boxed": r"Work it out step by step. End with the number in \boxed{}.",
}
"""What is asked for below the question, by answer format."""

_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?)\s?[$€£]?\s?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)"
)
_FORMULA = re.compile(r"\s*[-+*/^]\s*[\d({]|\}\s*\{")
_CALCULATION = re.compile(r"<<[^<>]*>>")


def load(
    split: str = "train",
    *,
    path: str | Sequence[str] | None = None,
    answer_format: str = "hash",
    instruction: str | None = None,
) -> RowsTask:
    """Opens GSM8K; the human solutions are its demonstrations.

    Args:
      split: ``"train"`` (7473 rows) or ``"test"`` (1319).
      path: a folder with ``train.jsonl`` and ``test.jsonl`` (columns ``question`` and
        ``answer``), or one such file; several: the first that exists; None, or none
        of them: ``openai/gsm8k`` from the Hub.
      answer_format: ``"hash"`` (``#### 72``) or ``"boxed"`` (``\\boxed{72}``): how the
        prompt asks for the number and how demonstrations end. Both are understood.
      instruction: takes the place of the text of `INSTRUCTIONS`.
    """
    if answer_format not in INSTRUCTIONS:
        raise InputError(
            f"answer_format is {answer_format!r}; "
            + nearest(answer_format, INSTRUCTIONS)
        )
    if instruction is None:
        instruction = INSTRUCTIONS[answer_format]
    rows = []
    source = local(path) or "openai/gsm8k"
    for i, record in enumerate(read(source, split, subset="main")):
        question, solution = text(record, "question"), text(record, "answer")
        answer = solution.rpartition("####")[2].strip()
        content = f"{question}\n\n{instruction}".strip()
        rows.append(
            Row(
                id=f"gsm8k/{split}/{i}",
                messages=({"role": "user", "content": content},),
                columns={"question": question, "answer": answer},
                demonstration=demonstration(solution, answer_format),
            )
        )
    return RowsTask("gsm8k", rows, judge)


def demonstration(solution: str, answer_format: str = "hash") -> str:
    r"""A human solution without the calculator's annotations, ending as asked for.

    >>> print(demonstration("48/2 = <<48/2=24>>24 clips.\n#### 24", "boxed"))
    48/2 = 24 clips.
    The answer is \boxed{24}.
    """
    steps, _, answer = _CALCULATION.sub("", solution).rpartition("####")
    end = f"#### {answer.strip()}"
    if answer_format == "boxed":
        end = rf"The answer is \boxed{{{answer.strip()}}}."
    return f"{steps.rstrip()}\n{end}"


def number(text: str) -> Decimal | None:
    r"""The number in a short answer: the first one, after the last ``=`` if there is.

    Understands thousands separators, currency, a minus sign and LaTeX around the
    number. A number that an operator follows is part of a formula, not an answer.

    >>> [number(t) for t in ("$1,234.50 in all", "-3", "5 + 3 = 8", "72.0", "1/2")]
    [Decimal('1234.50'), Decimal('-3'), Decimal('8'), Decimal('72.0'), None]
    """
    text = re.sub(r"\\[,! ]|\\(?=\$)", "", text.replace("{,}", ","))
    text = text.rpartition("=")[2]
    match = _NUMBER.search(text)
    if match is None or _FORMULA.match(text, match.end()):
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] else value


def judge(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
    r"""Reward 1 where the marked number equals the row's ``answer``, else 0.

    The completion's number is the one in its last mark that holds one (``####``,
    ``\boxed{}``, ``<answer>``, "answer is": see `extraction.final_answer`); numbers
    without a mark don't count. ``extra`` holds ``parsed`` and the number as ``answer``.
    Reward None where the row's own answer is not a number.

    >>> prompts = Prompts(("q",), ((),), ({"answer": "1,072"},), (None,))
    >>> judge(prompts, ["So the answer is $1072."])[0].reward
    1.0
    """
    return [
        _verdict(str(row["answer"]), completion)
        for row, completion in zip(prompts.columns, completions, strict=True)
    ]


def _verdict(answer: str, completion: str) -> Verdict:
    gold = number(answer.rpartition("####")[2])
    if gold is None:
        return Verdict(
            None, extra={"error": f"the row's answer {answer!r} is no number"}
        )
    marked = final_answer(completion, accept=lambda text: number(text) is not None)
    found = None if marked is None else number(marked)
    if found is None:
        feedback = "There is no final answer that can be read as a number."
        return Verdict(0.0, False, feedback, {"parsed": False, "answer": None})
    shown = format(found.normalize(), "f")
    return Verdict(
        float(found == gold), found == gold, None, {"parsed": True, "answer": shown}
    )
