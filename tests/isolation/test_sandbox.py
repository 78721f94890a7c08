"""The sandbox: what programs get, what they are told, and what they cannot do.

All the programs of scripts/sandbox_programs.py run in a test marked slow, ten here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jaxrl_post.errors import InputError
from jaxrl_post.isolation import guest, sandbox
from jaxrl_post.isolation.pool import JudgePool
from jaxrl_post.isolation.sandbox import Limits
from jaxrl_post.tasks.code import CodeJudge
from jaxrl_post.types import Prompts

ROOT = Path(__file__).resolve().parents[2]
SOME = (
    "fork bomb",
    "fork by the 32-bit door",
    "lists",
    "many files",
    "a loop that ignores signals",
    "endless",
    "by its own root",
    "everybody's arguments",
    "TCP",
    "kills",
)
LEVELS = [
    pytest.param(
        level,
        marks=pytest.mark.skipif(
            sandbox.unavailable(level) is not None,
            reason=str(sandbox.unavailable(level)),
        ),
    )
    for level in sandbox.LEVELS
]
required = LEVELS[0]
# The machine may be busy: what is no test of the time has enough of it.
run = partial(sandbox.run, limits=Limits(seconds=30.0))


@pytest.fixture(scope="module")
def table():
    """scripts/sandbox_table.py."""
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(
        "sandbox_table", ROOT / "scripts" / "sandbox_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["sandbox_table"] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path[1:]
    del sys.modules["sandbox_table"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_reads_and_writes(level):
    program = "import sys\nprint(int(input()) + 1)\nsys.stderr.write('é')\nsys.exit(3)"
    result = run(program, stdin="41\n", level=level)
    assert (result.code, result.output, result.error) == (3, "42\n", "é")
    assert result.stopped is None and 0 < result.seconds


@pytest.mark.parametrize("level", LEVELS)
def test_a_function_is_called(level):
    program = "class Solution:\n    def f(self, a: List[int], b):\n"
    program += "        print('noise')\n        return {'sum': sum(a) + b}"
    result = run(program, call=("f", [[1, 2], 3]), level=level)
    assert (result.code, result.output) == (0, '{"sum": 6}')
    plain = run("def f(a): return pow(a, 3, 5)", call=("f", [2]), level=level)
    assert plain.output == "3"
    guarded = "def f(a): return a\nif __name__ == '__main__': print(f(input()))"
    assert run(guarded, call=("f", [2]), level=level).output == "2"
    missing = run("def g(a): return a", call=("f", [2]), level=level)
    assert missing.code == 1 and "there is no function 'f'" in missing.error


@pytest.mark.parametrize("level", LEVELS)
def test_errors_name_the_programs_own_lines(level):
    result = run("x = 1\nx / 0", level=level)
    assert result.code == 1
    assert 'File "solution.py", line 2' in result.error and "x / 0" in result.error
    assert "<string>" not in result.error  # what runs it does not show
    assert "SyntaxError" in run("x =", level=level).error


@pytest.mark.parametrize("level", LEVELS)
def test_limits(level):
    late = run("while True: pass", level=level, limits=Limits(seconds=1.0))
    assert late.stopped == "time" and 1.0 <= late.seconds < 6.0
    limits = Limits(seconds=30.0, memory=2**27, output=1000)
    long = run("print('x' * 10**7)", level=level, limits=limits)
    assert long.stopped == "output" and long.output == "x" * 1000
    large = run("x = bytearray(2**28)", level=level, limits=limits)
    assert large.code == 1 and "MemoryError" in large.error
    more = replace(limits, memory=2**29)
    assert run("x = bytearray(2**28)", level=level, limits=more).code == 0
    killed = run("import os; os.kill(os.getpid(), 11)", level=level, limits=limits)
    assert (killed.code, killed.stopped) == (128 + 11, None)


@pytest.mark.parametrize("level", [required])
def test_nothing_is_there(level):
    program = "import os\nprint(os.listdir('/tmp'), sorted(os.environ), os.getpid())"
    result = run(program, level=level)
    assert result.output == "[] ['LC_CTYPE', 'PWD'] 2\n"


@pytest.mark.parametrize("level", [required])
def test_runs_do_not_see_each_other(level):
    run("open('/tmp/x', 'w').write('x')", level=level)
    result = run("import os\nprint(os.path.exists('/tmp/x'))", level=level)
    assert result.output == "False\n"


def test_levels_that_do_not_work_say_what_to_do(monkeypatch):
    with pytest.raises(InputError, match="Unknown sandbox level 'none'"):
        run("", level="none")
    sandbox.unavailable.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sandbox.shutil, "which", lambda name: None)
            with pytest.raises(
                InputError, match="no bwrap.*apt-get install bubblewrap"
            ):
                run("")
        sandbox.unavailable.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(sandbox.shutil, "which", lambda name: "/bin/false")
            with pytest.raises(InputError, match="does not work on this machine"):
                run("")
    finally:
        sandbox.unavailable.cache_clear()


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_sandbox_that_fails_blames_no_program(level, monkeypatch):
    assert run("print(1)", level=level).code == 0
    monkeypatch.setattr(sandbox, "_GUEST", "raise OSError('no namespaces')")
    with pytest.raises(sandbox.SandboxError, match="OSError: no namespaces"):
        run("print(1)", level=level)


def evaluate(code: bytes, words: dict[int, int]) -> int:
    """What the kernel makes of a filter, for a system call given as 32-bit words."""
    lines = [
        (int.from_bytes(code[i : i + 2], sys.byteorder), code[i + 2], code[i + 3])
        + (int.from_bytes(code[i + 4 : i + 8], sys.byteorder),)
        for i in range(0, len(code), 8)
    ]
    at, value = 0, 0
    while True:
        kind, yes, no, k = lines[at]
        if kind == 0x06:
            return k
        if kind == 0x20:
            value, yes, no = words.get(k, 0), 0, 0
        met = {0x20: True, 0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}
        at += 1 + (yes if met[kind] else no)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_system_calls(machine):
    """Line by line, without a kernel, for both architectures."""
    allow, refuse = 0x7FFF0000, 0x00050000 | 1
    column, architecture = guest._ARCHITECTURES[machine]
    code = guest.seccomp_filter(machine, 77)
    assert len(code) % 8 == 0 and len(code) // 8 < 4096  # the kernel's limit

    def call(number, first=0, second=0):
        return evaluate(code, {0: number, 4: architecture, 16: first, 24: second})

    assert evaluate(code, {4: 0x40000003}) == 0x80000000  # another architecture: killed
    for name, numbers in guest._REFUSED.items():
        if numbers[column] is not None:
            assert call(numbers[column]) == refuse, name
    for name, numbers in guest._OF_ITSELF.items():
        assert call(numbers[column], 77) == allow, name
        assert call(numbers[column], 78) == refuse, name
        assert call(numbers[column], 0) == (allow if numbers[2] else refuse), name
    assert call(guest._CLONE[column], 17) == refuse  # a process
    assert call(guest._CLONE[column], 0x3D0F00) == allow  # a thread
    assert call(guest._CLONE3[column]) == 0x00050000 | 38
    for command in range(20):
        fcntl, prctl = (guest._COMMANDS[name][column] for name in ("fcntl", "prctl"))
        assert call(fcntl, 3, command) == (refuse if command in (8, 10, 15) else allow)
        assert call(prctl, command, 9) == (refuse if command == 1 else allow)
    for number in {"x86_64": (0, 1, 9, 231), "aarch64": (63, 64, 222, 94)}[machine]:
        assert call(number) == allow  # read, write, mmap, exit_group
    if machine == "x86_64":
        assert call(0x40000000 + 1) == refuse  # x32


@pytest.mark.parametrize("level", [required])
@pytest.mark.parametrize("name", SOME)
def test_contained(table, level, name):
    (record,) = table.rows(level, name)
    assert record["achieved"] is None


@pytest.mark.slow
@pytest.mark.parametrize("level", [required])
def test_all_are_contained(table, level):
    records = list(table.rows(level))
    assert len(records) > 100
    assert [r for r in records if r["achieved"]] == []


@pytest.mark.skipif(
    sandbox.unavailable("limits") is not None or platform.machine() != "x86_64",
    reason="needs the level limits",
)
@pytest.mark.parametrize("name", ["libc's fork", "reads", "TCP", "writes"])
def test_the_programs_mean_it(table, name):
    """Where nothing but limits contains them they get what they want."""
    (record,) = table.rows("limits", name)
    assert record["achieved"] is not None


def test_the_committed_table_is_of_these_programs(table):
    records = table.read()
    there = {
        (category, name)
        for category, programs in {**table.ATTACKS, "cheating": table.CHEATS}.items()
        for name in programs
    }
    for column, rows in table.columns(records).items():
        rows = [r for r in rows if r["category"] != table.COST]
        assert {(r["category"], r["program"]) for r in rows} == there, column
        assert len(rows) == len(there) > 60
    strongest = [r for r in records if r["level"] == "required"]
    assert strongest and all(r["achieved"] is None for r in strongest)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
@pytest.mark.parametrize("level", LEVELS)
def test_roots_programs_are_not_roots(level):
    result = run("import os\nprint(os.getresuid(), os.getgroups())", level=level)
    user = int(result.output.split(",")[0].lstrip("("))
    assert result.output == f"({user}, {user}, {user}) []\n"
    assert sandbox._USERS[0] <= user <= sandbox._USERS[1]


HANGS = """
from jaxrl_post.isolation import sandbox
from jaxrl_post.types import Verdict

def judge(prompts, completions):
    limits = sandbox.Limits(seconds=600)
    for level, mark in (text.split() for text in completions):
        sandbox._GUEST += f"\\n# {mark}"
        sandbox.run("import time; time.sleep(600)", level=level, limits=limits)
    return [Verdict(1.0)] * len(completions)
"""


@pytest.mark.parametrize("level", LEVELS[:2])
def test_a_program_dies_with_its_judge(level, table, tmp_path, monkeypatch):
    (tmp_path / "hanging_judge.py").write_text(HANGS)
    monkeypatch.syspath_prepend(tmp_path)
    judge = importlib.import_module("hanging_judge").judge
    mark = f"mark-{os.urandom(8).hex()}"
    prompts = Prompts(("q",), ((),), ({},), (None,))
    with (
        JudgePool(1, timeout=3.0, warn=False) as pool,
        ThreadPoolExecutor(1) as threads,
    ):
        judged = threads.submit(pool.judge, judge, prompts, [f"{level} {mark}"])
        while not (running := table.marked(mark.encode())):
            assert not judged.done()
        (verdict,) = judged.result()
    assert verdict.extra["error"] == "time-out while judging"
    assert running and not table._left(mark.encode())


@pytest.mark.parametrize("level", [required])
def test_the_code_judge_in_the_pool(level):
    columns = {"tests": [{"input": "1 2", "output": "3"}], "function": None}
    prompts = Prompts(("q",), ((),), (columns,), (None,))
    answers = [f"```\nprint({n})\n```" for n in (3, 4)]
    with JudgePool(1, warn=False) as pool:
        verdicts = pool.judge(CodeJudge(), prompts.take([0, 0]), answers)
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]
