from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxrl_post.isolation import JudgePool, PoolStats
from jaxrl_post.isolation import pool as pool_module
from jaxrl_post.isolation.batch import Batch
from jaxrl_post.types import Prompts, Verdict

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def judges() -> Iterator[types.ModuleType]:
    sys.path.insert(0, str(HERE))
    import pool_judges

    yield pool_judges
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def pool(judges: types.ModuleType) -> Iterator[JudgePool]:
    with JudgePool(2, timeout=3.0, chunk_size=4) as pool:
        yield pool


def prompts(count: int) -> Prompts:
    return Prompts(
        tuple(map(str, range(count))),
        ((),) * count,
        tuple({"factor": i % 3} for i in range(count)),
        (None,) * count,
    )


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def children() -> list[int]:
    """Processes that this one started and has not waited for, zombies included."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if parent_of(path) == os.getpid()
    ]


def parent_of(stat: Path) -> int | None:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended in the meantime
        return None


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_verdicts_come_in_order_and_from_several_processes(pool, judges):
    verdicts = pool.judge(judges.echo, prompts(40), [str(i) for i in range(40)])
    assert [v.reward for v in verdicts] == [float(i * (i % 3)) for i in range(40)]
    pids = {v.extra["pid"] for v in verdicts}
    assert len(pids) == 2 and os.getpid() not in pids


def test_small_batches_are_spread_over_the_workers(pool, judges):
    verdicts = pool.judge(judges.echo, prompts(2), ["1", "2"])
    assert len({v.extra["pid"] for v in verdicts}) == 2


def test_verdicts_that_have_come_are_not_waited_for(judges, monkeypatch):
    """Start and end of a piece may come together, in one read."""
    monkeypatch.setattr(pool_module, "LOOK_EVERY", 30.0)
    start = time.monotonic()
    with JudgePool(1, timeout=60.0, chunk_size=1) as patient:
        patient.judge(judges.obey, prompts(50), [""] * 50)
    assert time.monotonic() - start < 25


def test_an_empty_batch(pool, judges):
    assert pool.judge(judges.echo, prompts(0), []) == []


def test_lengths_must_agree(pool, judges):
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        pool.judge(judges.echo, prompts(2), ["1"])


@pytest.mark.parametrize(
    ("command", "error", "kind"),
    [
        ("raise no such thing", "RuntimeError: no such thing", "errors"),
        ("nan", "Verdict.reward is nan", "errors"),
        ("wrong-type", "returned 1.0 where a Verdict belongs", "errors"),
        ("none", "'NoneType' object is not iterable", "errors"),
        ("success", "Verdict.success is 'yes'; it is a bool, or None", "errors"),
        ("feedback", "Verdict.feedback is 7, no text", "errors"),
        ("extra-none", "Verdict.extra is None; it is a mapping", "errors"),
        ("answer", "unhashable type: 'list'", "errors"),
        ("parsed", "Verdict.extra['parsed'] is 'yes', no bool", "errors"),
        ("text", "TypeError", "errors"),
        ("recurse", "RecursionError", "errors"),
        ("desert", "died (exit status 0)", "crashes"),
        ("extra", "returned 2 verdicts for 1 completions", "errors"),
        ("unpicklable", "unpicklable verdict", "errors"),
        ("sysexit", "SystemExit", "errors"),
        ("exit", "died (exit status 3)", "crashes"),
        ("flood 7", "wrote into the socket of its verdicts", "crashes"),
        ("flood \0\0\1\0 more than it says", "wrote into the socket", "crashes"),
        ("close", "died (exit status 1)", "crashes"),
        ("hang", "time-out while judging", "timeouts"),
        ("hold", "time-out while judging", "timeouts"),
    ],
)
def test_one_bad_completion_costs_one_verdict(pool, judges, command, error, kind):
    before = vars(pool.stats).copy()
    completions = ["fine"] * 7
    completions[2] = command
    verdicts = pool.judge(judges.obey, prompts(7), completions)
    assert [v.reward for v in verdicts] == [1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0]
    assert verdicts[2].success is None
    assert error in verdicts[2].extra["error"]
    changes = {k: v - before[k] for k, v in vars(pool.stats).items() if v != before[k]}
    assert changes == {"judged": 6, kind: 1}


def test_zero_none_and_nan_are_three_things(pool, judges):
    """A judgement, a judge that does not know, and a judge that is broken."""
    verdicts = pool.judge(judges.obey, prompts(3), ["zero", "unjudged", "nan"])
    assert [v.reward for v in verdicts] == [0.0, None, None]
    assert [v.success for v in verdicts] == [False, None, None]
    assert ["error" in v.extra for v in verdicts] == [False, False, True]


def test_numpy_s_numbers_become_python_s(pool, judges):
    (verdict,) = pool.judge(judges.obey, prompts(1), ["numpy"])
    assert (verdict.reward, verdict.success) == (0.5, True)
    assert type(verdict.reward) is float and type(verdict.success) is bool


def test_a_warning_names_the_judge_what_happened_and_how_often(pool, judges, caplog):
    pool.judge(judges.obey, prompts(4), ["raise first", "fine", "exit", "unjudged"])
    (record,) = caplog.records
    assert record.getMessage() == (
        "judge pool_judges.obey: 2 of 4 completions could not be judged (1 crashes, "
        "1 errors); the first: the judge's process died (exit status 3)"
    ) or record.getMessage() == (
        "judge pool_judges.obey: 2 of 4 completions could not be judged (1 errors, "
        "1 crashes); the first: RuntimeError: first"
    )
    caplog.clear()
    pool.judge(judges.obey, prompts(2), ["fine", "unjudged"])
    assert not caplog.records


def test_a_judge_that_forks_is_heard_once(pool, judges):
    """Both processes return; the fork's verdicts must not become the next batch's."""
    for _ in range(3):
        verdicts = pool.judge(judges.obey, prompts(2), ["fork", "fork"])
        assert all(v.reward and v.reward > 1 for v in verdicts)
        verdicts = pool.judge(judges.obey, prompts(4), ["fine", "zero"] * 2)
        assert [v.reward for v in verdicts] == [1.0, 0.0, 1.0, 0.0]


def test_garbage_on_all_channels_is_no_verdict(pool, judges):
    verdicts = pool.judge(judges.obey, prompts(4), ["garbage", "fine"] * 2)
    assert [v.reward for v in verdicts] == [1.0] * 4


def test_low_descriptors_are_the_judge_s_own(pool, judges):
    (verdict,) = pool.judge(judges.obey, prompts(1), ["close-low"])
    assert verdict.reward == 1.0


def test_a_judge_that_allocates_without_end_is_killed(judges, monkeypatch):
    monkeypatch.setattr(pool_module, "_machine_memory", lambda: 2**30)
    with JudgePool(1, timeout=60, chunk_size=1) as pool:
        verdicts = pool.judge(judges.obey, prompts(3), ["fine", "swell", "fine"])
        assert [v.reward for v in verdicts] == [1.0, None, 1.0]
        assert "the judge's process took" in verdicts[1].extra["error"]
        assert pool.stats.crashes == 1


def test_no_zombie_and_no_child_is_left(judges, tmp_path):
    before = set(children())
    with JudgePool(2, timeout=2.0, chunk_size=1) as pool:
        completions = ["exit", "hang", f"breed {tmp_path / 'pid'}", "desert", "fine"]
        verdicts = pool.judge(judges.obey, prompts(5), completions)
        assert [v.reward for v in verdicts] == [None, None, 1.0, None, 1.0]
        assert (
            len({*children()} - before) == 2
        )  # the workers; those that ended were waited for
    assert {*children()} <= before
    assert eventually(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_workers_import_no_jax_and_judge_in_their_main_thread(pool, judges):
    (verdict,) = pool.judge(judges.obey, prompts(1), ["look"])
    assert verdict.extra == {"jax": False, "platforms": "cpu", "main thread": True}


def test_a_judge_that_always_hangs_is_given_up(judges):
    with JudgePool(2, timeout=0.2, chunk_size=4) as pool:
        verdicts = pool.judge(judges.hang_always, prompts(200), [""] * 200)
        assert {v.reward for v in verdicts} == {None}
        assert "given up" in verdicts[-1].extra["error"]
        # All of them would take 20 s of time-outs, and as long for new processes.
        waited_for = ["given up" not in v.extra["error"] for v in verdicts]
        assert 0 < sum(waited_for) < 20
        assert pool.stats.timeouts == 200
        assert pool.judge(judges.obey, prompts(1), [""])[0].reward == 1.0


def test_completions_are_judged_as_they_come(pool, judges):
    """Each part is given when the one before it is judged, in another order."""
    texts = [str(i) for i in range(12)]
    expected = [v.reward for v in pool.judge(judges.echo, prompts(12), texts)]
    parts = [[7], [3, 11, 0, 8, 5], [1, 2, 4], [6, 9, 10]]
    for stats, chosen in ((p.stats, p) for p in (pool, JudgePool(0))):
        judged = stats.judged
        with chosen.judging(judges.echo, prompts(12)) as judging:
            for rows in parts:
                judging.give(rows, [texts[i] for i in rows])
                judged += len(rows)
                assert eventually(lambda s=stats, n=judged: s.judged == n)
            assert [v.reward for v in judging.verdicts()] == expected


def test_what_is_not_judged_when_it_is_left_is_dropped(pool, judges):
    with pytest.raises(ValueError, match="1 completions were not given"):
        with pool.judging(judges.obey, prompts(2)) as judging:
            judging.give([1], ["hang"])
            judging.verdicts()
    assert pool.judge(judges.echo, prompts(2), ["1", "1"])[1].reward == 1.0


def test_a_judge_that_cannot_be_loaded_stops_what_it_was_opened_for(pool):
    ghost = types.ModuleType("ghost")
    exec("def judge(prompts, completions): return []", vars(ghost))
    sys.modules["ghost"] = ghost
    try:
        with pool.judging(ghost.judge, prompts(3)) as judging:
            judging.give([0], [""])
            assert eventually(lambda: judging._error is not None)
            for call in (judging.verdicts, lambda: judging.give([1], [""])):
                with pytest.raises(ValueError, match="cannot load the judge"):
                    call()
    finally:
        del sys.modules["ghost"]


def test_what_ends_first_does_not_give_up_the_rest():
    """Nine that crash their judge come first; eight that do not make up for them."""
    batch = Batch(prompts(40), PoolStats(), workers=9, chunk_size=4)

    def judge(outcome, pieces):
        for piece in pieces:
            batch.settle(piece, outcome or [Verdict(1.0)] * len(piece), "crashes")

    batch.give(range(9), [""] * 9)
    judge("died", [batch.next_piece() for _ in range(9)])
    batch.give(range(9, 39), [""] * 30)
    assert batch.next_piece() is None  # not before all are there
    batch.give([39], [""])
    judge(None, batch.pieces())
    assert [v.reward for v in batch.result()] == [None] * 9 + [1.0] * 31
    batch.close()


def test_a_time_out_kills_what_the_judge_started(pool, judges, tmp_path):
    file = tmp_path / "pid"
    (verdict,) = pool.judge(judges.obey, prompts(1), [f"child {file}"])
    assert "time-out" in verdict.extra["error"]
    assert eventually(lambda: not alive(int(file.read_text())))


def test_a_worker_killed_while_idle_is_replaced(pool, judges):
    (verdict,) = pool.judge(judges.echo, prompts(1), ["1"])
    os.kill(verdict.extra["pid"], signal.SIGKILL)
    assert eventually(lambda: not alive(verdict.extra["pid"]))
    verdicts = pool.judge(judges.echo, prompts(8), ["1"] * 8)
    assert all(v.reward is not None for v in verdicts)


def test_an_interrupted_call_leaves_no_stale_verdicts(pool, judges):
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.judge(judges.obey, prompts(2), ["hang", "hang"])
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert pool.judge(judges.echo, prompts(2), ["1", "1"])[1].reward == 1.0


def test_two_threads_take_turns(pool, judges):
    results: dict[int, list[Verdict]] = {}

    def judge(k: int) -> None:
        results[k] = pool.judge(judges.echo, prompts(20), [str(k)] * 20)

    threads = [threading.Thread(target=judge, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in (1, 2):
        assert [v.reward for v in results[k]] == [k * (i % 3) for i in range(20)]


def test_judges_that_cannot_be_sent(pool, judges):
    with pytest.raises(ValueError, match="cannot be pickled.*not a lambda"):
        pool.judge(lambda prompts, completions: [], prompts(1), [""])
    ghost = types.ModuleType("ghost")
    exec("def judge(prompts, completions): return []", vars(ghost))
    sys.modules["ghost"] = ghost
    try:
        with pytest.raises(ValueError, match="No module named 'ghost'.*workers=0"):
            pool.judge(ghost.judge, prompts(1), [""])
    finally:
        del sys.modules["ghost"]
    assert pool.judge(judges.obey, prompts(1), [""])[0].reward == 1.0


def test_the_memory_limit_holds(judges):
    with JudgePool(1, memory_limit=2**30) as pool:
        verdicts = pool.judge(judges.obey, prompts(2), [f"eat {2**33}", "eat 1000"])
        assert "MemoryError" in verdicts[0].extra["error"]
        assert verdicts[1].reward == 1000


def test_in_process(judges):
    with JudgePool(workers=0) as pool:
        verdicts = pool.judge(judges.obey, prompts(3), ["fine", "raise x", "fine"])
        assert [v.reward for v in verdicts] == [1.0, None, 1.0]
        (verdict,) = pool.judge(judges.echo, prompts(1), ["1"])
        assert verdict.extra["pid"] == os.getpid()
        assert vars(pool.stats) == {
            "judged": 3,
            "timeouts": 0,
            "crashes": 0,
            "errors": 1,
        }


def test_close_ends_all_processes_and_is_final(judges):
    pool = JudgePool(2)
    verdicts = pool.judge(judges.echo, prompts(2), ["1", "1"])
    pool.close()
    pool.close()
    assert not any(alive(v.extra["pid"]) for v in verdicts)
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge(judges.echo, prompts(1), ["1"])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="timeout > 0"):
        JudgePool(1, timeout=0)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import pool_judges
from jaxrl_post.isolation import JudgePool
from jaxrl_post.types import Prompts

print("top", flush=True)
pool = JudgePool(1)
prompts = Prompts(("a",), ((),), ({{"factor": 1}},), (None,))
print(pool.judge(pool_judges.obey, prompts, [{completion!r}])[0].reward)
"""


def run_script(completion: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(here=str(HERE), completion=completion)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("command", ["fine", "print"])
def test_a_script_needs_no_main_guard_and_may_forget_to_close(command):
    # Nor does what a judge prints get between the script's own lines.
    process = run_script(command)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("top\n1.0\n", 0)


@pytest.mark.parametrize("command", ["child", "sleep"])
def test_nothing_survives_a_killed_owner(tmp_path, command):
    file = tmp_path / "pid"
    process = run_script(f"{command} {file}")
    assert eventually(lambda: file.exists() and file.read_text() != "")
    process.kill()
    process.communicate()
    assert eventually(lambda: not alive(int(file.read_text())))
