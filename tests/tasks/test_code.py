"""Programs judged by tests: what counts, what is told, and which tests are used."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.isolation import sandbox
from jaxrl_post.tasks import code, livecodebench
from jaxrl_post.types import Prompts, Verdict

# Which level does not matter here; the strongest that works is taken.
LEVEL = next((x for x in sandbox.LEVELS if not sandbox.unavailable(x)), None)
runs = pytest.mark.skipif(LEVEL is None, reason=str(sandbox.unavailable("limits")))

SUMS = [
    {"input": "1 2\n", "output": "3\n"},
    {"input": "10 -4\n", "output": "6\n"},
    {"input": "1000 1000000\n", "output": "1001000\n"},
]
ADDS = [
    {"input": [1, 2], "output": 3},
    {"input": [10, -4], "output": 6},
    {"input": [100, -93], "output": 7},
]
RIGHT = "a, b = map(int, input().split())\nprint(a + b)"


def judge(program, tests=SUMS, function=None, fenced=True, **options) -> Verdict:
    answer = f"I think:\n```python\n{program}\n```\n" if fenced else program
    columns = {"tests": tests, "function": function}
    prompts = Prompts(("q",), ((),), (columns,), (None,))
    options = {"sandbox": LEVEL, "seconds": 30.0, **options}  # on a busy machine
    return code.CodeJudge(**options)(prompts, [answer])[0]


@runs
def test_a_right_program():
    verdict = judge(RIGHT)
    assert (verdict.reward, verdict.success, verdict.feedback) == (1.0, True, None)
    assert verdict.extra == {"parsed": True, "passed": 3, "tests": 3}
    assert judge(RIGHT.replace("print(", "print('', ")).success  # spacing
    assert not judge(RIGHT.replace("print(", "print(1, ")).success


@runs
@pytest.mark.parametrize("holder", ["", "class Solution:\n    "])
def test_a_right_function(holder):
    first = "self, " if holder else ""
    program = f"{holder}def add({first}a, b): return a + b"
    assert judge(program, ADDS, "add").success
    wrong = judge(program.replace("a + b", "str(a + b)"), ADDS, "add")
    assert wrong.feedback.startswith('Wrong answer\nInput:\n[1, 2]\nOutput:\n"3"\nExp')


@runs
def test_two_failing_cases_with_the_shortest_inputs():
    verdict = judge("a, b = map(int, input().split())\nprint(a - b)", SUMS[::-1])
    assert verdict.reward == 0.0 and not verdict.success
    assert verdict.feedback == (
        "Wrong answer\nInput:\n1 2\nOutput:\n-1\nExpected:\n3\n"
        "Wrong answer\nInput:\n10 -4\nOutput:\n14\nExpected:\n6"
    )
    assert verdict.extra == {"parsed": True, "passed": 0, "tests": 2}


@runs
def test_the_first_error_goes_before_wrong_answers():
    program = "a = input().split()\nprint(a[0] if a[0] == '1' else 1 / 0)"
    verdict = judge(program)
    assert verdict.feedback.startswith("Runtime error:\n")
    assert "ZeroDivisionError: division by zero\nInput:\n10 -4" in verdict.feedback
    assert "Expected" not in verdict.feedback


@runs
@pytest.mark.parametrize(
    ("program", "function", "told"),
    [
        ("while True: pass", None, "Time limit exceeded\nInput:\n1 2"),
        ("while True: print('x' * 9999)", None, "Output limit exceeded"),
        ("x = bytearray(2**29)", None, "Memory limit exceeded"),
        ("print(", None, "SyntaxError"),
        ("import sys; sys.exit(3)", None, "Runtime error:\nexit code 3"),
        ("def sub(a, b): return a", "add", "there is no function 'add'"),
        ("def add(a, b): return {1, 2}", "add", "Object of type set is not JSON"),
        ("import os\ndef add(a, b): os._exit(0)", "add", "did not return a JSON value"),
        ("def add(a, b): return float('nan')", "add", "Wrong answer"),
        ("def add(a, b): return True", "add", "Wrong answer"),
    ],
)
def test_what_is_told(program, function, told):
    tests = SUMS if function is None else [{"input": [1, 0], "output": 1}]
    seconds = 1.5 if told.startswith("Time") else 30.0
    verdict = judge(program, tests, function, seconds=seconds, memory=2**28)
    assert verdict.reward == 0.0 and told in verdict.feedback


@runs
def test_answers_without_a_program():
    verdict = judge(RIGHT, fenced=False)
    assert (verdict.reward, verdict.feedback) == (0.0, code.NO_CODE)
    assert verdict.extra == {"parsed": False}
    cut = judge(f"```python\n{RIGHT}", fenced=False)
    assert cut.feedback == code.CUT_OFF


@runs
def test_reward_as_a_share():
    program = "a, b = map(int, input().split())\nprint(a + b if b > 0 else 0)"
    assert judge(program).reward == 0.0
    shared = judge(program, reward="share")
    assert shared.reward == pytest.approx(2 / 3) and shared.success is False
    assert shared.extra == {"parsed": True, "passed": 2, "tests": 3}
    assert shared.feedback.count("Expected") == 1


@runs
def test_all_tests_together_have_a_limit():
    program = "import time; time.sleep(0.7)\n" + RIGHT
    verdict = judge(program, total_seconds=1.2)
    assert "Time limit exceeded" in verdict.feedback and not verdict.success


@runs
def test_long_cases_are_trimmed():
    tests = [{"input": "1\n" * 50, "output": "x" * 999}] * 2
    feedback = judge("print('y\\n' * 30)", tests).feedback
    assert feedback.startswith("Wrong answer\nInput:\n" + "1\n" * 8 + "...\nOutput:\n")
    assert "x" * 250 + "\n..." in feedback and "x" * 251 not in feedback
    assert len(judge("raise ValueError('z' * 9999)", tests).feedback) <= 2000


@runs
def test_what_is_expected_never_enters_the_sandbox(monkeypatch):
    """Not in the job, nor in what is read."""
    seen = []
    monkeypatch.setattr(
        sandbox,
        "_sealed",
        lambda content, real=sandbox._sealed: seen.append(content) or real(content),
    )
    tests = [{"input": "1 2", "output": "a-very-special-answer"}]
    assert not judge(RIGHT, tests).success
    assert judge("def f(a): return a", [{"input": ["in"], "output": "in"}], "f").success
    assert len(seen) == 4 and b"1 2" in seen[1]
    assert not any(b"special" in content for content in seen)


def test_halves_are_apart_and_do_not_depend_on_other_rows():
    for count in range(1, 12):
        names = list(range(count))
        train, held = code.half("p", names, True), code.half("p", names, False)
        assert sorted(train + held) == names and len(train) == max(1, count // 2)
    halves = {tuple(code.half(name, range(8), True)) for name in "abcdefgh"}
    assert len(halves) > 4


@pytest.mark.parametrize(
    ("answer", "last", "longest"),
    [
        ("```\na\n```\n```py\nb\n```", "b\n", "a\n"),
        ("```\nlonger\n```\nand\n  ```\nb\n  ```", "b\n", "longer\n"),
        ("```\na\n```\n```\nb", None, "a\n"),
        ("no", None, None),
        ("```", None, None),
    ],
)
def test_code_blocks(answer, last, longest):
    assert code.program_in(answer)[0] == last
    assert code.program_in(answer, "longest")[0] == longest


# ---- loading ------------------------------------------------------------------------


def packed(tests) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def record(**changed):
    tests = [
        {"input": f"{i} 1", "output": str(i + 1), "testtype": "stdin"} for i in range(6)
    ]
    return {
        "question_id": "abc_1",
        "question_content": "Add two numbers.",
        "starter_code": "",
        "contest_date": "2025-02-11T00:00:00",
        "public_test_cases": "[]",
        "private_test_cases": packed(tests),
        "metadata": "{}",
        **changed,
    }


def functional(**changed):
    tests = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}] * 2
    return record(
        question_id="f_2",
        starter_code="class Solution:\n    def add(self, a: List[int], b: int) -> int:",
        private_test_cases=packed(tests),
        metadata='{"func_name": "add"}',
        contest_date="2025-05-01T00:00:00",
        **changed,
    )


def load(tmp_path, records, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return tasks.load("code", source=str(path), sandbox=LEVEL, **options)


@runs
def test_livecodebench(tmp_path):
    both = [record(), functional()]
    train = load(tmp_path, both)
    held = load(tmp_path, both, split="test")
    assert train.rows([0, 1]).ids == held.rows([0, 1]).ids == ("code/abc_1", "code/f_2")
    for i, count in ((0, 6), (1, 2)):
        ours, theirs = (t.rows([i]).columns[0]["tests"] for t in (train, held))
        assert len(ours) == len(theirs) == count // 2
        if i == 0:
            assert not {t["input"] for t in ours} & {t["input"] for t in theirs}
    everything = load(tmp_path, both, split="test", tests="all")
    assert len(everything.rows([0]).columns[0]["tests"]) == 6
    stdin, function = (train.rows([i]).messages[0][0]["content"] for i in (0, 1))
    assert "Add two numbers." in stdin and code.FORMS["stdin"] in stdin
    assert "def add(self, a: List[int], b: int)" in function and "6 seconds" in function
    prompts = train.rows([0, 1])
    answers = [RIGHT, "class Solution:\n  def add(self, a, b): return sum(a) + b"]
    verdicts = train.judge(prompts, [f"```\n{answer}\n```" for answer in answers])
    assert [verdict.success for verdict in verdicts] == [True, True]


@runs
def test_a_problem_with_one_test_is_trained_on_only(tmp_path):
    one = {"prompt": "p", "tests": SUMS[:1], "id": "one"}
    two = {"prompt": "p", "tests": SUMS[:2], "id": "two"}
    assert len(load(tmp_path, [one, two])) == 2
    assert load(tmp_path, [one, two], split="test").rows([0]).ids == ("code/two",)
    with pytest.raises(InputError, match="has no rows"):
        load(tmp_path, [one], split="test")


@runs
def test_dates(tmp_path):
    both = [record(), functional()]
    task = load(tmp_path, both, start="2025-02-01", end="2025-05-01")
    assert task.rows(range(len(task))).ids == ("code/abc_1",)
    assert len(load(tmp_path, both, start="2025-05-01")) == 1


@runs
def test_the_hub_has_one_split_and_revisions(monkeypatch):
    asked = {}

    def load_dataset(source, subset, **options):
        asked.update(source=source, **options)
        return [record()]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = tasks.load("code", revision="refs/pr/6", sandbox=LEVEL)
    assert asked == {
        "source": "livecodebench/code_generation_lite",
        "split": "test",
        "revision": "refs/pr/6",
    }
    assert len(task) == 1


class Evil:
    def __reduce__(self):
        return print, ("EVIL",)


BOMB = base64.b64encode(zlib.compress(b"\x00" * 10**7)).decode()


@runs
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "p"}], "no column 'tests'"),
        ([{"prompt": "p", "tests": []}], "must be a list of tests"),
        ([{"prompt": "p", "tests": [{"input": 1, "output": "1"}]}], "expected a text"),
        ([{"prompt": "p", "tests": [{"input": "1", "output": 1}]}], "is 1: no text"),
        ([{"prompt": "p", "tests": [{"input": "1"}]}], "no column 'output'"),
        ([record(private_test_cases="?")], "cannot be read"),
        ([record(private_test_cases="[1]")], "no input and output"),
        ([record(private_test_cases='{"a"')], "cannot be read"),
        ([record(private_test_cases="[" * 100_000)], "no JSON"),
        ([record(private_test_cases=packed({"a": 1}))], "are no list"),
        ([record(metadata='{"func_name": "f"}')], "not of the problem's kind"),
        ([record(private_test_cases=BOMB)], "cannot be read"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, told):
    with pytest.raises(InputError, match=told):
        load(tmp_path, rows)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_is_loaded(protocol, capsys, monkeypatch):
    def encoded(value):
        data = zlib.compress(pickle.dumps(value, protocol))
        return base64.b64encode(data).decode()

    for value in (Evil(), [Evil()], 7, b"x", ["x"], {"x": 1}, None, ("a", "b")):
        with pytest.raises(InputError, match="cannot be read"):
            livecodebench.private_tests(encoded(value))
    assert capsys.readouterr().out == ""
    if protocol:  # protocol 0 writes texts as lines
        assert livecodebench.private_tests(encoded('[{"é": 1}]')) == [{"é": 1}]
    monkeypatch.setattr(livecodebench, "MOST", 1000)
    with pytest.raises(InputError, match="more than 1000 bytes"):
        livecodebench.private_tests(encoded("x" * 2000))


def test_options(monkeypatch):
    with pytest.raises(InputError, match="expected 'half' or 'all'"):
        tasks.load("code", tests="third")
    with pytest.raises(InputError, match="seconds=0"):
        code.CodeJudge(sandbox=LEVEL or "limits", seconds=0)
    monkeypatch.setattr(sandbox, "unavailable", lambda level: "There is no bwrap.")
    with pytest.raises(InputError, match="There is no bwrap"):
        tasks.load("code", source="nowhere.jsonl")
