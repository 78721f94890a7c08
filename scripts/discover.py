"""First successes on hard questions: SDPO at test time, best-of-k, and multi-turn.

    python scripts/discover.py            # the whole of it: 20 questions, 5 seeds
    python scripts/discover.py --questions 2 --seeds 0 --attempts 128 --minutes 3
    python scripts/discover.py --table    # only the table

Every line of docs/evidence/discover.jsonl is a candidate with its successes under the
base, or a search, which is `jaxrl-post discover` with the command that it names; what
is there is not done again. A question is hard if its pass@64 is below 3 %.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments._runs import ONE_THREAD, ROOT

RESULTS = ROOT / "docs" / "evidence" / "discover.jsonl"
CONFIG = "configs/discover_science.yaml"
TASK = ("task.domains=[programs]", "task.levels=[4]")
METHODS = ("sdpo", "best_of_k", "multi_turn")
BELOW = 0.03
SAMPLES = 2200  # one success in these is a pass@64 of 64 / 2200 = 2.9 %
ATTEMPTS = 512
CANDIDATES = 64
Rows = Sequence[Mapping[str, Any]]


def command(*arguments: str) -> None:
    """Runs `jaxrl-post` in this process, quietly: starting one takes seconds.

    Raises:
      RuntimeError: it failed.
    """
    import jax

    from jaxrl_post.cli import main as jaxrl_post

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = jaxrl_post(arguments)
    jax.clear_caches()  # programs of runs that are over
    if code:
        raise RuntimeError(f"{arguments}: exit {code}\n{printed.getvalue()}")


def completions(run: Path) -> list[dict[str, Any]]:
    """All that a run has sampled."""
    files = sorted(run.glob("completions/*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


def measure(question: int) -> dict[str, Any]:
    """How often the base answers a candidate rightly."""
    from jaxrl_post.training.statistics import pass_at_k

    size = SAMPLES // 10
    with tempfile.TemporaryDirectory() as folder:
        command(
            *("train", CONFIG, *TASK, f"task.questions=[{question}]"),
            *("recipe={name: best_of_k}", "training.steps=10"),
            *(f"training.group_size={size}", f"run.dir={folder}/run"),
            *("run.seed=1000", "run.judge_workers=1"),
        )
        rows = completions(Path(folder, "run"))
    right = sum(bool(row["success"]) for row in rows)
    return {
        "kind": "candidate",
        "question": question,
        "prompt": rows[0]["prompt"],
        "samples": len(rows),
        "successes": right,
        "pass@64": float(pass_at_k(len(rows), right, 64)),
    }


def search(question: int, method: str, seed: int, attempts: int) -> dict[str, Any]:
    """One search; `first` is None where it found nothing."""
    told = ["discover", CONFIG, *TASK, f"run.seed={seed}"]
    told += ["--question", str(question), "--method", method]
    told += ["--attempts", str(attempts)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command(*told, f"run.dir={folder}/run", "run.judge_workers=1")
        lines = Path(folder, "run", "discovery.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "kind": "search",
        "question": question,
        "method": method,
        "seed": seed,
        "attempts": attempts,
        "first": next((row["attempt"] for row in rows if row["success"]), None),
        "command": ["jaxrl-post", *told],
        "seconds": round(time.perf_counter() - start, 1),
    }


def read() -> list[dict[str, Any]]:
    """The lines that are there."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def hard(rows: Rows) -> list[int]:
    """The questions that are hard, in the order in which they were looked at."""
    candidates = [row for row in rows if row["kind"] == "candidate"]
    return [row["question"] for row in candidates if row["pass@64"] < BELOW]


def left(
    rows: Rows, questions: int, seeds: Sequence[int], attempts: int
) -> Iterator[tuple[Any, ...]]:
    """What is to be done next: candidates until there are enough, then searches.

    All methods on a question and seed come before the next: what is cut short is still
    a comparison.
    """
    known = {row["question"] for row in rows if row["kind"] == "candidate"}
    if len(hard(rows)) < questions:
        yield from ((i,) for i in range(CANDIDATES) if i not in known)
    names = ("question", "method", "seed", "attempts")
    done = {tuple(r[n] for n in names) for r in rows if r["kind"] == "search"}
    wanted = (
        (question, method, seed, attempts)
        for seed in seeds
        for question in hard(rows)[:questions]
        for method in METHODS
    )
    yield from (job for job in wanted if job not in done)


def table(rows: Rows) -> str:
    """discovery@k by method and budget, means over questions, in Markdown.

    Seeds of a question are taken together first: the interval is that over questions.
    """
    from jaxrl_post.training.discovery import discovery_at_k, powers_of_two
    from jaxrl_post.training.statistics import over_questions

    lines = []
    searches = [row for row in rows if row["kind"] == "search"]
    for budget in sorted({row["attempts"] for row in searches}):
        ks = powers_of_two(budget)[-5:]
        heads = ["method", "questions", "searches", *(f"discovery@{k}" for k in ks)]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for method in METHODS:
            found: dict[int, list[int | None]] = {}
            for row in searches:
                if (row["method"], row["attempts"]) == (method, budget):
                    found.setdefault(row["question"], []).append(row["first"])
            count = sum(map(len, found.values()))
            cells = [method, str(len(found)), str(count)]
            shares = [discovery_at_k(firsts, ks) for firsts in found.values()]
            for k in ks:
                samples = max(map(len, found.values()), default=1)
                mean = over_questions([share[k] for share in shares], samples=samples)
                cells.append(f"{mean.value:.2f} ({mean.low:.2f}–{mean.high:.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--attempts", type=int, default=ATTEMPTS)
    parser.add_argument("--minutes", type=float, help="begin nothing after these")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    # Before jax starts, and the same wherever a search is repeated.
    os.environ.setdefault("XLA_FLAGS", ONE_THREAD)
    end = time.monotonic() + 60 * (arguments.minutes or float("inf"))
    plan = (arguments.questions, arguments.seeds, arguments.attempts)
    while not arguments.table and time.monotonic() < end:
        job = next(left(read(), *plan), None)
        if job is None:
            break
        row = measure(*job) if len(job) == 1 else search(*job)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({k: v for k, v in row.items() if k != "command"}, flush=True)
    if any(row["kind"] == "search" for row in read()):
        print(table(read()))


if __name__ == "__main__":
    main()
