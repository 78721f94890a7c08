"""Programs, judged by tests, with what went wrong as feedback.

Programs run in `isolation.sandbox`, one test at a time. They get a test's input and
nothing else: what is expected never enters the sandbox, and is compared outside.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxrl_post.errors import InputError, shown
from jaxrl_post.isolation import sandbox
from jaxrl_post.tasks import livecodebench
from jaxrl_post.tasks.base import Row, RowsTask, epoch_order
from jaxrl_post.tasks.jsonvalues import parsed, same
from jaxrl_post.tasks.sources import column, read, text
from jaxrl_post.types import Prompts, Verdict

INSTRUCTION = (
    "Solve this programming problem in Python 3, with the standard library alone. Each "
    "test may take {seconds} seconds. Think first; then write the whole program in one "
    "code block that begins with ```python and ends with ```."
)
"""Stands above every problem."""

FORMS = {
    "stdin": "The program reads standard input and writes standard output.",
    "function": "Complete this code:\n```python\n{starter}\n```",
}
"""Stands below a problem, by what its tests do."""

NO_CODE = "There is no code block, so there is nothing to run."
CUT_OFF = "The answer ends within a code block; it must be shorter."


def load(
    split: str = "train",
    *,
    source: str = "livecodebench/code_generation_lite",
    revision: str | None = None,
    start: str | None = None,
    end: str | None = None,
    tests: Literal["half", "all"] = "half",
    reward: Literal["all", "share"] = "all",
    block: Literal["last", "longest"] = "last",
    sandbox: str = "required",
    seconds: float = 6.0,
    memory: int = 2**30,
    total_seconds: float = 60.0,
    instruction: str = INSTRUCTION,
) -> RowsTask:
    """Opens programming problems.

    A row has the columns of LiveCodeBench, or ``prompt``, ``tests`` and, as it likes,
    ``id``, ``starter_code`` and ``function``: the name of a function to be written, in
    a class ``Solution`` or not. A test has ``input`` and ``output``: texts, or with
    ``function`` a list of arguments and a value.

    Args:
      split: ``"train"``, or what is held out from it. LiveCodeBench's one split, and a
        file, are all of both.
      source: a file, a folder with a file per split, or a Hub id.
      revision: of the Hub's data set.
      start, end: keep problems with ``contest_date`` from one day (``"2025-02-01"``) up
        to, but not on, the other.
      tests: ``"half"``: training is judged by a random half of each problem's tests,
        at least one, everything else by the other; a problem with one test is in
        training only. ``"all"``: by all of them, where the splits' problems differ
        (and in SDPO's evaluation).
      reward: ``"all"``: 1 for a program that passes all tests, else 0; ``"share"``: of
        tests passed. Success is always all.
      block: which code block of an answer is the program.
      sandbox: a level of `isolation.sandbox`. Anything below ``"required"`` lets
        programs do more than compute: docs/sandbox.md says what.
      seconds: for a test, start of the interpreter included.
      memory: bytes of address space.
      total_seconds: for all tests of an answer; must be below ``judge_timeout``.
      instruction: stands above every problem; ``{seconds}`` is filled in.

    Raises:
      InputError: rows that have no such columns, a sandbox that does not work here.
    """
    judge = CodeJudge(reward, block, sandbox, seconds, memory, total_seconds)
    rows = []
    hub = not Path(source).expanduser().exists()
    # The Hub's copy has the split "test" alone.
    for i, record in enumerate(
        read(source, "test" if hub else split, revision=revision)
    ):
        if not _between(record, start, end):
            continue
        if "private_test_cases" in record:
            problem = livecodebench.problem(record)
        else:
            problem = _own(record, i)
        chosen = list(problem["tests"])
        if tests == "half":
            chosen = half(problem["id"], chosen, split == "train")
        if chosen:
            content = _prompt(problem, instruction.replace("{seconds}", f"{seconds:g}"))
            rows.append(
                Row(
                    id=f"code/{problem['id']}",
                    messages=({"role": "user", "content": content},),
                    columns={"tests": chosen, "function": problem["function"]},
                )
            )
    return RowsTask("code", rows, judge)


def half(name: str, tests: Sequence[Any], first: bool) -> list[Any]:
    """The half of a problem's tests that is trained on, or the other one.

    Which it is depends on the problem's name and the number of its tests alone.

    >>> sorted(half("p", [1, 2, 3], True) + half("p", [1, 2, 3], False))
    [1, 2, 3]
    """
    order = epoch_order(len(tests), 0, zlib.crc32(name.encode()))
    most = max(1, len(tests) // 2)
    chosen = order[:most] if first else order[most:]
    return [tests[i] for i in sorted(chosen)]


def program_in(
    completion: str, block: Literal["last", "longest"] = "last"
) -> tuple[str | None, bool]:
    r"""The program of an answer, or None, and whether a code block was begun.

    A block stands between lines that begin with three backticks.

    >>> program_in("So:\n```python\nprint(1)\n```\nDone.")
    ('print(1)\n', True)
    >>> program_in("```\nprint(1"), program_in("print(1)")
    ((None, True), (None, False))
    """
    blocks: list[str] = []
    inside: list[str] | None = None
    for line in completion.splitlines(keepends=True):
        if not line.lstrip().startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside = []
        else:
            blocks.append("".join(inside))
            inside = None
    begun = bool(blocks) or inside is not None
    if inside is not None and block == "last" or not blocks:
        return None, begun
    return (blocks[-1] if block == "last" else max(blocks, key=len)), begun


@dataclass(frozen=True)
class _Failure:
    """A test that was not passed: a wrong answer, which is `found`, or an error."""

    test: Mapping[str, Any]
    message: str
    found: str | None = None


@dataclass(frozen=True)
class CodeJudge:
    """Runs programs and compares; the feedback is what SDPO shows the teacher.

    Tests are taken from the shortest input on. With reward ``"all"`` judging ends at
    the first error, or at the second wrong answer. The feedback is the first error, or
    up to two wrong answers with input, output and what was expected, and None where all
    tests pass. Output is compared as words: how they are spaced does not matter.
    Differs from SDPO's code, which compares line breaks and blanks as blanks, and runs
    programs without a sandbox. Values are compared as JSON (`jsonvalues.same`).

    ``extra`` holds ``parsed`` (there was a program), ``passed`` and ``tests``, the
    number of them that were run.
    """

    reward: Literal["all", "share"] = "all"
    block: Literal["last", "longest"] = "last"
    sandbox: str = "required"
    seconds: float = 6.0
    memory: int = 2**30
    total_seconds: float = 60.0

    def __post_init__(self) -> None:
        if problem := sandbox.unavailable(self.sandbox):
            raise InputError(problem)
        for name in ("seconds", "memory", "total_seconds"):
            if (value := getattr(self, name)) <= 0:
                raise InputError(f"{name}={value}: expected a number above 0.")

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
        return [
            self._verdict(row["tests"], row["function"], completion)
            for row, completion in zip(prompts.columns, completions, strict=True)
        ]

    def _verdict(
        self, tests: Sequence[Mapping[str, Any]], function: str | None, completion: str
    ) -> Verdict:
        program, begun = program_in(completion, self.block)
        if program is None:
            told = CUT_OFF if begun else NO_CODE
            return Verdict(0.0, False, told, {"parsed": False})
        ordered = sorted(tests, key=lambda test: len(_text(test["input"])))
        failures: list[_Failure] = []
        run, end = 0, time.monotonic() + self.total_seconds
        for test in ordered:
            failure = self._test(program, function, test, end - time.monotonic())
            run += 1
            if failure is not None:
                failures.append(failure)
            error = failure is not None and failure.found is None
            if self.reward == "all" and (error or len(failures) == 2):
                break
        passed = run - len(failures)
        share = passed / len(ordered)
        right = share == 1.0
        return Verdict(
            float(right) if self.reward == "all" else share,
            right,
            _feedback(failures),
            {"parsed": True, "passed": passed, "tests": run},
        )

    def _test(
        self, program: str, function: str | None, test: Mapping[str, Any], left: float
    ) -> _Failure | None:
        if left <= 0:
            return _Failure(test, "Time limit exceeded, by all tests together")
        limits = sandbox.Limits(min(self.seconds, left), self.memory)
        given, expected = test["input"], test["output"]
        result = sandbox.run(
            program,
            stdin=given if function is None else "",
            call=None if function is None else (function, given),
            level=self.sandbox,
            limits=limits,
        )
        if result.stopped is not None:
            what = "Time" if result.stopped == "time" else "Output"
            return _Failure(test, f"{what} limit exceeded")
        if result.code != 0:
            return _Failure(test, _error(result))
        if function is None:
            right = result.output.split() == expected.split()
        else:
            try:
                right = same(parsed(result.output), expected)
            except ValueError:
                return _Failure(test, "The function did not return a JSON value")
        return None if right else _Failure(test, "Wrong answer", result.output)


def _error(result: sandbox.Result) -> str:
    """An error's last lines: its message and where it was raised."""
    if "MemoryError" in result.error:
        return "Memory limit exceeded"
    lines = result.error.strip().splitlines()[-6:]
    told = "\n".join(lines)[-600:] or f"exit code {result.code}"
    return f"Runtime error:\n{told}"


def _feedback(failures: Sequence[_Failure], most: int = 2000) -> str | None:
    errors = [failure for failure in failures if failure.found is None]
    parts = []
    for failure in errors[:1] or failures[:2]:
        parts.append(f"{failure.message}\nInput:\n{_trimmed(failure.test['input'])}")
        if failure.found is not None:
            parts.append(f"Output:\n{_trimmed(failure.found)}")
            parts.append(f"Expected:\n{_trimmed(failure.test['output'])}")
    return "\n".join(parts)[:most] or None


def _trimmed(value: Any, characters: int = 250, lines: int = 8) -> str:
    r"""The beginning of a value.

    >>> _trimmed("1\n2\n3", lines=2)
    '1\n2\n...'
    """
    whole = _text(value).rstrip()
    kept = "\n".join(whole.split("\n")[:lines])[:characters]
    return kept if kept == whole else f"{kept}\n..."


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _between(record: Mapping[str, Any], start: str | None, end: str | None) -> bool:
    if start is None and end is None:
        return True
    day = str(column(record, "contest_date"))[:10]
    return (start or day) <= day and (end is None or day < end)


def _own(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row of our own layout, looked at."""
    function, tests = record.get("function"), column(record, "tests")
    kind: Any = str if function is None else list
    if not isinstance(tests, list) or not tests:
        raise InputError(f"Column 'tests' must be a list of tests, got {shown(tests)}.")
    for test in tests:
        if not isinstance(column(test, "input"), kind):
            raise InputError(
                f"The input of a test is {shown(test['input'])}; expected a text, or "
                "with 'function' a list of arguments."
            )
        if function is None and not isinstance(column(test, "output"), str):
            raise InputError(
                f"The output of a test is {shown(test['output'])}: no text."
            )
        column(test, "output")
    return {
        "id": str(record.get("id", number)),
        "prompt": text(record, "prompt"),
        "starter_code": record.get("starter_code") or "",
        "function": function,
        "tests": tests,
    }


def _prompt(problem: Mapping[str, Any], instruction: str) -> str:
    form = FORMS["stdin"]
    if name := problem["function"]:
        starter = problem["starter_code"] or f"def {name}(...):"
        form = FORMS["function"].replace("{starter}", starter.rstrip())
    return f"{instruction}\n\n{problem['prompt'].strip()}\n\n{form}"
