"""One run in 1, 2 and 4 processes, one of which is killed: a table, and evidence.

    python scripts/process_table.py --out docs/evidence/processes.jsonl
    python scripts/process_table.py --science --out docs/evidence/processes.jsonl

The command ``jaxrl-post train`` runs a small config in one process. Then it runs in
several, on loopback; when the second checkpoint is there, one process is killed with
SIGKILL, or halted by SIGSTOP, as one is whose host is frozen. All others must have
ended within 90 s, say which one was lost, and return 1. Then the same folder is resumed
by another number of processes on another mesh, and the finished run is compared with
that of one process: completions, rewards, losses, gradients.

With ``--science`` it is instead the quickstart's training in two processes, whose
accuracy is put beside those of one process with other seeds (quickstart.jsonl).

The exit code is 1 where a row is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]

CONFIG: Mapping[str, Any] = {
    "model": {"path": "science_base"},
    "task": {"name": "science", "levels": [1], "max_prompt_length": 48},
    "recipe": {"name": "pgpo", "max_length": 128},
    "optimizer": {"learning_rate": 3e-4},
    "training": {
        "steps": 8,
        "prompts_per_step": 4,
        "group_size": 4,
        "checkpoint_every": 1,
    },
    "sampling": {"max_new_tokens": 16},
    "evaluation": {"science": {"rows": 8, "samples": 2}},
    "run": {"judge_workers": 1},
}

CLOSE = ("loss", "grad_norm", "entropy", "reward/mean", "information/gain")
"""Metrics that must agree within `TOLERANCE` where the tokens do."""

TOLERANCE = 1e-5

ALL_ENDED_WITHIN = 90.0
"""Seconds."""


@dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh of all their devices."""

    processes: int
    devices: int
    data: int
    fsdp: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        mesh = f"{self.data}x{self.fsdp}x{self.tensor}"
        return f"{self.processes} x {self.devices}, {mesh}"

    def overrides(self) -> list[str]:
        """The section `mesh` of a config."""
        return [f"mesh.{axis}={getattr(self, axis)}" for axis in MESH]


MESH = ("data", "fsdp", "tensor")

ONE = Layout(1, 1, data=1)

CASES = (
    # (begun by, process that is lost, how, resumed by)
    (Layout(2, 1, data=2), 1, "SIGKILL", Layout(4, 1, data=2, fsdp=2)),
    (
        Layout(4, 1, data=1, fsdp=2, tensor=2),
        0,
        "SIGKILL",
        Layout(2, 2, data=2, fsdp=1, tensor=2),
    ),
    (Layout(2, 2, data=2, fsdp=2), 0, "SIGKILL", ONE),
    (Layout(2, 1, data=2), 1, "SIGSTOP", ONE),
)

Case = tuple[Layout, int, str, Layout]


@dataclass
class Ended:
    """How the processes of a run ended.

    Attributes:
      codes: exit code of each.
      output: what each wrote.
      seconds: from the signal, or the start, to the end of the last that is not halted.
    """

    codes: list[int | None]
    output: list[str]
    seconds: float


def train(
    layout: Layout,
    arguments: Sequence[str],
    *,
    kill: int | None = None,
    when: Path | None = None,
    signum: int = signal.SIGKILL,
    within: float = 600.0,
    heartbeat: int = 10,
    folders: Sequence[Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs ``jaxrl-post train`` in the processes of a layout.

    Args:
      layout: processes and devices.
      arguments: of the command, after `train`.
      kill: the process that gets a signal.
      when: this path is there.
      signum: the signal.
      within: seconds, from the signal or the start, after which a process hangs: it is
        killed, and its code is None.
      heartbeat: seconds of silence after which a process is lost.
      folders: where each process runs; by default here.
      environment: further variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(layout.devices),
        "PYTHONUNBUFFERED": "1",
        "NPROC": "32",  # threads: devices of one process that wait for each other
        **(environment or {}),
    }
    children = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(layout.processes)]
        for index, file in enumerate(files):
            group = [
                f"--coordinator=127.0.0.1:{port}",
                f"--processes={layout.processes}",
                f"--process={index}",
                f"--heartbeat-timeout={heartbeat}",
                "--start-timeout=60",
            ]
            command = [sys.executable, "-m", "jaxrl_post.cli", "train", *arguments]
            command += group if layout.processes > 1 else []
            with file.open("wb") as out:
                children.append(
                    subprocess.Popen(
                        command,
                        cwd=folders[index] if folders else None,
                        env=variables,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            if kill is not None and when is not None:
                while not when.exists() and all(c.poll() is None for c in children):
                    time.sleep(0.02)
                os.kill(working(children[kill].pid), signum)
            start = time.monotonic()
            codes: list[int | None] = [None] * len(children)
            halted = kill if signum == signal.SIGSTOP else None
            for index in sorted(range(len(children)), key=lambda i: i == halted):
                if index == halted:
                    seconds = time.monotonic() - start
                    os.kill(working(children[index].pid), signal.SIGKILL)
                left = start + within - time.monotonic()
                codes[index] = _wait(children[index], left)
            if halted is None:
                seconds = time.monotonic() - start
        finally:
            for child in children:
                child.kill()
        output = [file.read_text(errors="replace") for file in files]
    return Ended(codes, output, seconds)


def working(pid: int) -> int:
    """The process that computes, below the one that watches it."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(below[0]) if below else pid


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    try:
        return child.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        child.kill()
        return None


def compare(run: Path, other: Path) -> dict[str, Any]:
    """What of two runs is equal, and how far the rest is apart.

    Returns:
      ``same_tokens`` of ``tokens``, and the largest ``difference`` of a metric of
      `CLOSE` over the steps up to the first where a token differs.
    """
    same = total = 0
    worst = 0.0
    alike = True
    for row, expected in zip(_rows(run), _rows(other), strict=True):
        if row["step"]:
            ours, theirs = (
                _completions(folder, row["step"]) for folder in (run, other)
            )
            for a, b in zip(ours, theirs, strict=True):
                total += len(b)
                same += sum(x == y for x, y in zip(a, b, strict=False))
                alike &= a == b
        if alike:
            gaps = [abs(row[k] - expected[k]) for k in CLOSE if k in expected]
            worst = max([worst, *gaps])
    return {"same_tokens": same, "tokens": total, "difference": worst}


def _rows(run: Path) -> list[dict[str, Any]]:
    return _json_lines(run / "metrics.jsonl")


def _completions(run: Path, step: int) -> list[list[int]]:
    path = run / "completions" / f"step_{step:06d}.jsonl"
    return [row["response_ids"] for row in _json_lines(path)]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_and_resume(
    folder: Path,
    arguments: Sequence[str],
    single: Path,
    case: Case,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One row of the table.

    Args:
      folder: for the run's own.
      arguments: a config and overrides of it.
      single: the folder of the finished run in one process.
      case: of `CASES`.
      environment: further variables.
    """
    begun, victim, how, resumed = case
    run = folder / f"{begun.processes}-processes-of-{begun.devices}-{how}"
    told = [*arguments, f"run.dir={run}"]
    lost = train(
        begun,
        [*told, *begun.overrides()],
        kill=victim,
        when=run / "checkpoints" / "2",
        signum=signal.Signals[how],
        within=ALL_ENDED_WITHIN,
        environment=environment,
    )
    saved = [int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()]
    after = train(resumed, [*told, *resumed.overrides()], environment=environment)
    survivors = [i for i in range(begun.processes) if i != victim]
    cause = f"process {victim} of {begun.processes} was lost"
    row = {
        "study": "processes",
        "begun": str(begun),
        "lost": victim,
        "signal": how,
        "codes": lost.codes,
        "seconds_to_end": round(lost.seconds, 1),
        "cause_told": all(cause in lost.output[i] for i in survivors),
        "resumed": str(resumed),
        "resumed_after": max(saved),
        "resumed_codes": after.codes,
    }
    ended = all(code == 1 for code in lost.codes) and not any(after.codes)
    if ended:
        row |= compare(run, single)
    row["good"] = ended and row["cause_told"] and row["difference"] <= TOLERANCE
    if not row["good"]:
        print("\n".join(text[-3000:] for text in [*lost.output, *after.output]))
    return row


def science(folder: Path, seed: int) -> dict[str, Any]:
    """The quickstart in two processes, beside its seeds in one."""
    config, score = "quickstart", "science/avg@16"
    known = [
        row["scores"][score][1]
        for row in _json_lines(ROOT / "docs/evidence/quickstart.jsonl")
        if row["config"] == config
    ]
    layout = Layout(2, 1, data=2)
    run = folder / "science"
    told = [str(ROOT / f"configs/{config}.yaml"), f"run.dir={run}", f"run.seed={seed}"]
    start = time.monotonic()
    ended = train(layout, [*told, *layout.overrides()], within=3600)
    if any(ended.codes):
        sys.exit("\n".join(ended.output))
    reached = _rows(run)[-1][f"eval/{score}"]
    return {
        "study": "science",
        "config": config,
        "layout": str(layout),
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        score: reached,
        "single": [min(known), max(known)],
        "good": min(known) <= reached <= max(known),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every row is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="one JSON object per line, appended")
    parser.add_argument("--science", action="store_true", help="the quickstart instead")
    parser.add_argument("--seed", type=int, default=0, help="of the quickstart")
    parser.add_argument("--case", type=int, help="of the table, from 0; by default all")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        if arguments.science:
            rows.append(science(folder, arguments.seed))
        else:
            rows += _table(
                folder, CASES if arguments.case is None else [CASES[arguments.case]]
            )
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0 if all(row["good"] for row in rows) else 1


def _table(folder: Path, cases: Sequence[Case]):
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(dict(CONFIG)))
    single = folder / "single"
    told = [str(config), f"run.dir={single}"]
    ended = train(ONE, [*told, *ONE.overrides()], environment=compiled)
    if any(ended.codes):
        sys.exit("\n".join(ended.output))
    for case in cases:
        row = kill_and_resume(folder, [str(config)], single, case, compiled)
        print("  ".join(f"{k} {v}" for k, v in row.items() if k != "study"), flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
