"""Kills a training run again and again, and looks whether anything was lost.

    python scripts/torture.py --kills 50 --out docs/evidence/torture.jsonl

The command ``jaxrl-post train`` runs once undisturbed. Then the same run, in a folder
of its own, is killed with SIGKILL and started again until it is finished; and so on
with further folders until there were as many kills as asked for. Every finished folder
must equal the undisturbed one to the bit: metrics but for times, completions, the
arrays of the newest checkpoint, the exported model. The exit code is 1 where one does
not.

Instants are of three kinds, in turn: while a checkpoint or the model is being written,
at a random time after a step's metrics, and at any time from the process's start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG: Mapping[str, Any] = {
    "model": {"path": "science_base"},
    "task": {"name": "science", "levels": [1], "max_prompt_length": 48},
    # A teacher, a modulation that adapts and Adam's moments: much that can be lost.
    "recipe": {
        "name": "pgpo",
        "max_length": 128,
        "sensitivity": 1.0,
        "adapt": {"target": 1.2, "rate": 0.5},
    },
    "optimizer": {"learning_rate": 3e-4},
    "training": {
        "steps": 8,
        "prompts_per_step": 4,
        "group_size": 4,
        "updates_per_step": 2,
        "evaluate_every": 3,
        "checkpoint_every": 1,
    },
    "sampling": {"max_new_tokens": 16},
    "evaluation": {"science": {"rows": 8, "samples": 2}},
    "run": {"judge_workers": 1},
}

INSTANTS = ("saving", "training", "anywhere")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every run that was killed ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--out", type=Path, help="a log: one JSON object per line")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        log = _Log(arguments.out)
        equal = _torture(Path(folder), arguments.kills, arguments.seed, log)
    return 0 if equal else 1


def _torture(folder: Path, kills: int, seed: int, log: _Log) -> bool:
    random_ = random.Random(seed)
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
    }
    (folder / "torture.yaml").write_text(yaml.safe_dump(dict(CONFIG)))
    runner = _Runner(folder / "torture.yaml", environment)
    for name in ("warm", "undisturbed"):  # the first one fills the compilation cache
        start = time.perf_counter()
        runner.finish(folder / name)
        seconds = time.perf_counter() - start
    problems = _differences(folder / "warm", folder / "undisturbed")
    log.write(run="undisturbed, twice", seconds=round(seconds, 1), differences=problems)
    equal, done, number = not problems, 0, 0
    while done < kills:
        number += 1
        victim, of_victim = folder / f"victim-{number}", 0
        while done < kills:
            instant, start = INSTANTS[done % len(INSTANTS)], time.perf_counter()
            killed = runner.kill(victim, instant, random_, seconds)
            if killed is None:  # it was faster
                if not of_victim:  # as all runs may be by now, on a machine with others
                    seconds = time.perf_counter() - start
                break
            done, of_victim = done + 1, of_victim + 1
            log.write(kill=done, victim=number, instant=instant, **killed)
        runner.finish(victim)
        problems = _differences(victim, folder / "undisturbed")
        log.write(victim=number, kills=of_victim, differences=problems)
        equal = equal and not problems
    return equal


class _Runner:
    """Starts ``jaxrl-post train`` on folders."""

    def __init__(self, config: Path, environment: Mapping[str, str]) -> None:
        self._config, self._environment = config, environment

    def finish(self, run_dir: Path) -> None:
        """Runs the command to its end."""
        process = self._start(run_dir)
        errors = process.communicate()[1]
        if process.returncode != 0:
            raise RuntimeError(f"exit code {process.returncode}:\n{errors}")

    def kill(
        self, run_dir: Path, instant: str, random_: random.Random, seconds: float
    ) -> dict[str, Any] | None:
        """Kills the command at an instant; None if it was finished before."""
        begun = time.perf_counter()
        rows = _size(run_dir / "metrics.jsonl")
        process = self._start(run_dir, subprocess.DEVNULL)
        writes = random_.randint(1, 3)  # let some saves succeed

        def over() -> bool:
            return process.poll() is not None

        if instant == "anywhere":
            wait = random_.uniform(0, seconds)
        elif instant == "training":
            # It shrinks first: rows of steps that will be done again are dropped.
            while (now := _size(run_dir / "metrics.jsonl")) <= rows and not over():
                rows = min(rows, now)
                time.sleep(0.004)
            wait = random_.uniform(0, seconds / 4)
        else:
            left = set(_unfinished(run_dir))  # by the process that was killed before
            seen: set[Path] = set()
            while len(seen) < writes and not over():
                present = set(_unfinished(run_dir))
                left &= present
                seen |= present - left
                time.sleep(0.004)
            wait = random_.choice((0.0, random_.uniform(0, 0.05)))
        end = time.perf_counter() + wait
        while time.perf_counter() < end and not over():
            time.sleep(min(0.01, max(0.0, end - time.perf_counter())))
        if over():
            if process.returncode != 0:
                raise RuntimeError(f"exit code {process.returncode} before the kill")
            return None
        process.kill()
        process.wait()
        metrics = run_dir / "metrics.jsonl"
        lines = metrics.read_text().split("\n") if metrics.exists() else [""]
        steps = [p.name for p in (run_dir / "checkpoints").glob("[0-9]*")]
        return {
            "seconds": round(time.perf_counter() - begun, 2),
            "rows": len(lines) - 1,
            "torn_row": bool(lines[-1]),
            "checkpoints": sorted(int(name) for name in steps if name.isdigit()),
            "unfinished": sorted(path.name for path in _unfinished(run_dir)),
        }

    def _start(self, run_dir: Path, stderr: int = subprocess.PIPE) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxrl_post.cli", "train", str(self._config)]
        return subprocess.Popen(
            [*command, f"run.dir={run_dir}"],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
        )


class _Log:
    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            path.write_text("")

    def write(self, **row: Any) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(line + "\n")


def _differences(run: Path, other: Path) -> list[str]:
    """What of two runs is not the same, and must be."""
    import numpy as np

    from jaxrl_post.training.checkpoints import Checkpoints
    from jaxrl_post.training.metrics import read_metrics

    problems = []
    rows, expected = read_metrics(run), read_metrics(other)
    for row in [*rows, *expected]:
        for key in [k for k in row if k.startswith(("time/", "throughput/"))]:
            del row[key]
    if rows != expected:
        problems.append("metrics")
    for name in ("completions", "model"):
        problems += [
            f"{name}/{path.name}"
            for path in sorted((other / name).iterdir())
            if not (run / name / path.name).is_file()
            or path.read_bytes() != (run / name / path.name).read_bytes()
        ]
    saved = []
    for folder in (run, other):
        checkpoints = Checkpoints(folder, read_only=True)
        saved.append((checkpoints.latest(), checkpoints.arrays()))
        checkpoints.close()
    (step, arrays), (last, wanted) = saved
    if step != last or arrays.keys() != wanted.keys():
        return [*problems, f"checkpoint {step} instead of {last}"]
    return problems + [
        f"checkpoint{name}"
        for name, value in wanted.items()
        if np.asarray(arrays[name]).tobytes() != np.asarray(value).tobytes()
    ]


def _unfinished(run_dir: Path) -> list[Path]:
    """Checkpoints and models that are being written."""
    return [
        *(run_dir / "checkpoints").glob("*orbax-checkpoint-tmp*"),
        *run_dir.glob(".model-*"),
    ]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
