"""A run's folder and process: whose it is, what it holds, what may interrupt it."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from jaxrl_post.errors import InputError
from jaxrl_post.training.config import Config
from jaxrl_post.training.metrics import FILE_NAME, read_metrics

MODEL = "model"
"""Where in a run's folder the trained model is written, for others to open."""

_LOCK = "lock"

_MAY_CHANGE = (
    "run.dir",
    "run.judge_workers",
    "training.steps",
    "training.micro_batch_tokens",
    "training.chunk_size",
    "training.evaluate_every",
    "training.teacher_samples",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.max_skipped_updates",
    "sampling.slots",
    "evaluation",
    "mesh",
)
"""Keys that a resumed run may have other values of: they decide how much is done and
measured, not what a step computes. (With a schedule that ends at the last update,
`training.steps` does more: it is then refused, as it is for a stage that another one
follows.)"""


class Interrupted(Exception):
    """A signal ended the run; everything is saved.

    Attributes:
      signum: which signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """Whether the run was asked to stop.

    Attributes:
      received: the signal's number, or None.
    """

    received: int | None = None


@contextmanager
def signals() -> Iterator[Signals]:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts.

    In a thread other than the main one, where Python allows no handlers, it does
    nothing.
    """
    noted = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum, frame):
        del frame
        if noted.received == signal.SIGINT == signum:
            raise KeyboardInterrupt
        noted.received = signum

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Makes the folder and holds its lock.

    The system lets go of a lock when its process ends, however it ends, so there is
    none to clean up after a crash.

    Raises:
      InputError: the folder cannot be written to, or another process trains in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / _LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"run.dir={str(run_dir)!r} cannot be written: {error}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InputError(
                f"run.dir={str(run_dir)!r} is in use by process {lock.read().strip()}; "
                "wait for it, stop it, or choose another run.dir."
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def check_unchanged(run_dir: Path, config: Config) -> None:
    """Refuses to go on in a folder whose run was told something else.

    Raises:
      InputError: every key that differs and matters, with both values.
    """
    path = run_dir / "config.yaml"
    if not path.exists() or not (run_dir / FILE_NAME).exists():
        return
    before = _keys(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    now = _keys(yaml.safe_load(config.to_yaml()))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _may_change(key, config)
    ]
    if changed:
        raise InputError(
            f"run.dir={str(run_dir)!r} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nUndo the changes to resume it, or choose another run.dir."
        )


def final_row(run_dir: Path, steps: int) -> Mapping[str, Any] | None:
    """The last row of a run that is finished, or None."""
    if not (run_dir / MODEL).is_dir() or not (run_dir / FILE_NAME).exists():
        return None
    rows = read_metrics(run_dir)
    return rows[-1] if rows and rows[-1]["step"] == steps else None


def _may_change(key: str, config: Config) -> bool:
    stage = next((s for s in config.stages if key.startswith(f"stages.{s}.")), None)
    key = key.removeprefix(f"stages.{stage}.")
    if key == "training.steps":
        last = next(reversed([*config.stages]), None)
        schedule = (config.stage(last) if last else config).optimizer.schedule
        return stage == last and schedule == "constant"
    return f"{key}.".startswith(tuple(f"{name}." for name in _MAY_CHANGE))


def _keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a config; of stages their order too, and the steps of each."""
    flat = _flatten(tree)
    if stages := tree.get("stages"):
        flat["stages"] = [*stages]
        steps = flat.pop("training.steps", None)
        for name in stages:
            flat.pop(f"stages.{name}", None)  # a stage that changes nothing
            flat.setdefault(f"stages.{name}.training.steps", steps)
    return flat


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
