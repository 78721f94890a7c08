"""SciKnowEval: multiple-choice science questions (arXiv 2406.09098).

Rows and split are those of SDPO's experiments (arXiv 2601.20802): the reasoning level
(L3) of four domains, 10 % of each domain held out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.tasks import sources
from jaxrl_post.tasks.base import Row, RowsTask
from jaxrl_post.tasks.extraction import last_boxed, last_tagged
from jaxrl_post.tasks.sources import column, local, read
from jaxrl_post.types import Prompts, Verdict

DOMAINS = {
    "biology": "Biology",
    "chemistry": "Chemistry",
    "materials": "Material",
    "physics": "Physics",
}
"""Our names of the domains, and the Hub's."""

_TYPES = ("mcq-4-choices", "mcq-2-choices")
_TASK = "Pick the one option that answers the question correctly."
SYSTEM = {
    "tags": (
        f"{_TASK} First write your reasoning between <reasoning> and </reasoning>, "
        "then the letter of the option, and nothing else, between <answer> and "
        "</answer>. "
        "If the second option is right, end with <answer>B</answer>"
    ),
    "boxed": (
        f"{_TASK} Reason step by step and end with the letter of the option in a box. "
        r"If the second option is right, end with \boxed{B}"
    ),
}
"""System prompts by answer format."""


def load(
    split: str = "train",
    *,
    domain: str | Sequence[str] | None = None,
    path: str | Sequence[str] | None = None,
    answer_format: str = "tags",
    system: str | None = None,
) -> RowsTask:
    """Opens SciKnowEval.

    Args:
      split: ``"train"`` or ``"test"``.
      domain: one of `DOMAINS`, or several; None: all four.
      path: a folder with ``<domain>/train.jsonl`` and ``<domain>/test.jsonl`` (columns
        ``system``, ``prompt``, ``answer``, ``idx``); several: the first that exists;
        None, or none of them: ``hicai-zju/SciKnowEval`` from the Hub.
      answer_format: ``"tags"`` (``<answer>B</answer>``, as in SDPO) or ``"boxed"``.
      system: takes the place of the system prompt. By default it is the row's own where
        it has one and the format is ``"tags"``, else that of `SYSTEM`.
    """
    if split not in ("train", "test"):
        raise InputError(f"SciKnowEval has the splits train and test, not {split!r}.")
    judge = MultipleChoice(answer_format)
    names = [domain] if isinstance(domain, str) else list(domain or DOMAINS)
    for name in names:
        if name not in DOMAINS:
            raise InputError(f"Unknown domain {name!r}; {nearest(name, DOMAINS)}")
    folder = local(path)
    hub = [] if folder else read("hicai-zju/SciKnowEval", "test")
    rows = []
    for name in names:
        if folder:
            records = read(str(Path(folder) / name), split)
        else:
            records = hub_records(hub, name, split)
        for record in records:
            text = system
            if text is None and answer_format == "tags":
                text = record.get("system")
            text = SYSTEM[answer_format] if text is None else text
            user = {"role": "user", "content": sources.text(record, "prompt")}
            rows.append(
                Row(
                    id=f"sciknoweval/{name}/{column(record, 'idx')}",
                    messages=({"role": "system", "content": text}, user),
                    columns={"answer": column(record, "answer"), "domain": name},
                )
            )
    return RowsTask("sciknoweval", rows, judge)


def hub_records(
    records: Sequence[Mapping[str, Any]], domain: str, split: str
) -> list[dict[str, Any]]:
    """The rows of one domain and split, from the Hub's records.

    Kept are multiple-choice questions with two or four options of level L3; ``idx``
    counts them from 0. The split is that of ``datasets.Dataset.train_test_split`` with
    ``test_size=0.1, seed=42``.
    """
    kept = [
        record
        for record in records
        if record["domain"] == DOMAINS[domain]
        and record["type"] in _TYPES
        and record["details"]["level"] == "L3"
    ]
    order = np.random.default_rng(42).permutation(len(kept))
    held_out = math.ceil(0.1 * len(kept))
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return [
        {
            "idx": int(i),
            "prompt": _question(kept[i]["question"], kept[i]["choices"]),
            "answer": kept[i]["answerKey"],
        }
        for i in chosen
    ]


def _question(question: str, choices: Mapping[str, Sequence[str]]) -> str:
    pairs = zip(choices["label"], choices["text"], strict=True)
    options = "\n".join(f"{label}: {text}" for label, text in pairs)
    return f"{question}\n\n{options}\nPlease reason step by step."


@dataclass(frozen=True)
class MultipleChoice:
    r"""Reward 1 where the chosen letter is exactly the row's ``answer``, else 0.

    ``"tags"``: what follows the last ``<answer>`` up to the next ``</answer>``; without
    the tag the whole completion, so that a bare letter counts (as in SDPO).
    ``"boxed"``: what the last ``\boxed{}`` holds. No partial credit and none for the
    format.

    ``extra`` holds the letter as ``answer`` (None if it isn't one of `letters`),
    ``parsed`` and ``incorrect_format``, which is true where the completion does not
    *end* with a letter in the form asked for. Differs from SDPO's code in that: there
    the metric of this name holds its opposite.

    >>> prompts = Prompts(("q",), ((),), ({"answer": "B"},), (None,))
    >>> verdict = MultipleChoice()(prompts, ["<answer>B</answer>, I think"])[0]
    >>> verdict.reward, verdict.extra["answer"], verdict.extra["incorrect_format"]
    (1.0, 'B', True)
    """

    answer_format: str = "tags"
    letters: str = "ABCD"

    def __post_init__(self) -> None:
        if self.answer_format not in SYSTEM:
            raise InputError(
                f"answer_format is {self.answer_format!r}; "
                + nearest(self.answer_format, SYSTEM)
            )

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return [
            self._verdict(row["answer"], completion)
            for row, completion in zip(prompts.columns, completions, strict=True)
        ]

    def _verdict(self, answer: str, completion: str) -> Verdict:
        choice = rf"\s*[{self.letters}]\s*"
        if self.answer_format == "tags":
            found = last_tagged(completion)
            form = rf"<answer>{choice}</answer>$"
        else:
            found = (last_boxed(completion) or "").strip()
            form = rf"\\boxed\{{{choice}\}}[\s.$]*$"
        right = found == answer
        parsed = len(found) == 1 and found in self.letters
        extra = {
            "answer": found if parsed else None,
            "parsed": parsed,
            "incorrect_format": re.search(form, completion) is None,
        }
        return Verdict(float(right), right, None, extra)
