"""Mathematics with answers in LaTeX, compared by `math-verify`."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jaxrl_post.errors import InputError
from jaxrl_post.tasks import rows
from jaxrl_post.tasks.base import Task
from jaxrl_post.tasks.extraction import last_boxed
from jaxrl_post.types import Prompts, Verdict

INSTRUCTION = r"Reason step by step. Put the final answer in \boxed{}."
"""What is asked for below the question."""


def load(
    split: str = "train",
    *,
    source: str = "DigitalLearningGmbH/MATH-lighteval",
    subset: str | None = None,
    prompt: str = "problem",
    answer: str = "solution",
    demonstration: str | None = None,
    instruction: str = INSTRUCTION,
    system: str | None = None,
    data_source: str | Sequence[str] | None = None,
    strict: bool = True,
    after_thinking: bool = False,
) -> Task:
    r"""Opens a data set of mathematical problems; by default MATH (arXiv 2103.03874).

    Args:
      split: of the data set.
      source: file, folder or Hub id, see `rows.load`.
      subset: configuration of the Hub's data set.
      prompt: column of the problem.
      answer: column of the answer, or of a solution that ends in ``\boxed{answer}``.
      demonstration: column of a worked solution, see `rows.load`.
      instruction: stands below every problem that is a text.
      system: system prompt, None for none.
      data_source: keep only rows of this source, or of these, see `rows.load`.
      strict, after_thinking: see `MathJudge`.
    """
    task = rows.load(
        split,
        source=source,
        subset=subset,
        prompt=prompt,
        answer=answer,
        demonstration=demonstration,
        instruction=instruction,
        system=system,
        data_source=data_source,
    )
    task.name = "math"
    task.judge = MathJudge(strict, after_thinking=after_thinking)
    return task


@dataclass(frozen=True)
class MathJudge:
    r"""Reward 1 where the completion's answer equals the row's ``answer``, else 0.

    The completion's answer is what its last ``\boxed{}`` holds (math-verify alone would
    take several boxes for a set); without a box, what math-verify finds in the text.
    Equality is math-verify's: symbolic, then numeric to six digits. The row's answer
    may be bare LaTeX, LaTeX between dollars, or a text with a box.

    Reward None where the row's answer cannot be parsed: it says nothing about the
    completion. An expression that takes math-verify more than `seconds` to parse or to
    compare is wrong. ``extra`` holds ``parsed`` and the answer's text as ``answer``.

    Attributes:
      strict: whether the names of variables matter (``z = 3`` is not ``x = 3``).
      seconds: whole seconds for each parse and each comparison; 0: no limit. The limit
        is an alarm signal, so it holds in a process's main thread only (the judge
        pool's workers judge there); in other threads there is none.
      after_thinking: judge only what follows the first ``</think>``, up to a second
        one; a completion without any gets 0. As LUFFY's verifier (arXiv 2504.14945).
    """

    strict: bool = True
    seconds: int = 5
    after_thinking: bool = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError(
                "The math judge needs math-verify: pip install 'jaxrl_post[tasks]'."
            )

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return [
            self._verdict(str(row["answer"]), completion)
            for row, completion in zip(prompts.columns, completions, strict=True)
        ]

    def _verdict(self, answer: str, completion: str) -> Verdict:
        math_verify = _library()
        main = threading.current_thread() is threading.main_thread()
        seconds = (self.seconds or None) if main else None
        gold = _parse_gold(answer, seconds)
        if not gold:
            return Verdict(
                None, extra={"error": f"the row's answer {answer!r} is not mathematics"}
            )
        if self.after_thinking:
            _, *parts = completion.split("</think>")
            if not parts:
                feedback = "There is no </think>, so no answer that follows it."
                return Verdict(0.0, False, feedback, {"parsed": False, "answer": None})
            completion = parts[0]
        boxed = last_boxed(completion)
        text = completion if boxed is None else _box(boxed)
        found = math_verify.parse(text, parsing_timeout=seconds)
        if not found:
            feedback = r"There is no final answer in \boxed{} that can be read."
            return Verdict(0.0, False, feedback, {"parsed": False, "answer": None})
        right = boxed is not None and boxed.strip() == answer.strip()
        right = right or math_verify.verify(
            list(gold), found, strict=self.strict, timeout_seconds=seconds
        )
        shown = str(found[-1] if boxed is None else boxed).strip()
        return Verdict(float(right), right, None, {"parsed": True, "answer": shown})


@lru_cache(maxsize=4096)
def _parse_gold(answer: str, seconds: int | None) -> tuple[Any, ...]:
    """A row's answer as math-verify reads it; once per group of completions."""
    boxed = last_boxed(answer)
    # Bare LaTeX is recognised inside delimiters only.
    text = answer if boxed is None and "$" in answer.replace(r"\$", "") else None
    if text is None:
        text = _box(answer if boxed is None else boxed)
    return tuple(
        _library().parse(text, fallback_mode="no_fallback", parsing_timeout=seconds)
    )


@lru_cache
def _library() -> Any:
    import math_verify

    # It warns of each time-out with the whole completion; here they are verdicts.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _box(latex: str) -> str:
    """A box that math-verify can read: without dollar signs and negative spaces."""
    return r"\boxed{" + latex.replace(r"\$", "").replace(r"\!", "") + "}"
