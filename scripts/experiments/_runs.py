"""One way to run a study: `jaxrl-post train` with overrides, a line for each run.

A study's methods differ in nothing but what they name. First all are tuned, on seeds of
their own and over the same learning rates: the rate with the best mean validation score
after the last step is taken, of equal ones the smaller. Then the final seeds are run,
all methods of a seed before the next, so that what is cut short is still a paired
comparison. A line that is there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ._statistics import MARGIN, mean_interval, prediction_interval

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
WEIGHTS = ROOT / "jaxrl_post" / "assets" / "science_base" / "model.safetensors"
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
VALIDATION = "validation/avg@16"

Row = Mapping[str, Any]
Rows = Sequence[Row]
Number = Callable[[Row], float]


class Arm(NamedTuple):
    """One method.

    Attributes:
      config: of `configs/`.
      overrides: in which HALF stands for half of the steps.
      after: the method whose final run with the same seed this one is made of; it is
        not tuned.
      derived: overrides made of that run's row.
      program: the method whose compiled programs it can use: it differs from that in
        numbers alone, see `_programs.kept`.
    """

    config: str
    overrides: tuple[str, ...] = ()
    after: str | None = None
    derived: Callable[[Row], tuple[str, ...]] = lambda row: ()
    program: str | None = None


class Size(NamedTuple):
    """What a study costs.

    Attributes:
      steps: of training.
      overrides: of all methods.
      evaluation: the blocks; "validation" chooses, the others report.
      rates: learning rates, the same for every method.
      tuned_on, seeds: seeds of the two phases.
      evaluations: after the one before the first step, evenly.
    """

    steps: int
    overrides: tuple[str, ...]
    evaluation: Mapping[str, Any]
    rates: tuple[float, ...]
    tuned_on: tuple[int, ...]
    seeds: tuple[int, ...]
    evaluations: int = 2

    def reduced(self, evaluation: Mapping[str, Any], steps: int = 6) -> Size:
        """For `--quick`: two questions a step, one seed to tune on, two to report."""
        return self._replace(
            steps=steps,
            overrides=(*self.overrides, "training.prompts_per_step=2"),
            evaluation=evaluation,
            tuned_on=self.tuned_on[:1],
            seeds=self.seeds[:2],
        )


class Claim(NamedTuple):
    """That a number of `method` is greater than that of `against`, or than 0.

    Attributes:
      text: in words.
      paper: its number.
      method, against: two methods, compared seed by seed; or one, and None.
      number: of a row.
      margin: the smallest difference that counts.
    """

    text: str
    paper: str
    method: str
    against: str | None
    number: Number
    margin: float = MARGIN


class Study(NamedTuple):
    """A claim's methods, sizes and what is said of them.

    Attributes:
      name: of the claim, of the script and of the file of its rows.
      domain: what is asked.
      arms: methods by name.
      sizes: by name: "default", and "quick", which runs for minutes.
      series: metrics of every step that rows keep.
      claims: what the final rows are asked.
      columns: numbers of a row for the table of methods, by heading.
      plots: the series that are drawn.
      headline: how many of the claims, from the first, the protocol names as such; the
        others are exploratory.
      weights: of the model that is trained, whose hash rows keep.
    """

    name: str
    domain: str
    arms: Mapping[str, Arm]
    sizes: Mapping[str, Size]
    series: tuple[str, ...]
    claims: tuple[Claim, ...]
    columns: Mapping[str, Number]
    plots: tuple[str, ...] = ()
    headline: int = 0
    weights: Path = WEIGHTS

    @property
    def path(self) -> Path:
        """Where the rows of the default size are kept."""
        return EVIDENCE / f"{self.name}.jsonl"


class Job(NamedTuple):
    """A run to be made."""

    method: str
    phase: str
    seed: int
    rate: float


def train(
    config: str,
    settings: Sequence[str],
    evaluation: Mapping[str, Any],
    core: int | None = None,
    method: tuple[str, ...] = (),
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs `jaxrl-post train` with a config of `configs/` in a folder of its own.

    Args:
      config: its name.
      settings: overrides.
      evaluation: the blocks in the place of the config's.
      core: of a process of its own, pinned there, with one thread; None: this process,
        which saves the start and the report.
      method: of `_programs.kept`, in this process; empty: nothing is kept.

    Returns:
      The rows of its metrics, and all settings as they were resolved.

    Raises:
      RuntimeError: the process failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = [*settings, f"run.dir={folder}/run", "run.judge_workers=1"]
        told.append(f"evaluation={json.dumps(evaluation)}")
        if core is None:
            _here(f"configs/{config}.yaml", told, method)
        else:
            _pinned(f"configs/{config}.yaml", told, core)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        resolved = yaml.safe_load(Path(folder, "run", "config.yaml").read_text())
    del resolved["run"]["dir"]
    return [json.loads(line) for line in lines], resolved


def _here(config: str, overrides: Sequence[str], method: tuple[str, ...]) -> None:
    os.chdir(ROOT)
    # Before jax starts, and the same wherever a run is repeated.
    os.environ.setdefault("XLA_FLAGS", ONE_THREAD)
    from jaxrl_post.cli.cache import check_compilation_cache
    from jaxrl_post.cli.memory import keep_freed_memory
    from jaxrl_post.training.config import load_config
    from jaxrl_post.training.loop import run

    from ._programs import kept

    check_compilation_cache()
    keep_freed_memory()
    with (
        kept(*method) if method else contextlib.nullcontext(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        run(load_config(config, overrides))


def _pinned(config: str, overrides: Sequence[str], core: int) -> None:
    command = [sys.executable, "-m", "jaxrl_post.cli", "train", config, *overrides]
    done = subprocess.run(
        ["taskset", "--cpu-list", str(core), *command],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit {done.returncode}\n{done.stdout}")


def settings(arm: Arm, size: Size, seed: int, rate: float) -> list[str]:
    """The overrides of a run, but those made of another run's row."""
    half = str(size.steps // 2)
    return [
        *size.overrides,
        f"training.steps={size.steps}",
        f"training.evaluate_every={size.steps // size.evaluations}",
        *(text.replace("HALF", half) for text in arm.overrides),
        f"optimizer.learning_rate={rate}",
        f"run.seed={seed}",
    ]


def run(study: Study, size: str, job: Job, before: Rows = ()) -> dict[str, Any]:
    """One run's row. What differs between two runs of a job is named ``time/...``.

    Args:
      study: of the job.
      size: one of its sizes, by name.
      job: to be done.
      before: rows, among them the one that the method comes after, if any.
    """
    arm, what = study.arms[job.method], study.sizes[size]
    told = settings(arm, what, job.seed, job.rate)
    if arm.after is not None:
        told += arm.derived(final(before, arm.after, job.seed))
    start = time.perf_counter()
    names = (study.name, size, arm.program or job.method)
    rows, resolved = train(arm.config, told, what.evaluation, method=names)
    curve = {
        row["step"]: {
            name.removeprefix("eval/"): value
            for name, value in row.items()
            if name.startswith("eval/")
        }
        for row in rows
        if f"eval/{VALIDATION}" in row
    }
    return {
        "claim": study.name,
        "method": job.method,
        "domain": study.domain,
        "model": resolved["model"]["path"],
        "base_sha256": hashlib.sha256(study.weights.read_bytes()).hexdigest(),
        "seed": job.seed,
        "phase": job.phase,
        "size": size,
        "learning_rate": job.rate,
        "command": ["jaxrl-post", "train", f"configs/{arm.config}.yaml", *told],
        "settings": resolved,
        "curve": json.loads(json.dumps(curve)),  # keys as they are read again
        "series": {
            name: [short(row[name]) for row in rows if row.get(name) is not None]
            for name in study.series
        },
        "time/commit": _commit(),
        "time/seconds": round(time.perf_counter() - start, 1),
        **{
            f"time/{name}": round(
                math.fsum(row.get(f"time/{name}", 0.0) for row in rows), 1
            )
            for name in ("step", "evaluate")
        },
    }


def short(value: float) -> float:
    """Six digits, which is what a series is kept with.

    >>> short(0.12345678)
    0.123457
    """
    return float(f"{value:.6g}")


def _commit() -> str | None:
    line = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def differences(row: Row, other: Row) -> list[str]:
    """Keys in which two rows of one job differ, those that may set aside.

    >>> differences({"seed": 1, "time/seconds": 2}, {"seed": 1, "time/seconds": 3})
    []
    """
    keys = sorted({*row, *other})
    return [
        key
        for key in keys
        if not key.startswith("time/") and row.get(key) != other.get(key)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def append(path: Path, row: Row) -> None:
    """Adds a row to a file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def final(rows: Rows, method: str, seed: int) -> Row:
    """The final row of a method and a seed."""
    return next(
        row
        for row in rows
        if (row["phase"], row["method"], row["seed"]) == ("final", method, seed)
    )


def chosen(study: Study, size: Size, rows: Rows, method: str) -> float:
    """The learning rate that tuning gives a method."""
    arm = study.arms[method]
    if arm.after is not None:
        return chosen(study, size, rows, arm.after)

    def score(rate: float) -> float:
        return math.fsum(
            last(row, VALIDATION)
            for row in rows
            if (row["phase"], row["method"]) == ("tune", method)
            and row["learning_rate"] == rate
            and row["seed"] in size.tuned_on
        )

    return max(sorted(size.rates), key=score)


def left(study: Study, size: Size, rows: Rows, methods: Sequence[str]) -> Iterator[Job]:
    """What is to be done next, in order; the final runs once all methods are tuned."""
    keys = ("method", "phase", "seed", "learning_rate")
    done = {tuple(row[key] for key in keys) for row in rows}
    tuned = {study.arms[name].after or name: None for name in methods}  # a set in order
    jobs = [
        Job(method, "tune", seed, rate)
        for seed in size.tuned_on
        for rate in size.rates
        for method in tuned
        if len(size.rates) > 1
    ]
    if waiting := [job for job in jobs if job not in done]:
        yield from waiting
        return
    for seed in size.seeds:
        for method in methods:
            job = Job(method, "final", seed, chosen(study, size, rows, method))
            if job not in done:
                yield job


def last(row: Row, score: str) -> float:
    """A score after the last step."""
    return list(row["curve"].values())[-1][score]


def best(row: Row, score: str) -> float:
    """A score where the validation score was best, the first of equal ones."""
    return max(row["curve"].values(), key=lambda scores: scores[VALIDATION])[score]


def series(row: Row, name: str) -> Sequence[float]:
    """A metric over the steps."""
    return row["series"][name]


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def finals(rows: Rows) -> dict[str, dict[int, Row]]:
    """The final rows by method and seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["phase"] == "final":
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def seeds(study: Study, count: int) -> str:
    """How many there are, and of how many by the protocol where some are missing."""
    wanted = len(study.sizes["default"].seeds)
    return str(count) if count >= wanted else f"{count} of {wanted}: incomplete"


def table(study: Study, rows: Rows) -> str:
    """The methods, their final seeds taken together, in Markdown.

    Scores have the 95 % interval of their mean, then the 99 % interval of a new seed.
    """
    lines: list[str] = []
    for method, by_seed in sorted(
        finals(rows).items(), key=lambda item: list(study.arms).index(item[0])
    ):
        of_method = list(by_seed.values())
        cells = {
            "method": method,
            "seeds": seeds(study, len(of_method)),
            "learning rate": ", ".join(
                f"{rate:g}" for rate in sorted({r["learning_rate"] for r in of_method})
            ),
        }
        for heading, number in study.columns.items():
            values = [number(row) for row in of_method]
            cells[heading] = show(values, predict="last" in heading)
        if not lines:
            lines += [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines)


def show(values: Sequence[float], predict: bool = False) -> str:
    """A mean, the half-width of its interval, and where a new seed is expected."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    interval = mean_interval(values)
    text = f"{interval.mean:.3f}"
    if len(values) > 1:
        text += f" ± {interval.high - interval.mean:.3f}"
        if predict:
            new = prediction_interval(values)
            text += f" [{new.low:.3f}, {new.high:.3f}]"
    return text


def main(study: Study) -> None:
    """The command line of every study."""
    parser = argparse.ArgumentParser(description=f"The study {study.name}.")
    parser.add_argument("--quick", action="store_true", help="reduced, into runs/")
    parser.add_argument("--minutes", type=float, help="begin nothing after these")
    parser.add_argument("--methods", nargs="*", choices=study.arms, help="only these")
    parser.add_argument("--seeds", type=int, nargs="*", help="final seeds")
    parser.add_argument("--again", action="store_true", help="repeat rows and compare")
    parser.add_argument("--table", action="store_true", help="only the table")
    arguments = parser.parse_args()
    name = "quick" if arguments.quick else "default"
    size = study.sizes[name]
    if arguments.seeds is not None:
        size = size._replace(seeds=tuple(arguments.seeds))
    path = (
        ROOT / "runs" / f"{study.name}-quick.jsonl" if arguments.quick else study.path
    )
    wanted = arguments.methods or list(study.arms)
    end = time.monotonic() + 60 * (arguments.minutes or math.inf)
    if arguments.again:
        repeat(study, name, read(path), wanted, size.seeds, end)
        return
    while not arguments.table and time.monotonic() < end:
        rows = read(path)
        job = next(left(study, size, rows, wanted), None)
        if job is None:
            break
        row = run(study, name, job, rows)
        append(path, row)
        print(*job, f"{last(row, VALIDATION):.3f}", row["time/seconds"], flush=True)
    print(table(study, read(path)))


def repeat(
    study: Study,
    size: str,
    rows: Rows,
    methods: Sequence[str],
    seeds: Sequence[int],
    end: float,
) -> None:
    """Makes final rows anew and says in which keys they differ.

    Raises:
      SystemExit: some do.
    """
    wrong = []
    for row in rows:
        if row["method"] not in methods or row["seed"] not in seeds:
            continue
        if row["phase"] != "final" or time.monotonic() > end:
            continue
        job = Job(row["method"], "final", row["seed"], row["learning_rate"])
        keys = differences(row, run(study, size, job, rows))
        print(*job, "differs in " + ", ".join(keys) if keys else "identical")
        wrong += keys
    sys.exit(1 if wrong else 0)
