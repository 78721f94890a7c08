"""Tool use: the calls that answer a request (ToolAlpaca, arXiv 2306.05301).

Rows are in the layout of SDPO's experiments (arXiv 2601.20802): a prompt that documents
the tools and asks for lines ``Action:`` and ``Action Input:``, and as the answer a JSON
list of ``{"Action": name, "Action_Input": JSON text}``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxrl_post.errors import InputError, nearest, shown
from jaxrl_post.tasks.base import Row, RowsTask
from jaxrl_post.tasks.jsonvalues import parsed, same
from jaxrl_post.tasks.sources import column, read, text
from jaxrl_post.types import Prompts, Verdict

MODES = ("calls", "reference")
FEEDBACK = ("hints", "answer", "none")

_ACTION = re.compile(r"^[ \t]*Action[ \t]*:(.*)$", re.MULTILINE)
_INPUT = re.compile(r"^[ \t]*Action Input[ \t]*:\s*", re.MULTILINE)
_TOOL = re.compile(r"^(\S+?):.*\nParameters: (?=\{)", re.MULTILINE)
_DECODER = json.JSONDecoder()

Call = tuple[str, dict[str, Any]]
"""The name of a tool, and its input: a JSON object."""


def load(
    split: str = "train",
    *,
    source: str,
    mode: Literal["calls", "reference"] = "calls",
    feedback: Literal["hints", "answer", "none"] = "hints",
    system: str | None = None,
) -> RowsTask:
    """Opens a table of requests.

    Args:
      split: of a folder or data set.
      source: file, folder or Hub id, with the columns ``prompt``, ``answer`` and, as it
        likes, ``idx`` and ``system``.
      mode, feedback: see `ToolUse`.
      system: system prompt, in the place of the rows' own.
    """
    rows = []
    for i, record in enumerate(read(source, split)):
        prompt, number = text(record, "prompt"), record.get("idx", i)
        expected_calls(text(record, "answer"))  # better now than in a run
        messages = [{"role": "user", "content": prompt}]
        if said := system or record.get("system"):
            messages.insert(0, {"role": "system", "content": str(said)})
        rows.append(
            Row(
                id=f"tooluse/{split}/{number}",
                messages=tuple(messages),
                columns={"answer": column(record, "answer")},
            )
        )
    return RowsTask("tooluse", rows, ToolUse(mode, feedback))


def expected_calls(answer: str) -> list[Call]:
    """The calls of a row's answer.

    Raises:
      InputError: it is not in the layout above.
    """
    try:
        return [
            (str(call["Action"]), dict(parsed(call["Action_Input"])))
            for call in parsed(answer)
        ]
    except (ValueError, TypeError, KeyError):
        raise InputError(
            'An answer must be a JSON list of {"Action": name, "Action_Input": JSON '
            f"text}}, got {shown(answer)}."
        ) from None


def calls_in(completion: str) -> tuple[list[Call], list[str]]:
    r"""The calls of a completion, and what is wrong with their form.

    An input is the JSON object that begins behind ``Action Input:``: braces within it,
    and within its texts, are its own.

    >>> calls_in('Action: add\nAction Input: {"a": {"b": "}"}} and so on')
    ([('add', {'a': {'b': '}'}})], [])
    >>> calls_in("Action: add\nAction Input: a=1")[1]
    ['Call 1 (add): the Action Input is not a JSON object.']
    """
    actions = list(_ACTION.finditer(completion))
    inputs = list(_INPUT.finditer(completion))
    starts = [match.start() for match in actions]
    calls: list[Call] = []
    problems = [] if actions else ["There is no line that begins with Action:"]
    for number, action in enumerate(actions, start=1):
        name = action[1].strip()
        end = starts[number] if number < len(starts) else len(completion)
        where = f"Call {number} ({name[:60]})"
        own = [m for m in inputs if action.end() <= m.start() < end]
        inputs = inputs[len(own) :] if own else inputs
        if len(own) != 1:
            problems.append(f"{where}: there must be one Action Input after it.")
            continue
        try:
            value, _ = _DECODER.raw_decode(completion, own[0].end())
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            calls.append((name, value))
        else:
            problems.append(f"{where}: the Action Input is not a JSON object.")
    return calls, problems


def reference_score(completion: str, expected: Sequence[Call]) -> bool:
    r"""SDPO's own verifier: the tools' names as a multiset, all inputs merged into one.

    An input is the shortest text in braces, so that one with an object inside is none.

    >>> reference_score('Action: f\nAction Input: {"a": 1}', [("f", {"a": 1})])
    True
    >>> nested = 'Action: f\nAction Input: {"a": {"b": 1}}'
    >>> reference_score(nested, [("f", {"a": {"b": 1}})])
    False
    """
    names = Counter(re.findall(r"Action:\s*(\w+)", completion))
    merged: dict[str, Any] = {}
    for found in re.findall(r"Action Input:\s*(\{.*?\})", completion, re.DOTALL):
        try:
            merged.update(parsed(found))
        except (ValueError, TypeError):
            return False
    wanted: dict[str, Any] = {}
    for _, value in expected:
        wanted.update(value)
    return names == Counter(name for name, _ in expected) and merged == wanted


@dataclass(frozen=True)
class ToolUse:
    """Reward 1 where the calls are those of the row's ``answer``, in any order, else 0.

    ``mode="reference"`` judges as SDPO's code does (`reference_score`): it merges the
    inputs of all calls, cannot read inputs with objects inside, and ignores what is no
    word in a tool's name. The default compares call by call.

    The feedback is about what the completion itself holds: its form, tools and
    parameters that the prompt does not document, and which calls are not asked for.
    ``feedback="answer"`` shows the calls that were expected too, as SDPO's code does:
    a self-teacher that sees them learns to copy. ``"none"``: there is none.

    ``extra`` holds ``parsed`` and the calls' text as ``answer``.

    >>> answer = '[{"Action": "f", "Action_Input": "{}"}]'
    >>> prompts = Prompts(("q",), ((),), ({"answer": answer},), (None,))
    >>> ToolUse()(prompts, ["Action: f\\nAction Input: {}"])[0].reward
    1.0
    """

    mode: str = "calls"
    feedback: str = "hints"

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("feedback", FEEDBACK)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} is {value!r}; {nearest(str(value), known)}")

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        rows = zip(prompts.messages, prompts.columns, completions, strict=True)
        return [
            self._verdict(messages[-1]["content"] if messages else "", row, completion)
            for messages, row, completion in rows
        ]

    def _verdict(self, prompt: str, row: Mapping[str, Any], completion: str) -> Verdict:
        expected = expected_calls(row["answer"])
        calls, problems = calls_in(completion)
        missing, surplus = _difference(expected, calls)
        right = not (problems or missing or surplus)
        if self.mode == "reference":
            right = reference_score(completion, expected)
        told = None
        if not right and self.feedback != "none":
            told = "\n".join(problems + _hints(prompt, calls, missing, surplus))
            if self.feedback == "answer":
                told += f"\nExpected:\n{_written(expected)}"
        extra = {"parsed": not problems, "answer": _written(calls) or None}
        return Verdict(float(right), right, told or None, extra)


def _difference(
    expected: Sequence[Call], calls: Sequence[Call]
) -> tuple[list[Call], list[int]]:
    """Expected calls that were not made, and which calls were not expected."""
    missing, surplus = list(expected), []
    for i, (name, value) in enumerate(calls):
        for j, (wanted, its) in enumerate(missing):
            if name == wanted and same(value, its):
                del missing[j]
                break
        else:
            surplus.append(i)
    return missing, surplus


def _hints(
    prompt: str, calls: Sequence[Call], missing: Sequence[Call], surplus: Sequence[int]
) -> list[str]:
    """What is wrong with a completion's calls, in the completion's own words."""
    documented = _documented(prompt)
    hints = []
    for i in surplus:
        name, value = calls[i]
        where = f"Call {i + 1} ({name[:60]})"
        unknown = sorted(value.keys() - documented.get(name, value.keys()))
        if documented and name not in documented:
            hints.append(f"{where}: there is no such tool.")
        elif unknown:
            hints.append(f"{where}: it has no parameter {unknown[0][:60]!r}.")
        elif any(name == wanted for wanted, _ in missing):
            hints.append(f"{where}: the input is not what was asked for.")
        else:
            hints.append(f"{where}: this call is not what was asked for.")
    if missing and not surplus:
        hints.append("What was asked for needs another call.")
    return hints


def _documented(prompt: str) -> dict[str, set[str]]:
    """The tools that a prompt documents, with their parameters."""
    found = {}
    for match in _TOOL.finditer(prompt):
        try:
            value, _ = _DECODER.raw_decode(prompt, match.end())
        except (ValueError, RecursionError):
            continue
        found[match[1]] = set(value)
    return found


def _written(calls: Sequence[Call]) -> str:
    """Calls in one form, however they were spaced and ordered."""
    return "\n".join(
        sorted(f"{name} {json.dumps(value, sort_keys=True)}" for name, value in calls)
    )
