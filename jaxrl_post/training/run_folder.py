"""A run's folder: whose it is, what it holds, with which config it may go on."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxrl_post.errors import ConfigError, InputError
from jaxrl_post.sharding import processes
from jaxrl_post.tasks.lookup import is_own
from jaxrl_post.training.config import Config
from jaxrl_post.training.configfile import flat_keys
from jaxrl_post.training.metrics import FILE_NAME, read_metrics
from jaxrl_post.training.optimizer import takes

MODEL = "model"
"""Where in a run's folder the trained model is written, for others to open."""

_LOCK = "lock"

_SEEN_WITHIN = 10
"""Seconds until a file that one process made is there for another, on any network."""

_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_MAY_CHANGE = (
    "model.attention",  # these two round otherwise, as another mesh does
    "model.remat",
    "run.dir",
    "run.judge_workers",
    "run.grace_seconds",
    "training.steps",
    "training.micro_batch_tokens",
    "training.micro_batch_tokens_per_shard",
    "training.chunk_size",
    "training.evaluate_every",
    "training.teacher_samples",
    "training.teacher_tokens",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.offload",
    "training.keep_best",
    "training.max_skipped_updates",
    "sampling.slots",
    "sampling.slots_per_shard",
    "evaluation",
    "mesh",
    "tracking",
)
"""Keys that a resumed run may have other values of: they decide how much is done and
measured, not what a step computes. (With a schedule that ends at the last update,
`training.steps` does more: it is then refused, as it is for a stage that another one
follows.)"""


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Makes the folder and holds its lock.

    The system lets go of a lock when its process ends, however it ends, so there is
    none to clean up after a crash.

    Where bad input ends a run before it has begun, what was made here is removed.

    Raises:
      InputError: the folder cannot be written to, or another process trains in it.
    """
    new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
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
        try:
            yield
        except InputError:
            if [path.name for path in run_dir.iterdir()] == [_LOCK]:
                (run_dir / _LOCK).unlink()
                with suppress(OSError):  # not empty: somebody else's by now
                    for path in new:
                        path.rmdir()
            raise


def check_shared(run_dir: Path) -> None:
    """Sees to it that all processes of the run have the same folder.

    Raises:
      InputError: one does not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    name = processes.on_main(lambda: f".seen-{secrets.token_hex(8)}")
    processes.on_main((run_dir / name).touch)

    def look() -> None:
        end = time.monotonic() + _SEEN_WITHIN
        while name not in os.listdir(run_dir):  # which asks a server anew
            if time.monotonic() > end:
                raise FileNotFoundError

    try:
        processes.together(look)
    except (OSError, RuntimeError):
        raise InputError(
            f"run.dir={str(run_dir)!r}: not every process sees there what process 0 "
            "writes; it has to be one folder, on a file system that they share."
        ) from None
    finally:
        if processes.is_main():
            (run_dir / name).unlink()


def check_unchanged(
    run_dir: Path, config: Config, *, allow_changes: bool = False
) -> list[str]:
    """Compares a run's config with the one that it is to go on with.

    Args:
      run_dir: of the run.
      config: what it is told now.
      allow_changes: go on even where the mathematics changes.

    Returns:
      A line for each key that changed, where the run may go on.

    Raises:
      InputError: a key that alters the mathematics differs, and `allow_changes` is not
        given; all that differ are named, with both values.
    """
    path = run_dir / "config.yaml"
    if not path.exists() or not (run_dir / FILE_NAME).exists():
        return []
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    with suppress(ConfigError):  # keys added since then had their defaults
        tree = yaml.safe_load(Config.from_dict(tree).to_yaml())
    before = _keys(tree)
    now = _keys(yaml.safe_load(config.to_yaml()))
    changed = {
        key: _may_change(key, config)
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    }
    lines = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        + ("" if harmless else " (alters the mathematics)")
        for key, harmless in changed.items()
    ]
    if not all(changed.values()) and not allow_changes:
        raise InputError(
            f"run.dir={str(run_dir)!r} holds a run with another config:\n  "
            + "\n  ".join(lines)
            + "\nUndo the changes to resume it, choose another run.dir, or give "
            "--allow-changes to go on with them."
        )
    return lines


def clean(run_dir: Path) -> None:
    """Removes what a process left that was killed while it wrote the model."""
    for scratch in run_dir.glob(f".{MODEL}-*"):
        shutil.rmtree(scratch)


@contextmanager
def disk_errors(run_dir: Path) -> Iterator[None]:
    """Makes one clear error of a disk that is full, or not to be written to.

    Raises:
      InputError: in the place of such an error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if problem := _disk_problem(error, run_dir):
            raise InputError(
                f"run.dir={str(run_dir)!r}: {problem}. What was written before is "
                "whole; make room there, or make it writable, and run the same "
                "command again to resume."
            ) from error
        raise


def _disk_problem(error: BaseException | None, run_dir: Path) -> str | None:
    """The system's words for it, wherever in the chain of causes they stand."""
    while error is not None:
        # Of a file elsewhere it may be anything, such as the fault of a task.
        if isinstance(error, PermissionError) and isinstance(error.filename, str):
            if Path(error.filename).absolute().is_relative_to(run_dir.absolute()):
                return f"{error.filename}: {error.strerror}"
        for number in _OF_DISK:
            # tensorstore, below Orbax, passes the words on and not the number.
            if getattr(error, "errno", None) == number:
                return os.strerror(number)
            if os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def succeeded(run_dir: Path) -> bool:
    """Whether the last step of a run had a success."""
    if not (run_dir / FILE_NAME).exists():
        return False
    rows = read_metrics(run_dir)
    return bool(rows) and (rows[-1].get("reward/success") or 0.0) > 0


def final_row(
    run_dir: Path, steps: int, stop_at_success: bool = False
) -> Mapping[str, Any] | None:
    """The last row of a run that is finished, or None.

    The model is written after the last row; an older one is that of a run which was
    then made longer, and killed before it wrote its own.
    """
    model, metrics = run_dir / MODEL / "config.json", run_dir / FILE_NAME
    if not model.exists() or not metrics.exists():
        return None
    if model.stat().st_mtime_ns < metrics.stat().st_mtime_ns:
        return None
    rows = read_metrics(run_dir)
    done = bool(rows) and rows[-1]["step"] == steps
    return rows[-1] if done or (stop_at_success and succeeded(run_dir)) else None


def _may_change(key: str, config: Config) -> bool:
    stage = next((s for s in config.stages if key.startswith(f"stages.{s}.")), None)
    key = key.removeprefix(f"stages.{stage}.")
    if key == "training.steps":
        last = next(reversed([*config.stages]), None)
        section = (config.stage(last) if last else config).optimizer
        counts = is_own(section.name) and takes(section, "updates")
        return stage == last and section.schedule == "constant" and not counts
    return f"{key}.".startswith(tuple(f"{name}." for name in _MAY_CHANGE))


def _keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a config; of stages their order too, and the steps of each."""
    flat = flat_keys(tree)
    if stages := tree.get("stages"):
        flat["stages"] = [*stages]
        steps = flat.pop("training.steps", None)
        for name in stages:
            flat.pop(f"stages.{name}", None)  # a stage that changes nothing
            flat.setdefault(f"stages.{name}.training.steps", steps)
    return flat
