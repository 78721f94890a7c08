"""Checkpoints of a run, through Orbax: each whole or not there, and known to be right.

Orbax writes into a temporary folder and renames it, so that a process that dies leaves
a whole checkpoint or none. Disks and hands do damage later: each array's checksum,
taken in memory before the array is written, goes with the checkpoint and is compared
when it is read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_post.errors import InputError
from jaxrl_post.sharding import processes
from jaxrl_post.training.fingerprints import SHA256, SUMS, checksums, kind_for, sums
from jaxrl_post.training.flat_state import flatten, unflatten
from jaxrl_post.training.preservation import Preservation, watch
from jaxrl_post.training.state import TrainState

FOLDER = "checkpoints"


class DamagedCheckpoint(InputError):
    """A checkpoint cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The checkpoints in a run's folder.

    A checkpoint holds the whole `TrainState` as a flat mapping from paths to arrays:
    what is compared on restoring is then names and shapes, not classes of optax.
    Of frozen parameters it holds the checksums alone: they are where they came from.
    Saving is asynchronous; `wait` and `close` finish it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: int = 2,
        best: str | None = None,
        about: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        """Opens the folder, made if absent.

        Args:
          run_dir: the run's folder.
          keep: how many of the newest checkpoints stay.
          best: a metric; the checkpoint where it is greatest stays too.
          about: what is saved with each, as JSON: the run's config, the code's version.
          read_only: for a run that another process may be writing.
        """
        self._folder = (Path(run_dir) / FOLDER).absolute()
        self._best, self._about = best, dict(about or {})
        self._scores: dict[int, float] = {}
        self._failures: list[Exception] = []
        self._frozen: dict[str, str] | None = None
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers=watch(ocp.StandardCheckpointHandler(), self._failures.append),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=Preservation(keep, self._scores),
                enable_async_checkpointing=True,
                create=not read_only,
                # What a killed process left of a checkpoint that it was writing.
                cleanup_tmp_directories=not read_only,
            ),
        )
        if best is not None:
            for step in self._manager.all_steps():
                self._note_score(step, self.about(step).get("metrics", {}))

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def about(self, step: int) -> dict[str, Any]:
        """What was saved with a checkpoint besides its arrays: ``about``, the
        ``metrics`` of its step and the arrays' checksums; empty if unreadable."""
        try:
            return dict(self._manager.metadata(step).custom_metadata or {})
        except Exception as error:
            _raise_unless_damage(error)
            return {}

    def save(self, state: TrainState, metrics: Mapping[str, Any] | None = None) -> None:
        """Begins to save the state under its step; a step is saved once.

        Args:
          state: after a step.
          metrics: of that step, where one may be that of the best checkpoint.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._finish()
        arrays = flatten(state)
        kind = kind_for(arrays)
        self._note_score(step, metrics or {})
        self._manager.save(
            step,
            args=ocp.args.StandardSave(arrays),
            custom_metadata={
                "about": self._about,
                "metrics": {self._best: self._scores[step]}
                if step in self._scores
                else {},
                kind: checksums(arrays, kind),
                **({"frozen": self._sums_of_frozen(state)} if state.frozen else {}),
            },
        )

    def resume(
        self, like: Callable[[int], TrainState], report: Callable[[str], None] = print
    ) -> TrainState | None:
        """The state of the newest checkpoint that is whole; None where there is none.

        Damaged ones after it are reported and renamed ``damaged-<step>``: their steps
        will be done again.

        Args:
          like: gives, for a step, a state to lay the checkpoint out like.
          report: gets a line for each damaged checkpoint.

        Raises:
          InputError: a checkpoint does not fit the run, or all are damaged.
        """
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self.restore(like(step), step)
            except DamagedCheckpoint as error:
                report(f"{error} The checkpoint before it is used.")
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return state
        if damaged:
            raise InputError(
                f"{self._folder}: none of the checkpoints {sorted(damaged)} is whole, "
                "so the run cannot go on. Restore one from a backup, or delete "
                f"{self._folder} to begin again."
            )
        return None

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state of a checkpoint, laid out like `like`.

        Args:
          like: a state of the run that resumes; gives shapes, dtypes and shardings.
          step: which; None: the newest.

        Raises:
          DamagedCheckpoint: it cannot be read, or an array is not the one saved.
          InputError: the checkpoint does not fit; every difference is listed. Or the
            frozen parameters are not those that it was made with.
        """
        step = self.latest() if step is None else step
        wanted = flatten(like)
        found = self._list(step)
        problems = [f"missing: {name}" for name in wanted if name not in found]
        problems += [f"not expected: {name}" for name in found if name not in wanted]
        problems += [
            f"{name}: shape {tuple(found[name].shape)}, expected {value.shape}"
            for name, value in wanted.items()
            if name in found and tuple(found[name].shape) != tuple(value.shape)
        ]
        if problems:
            raise InputError(
                f"checkpoint {step} does not fit this run:\n  "
                + "\n  ".join(problems)
                + "\nResume with the model, recipe and optimizer that it was made "
                "with, or give the run another run.dir."
            )
        saved = self.about(step).get("frozen", {}) if step is not None else {}
        frozen = self._sums_of_frozen(like) if saved else {}
        if other := sorted(k for k, v in frozen.items() if saved.get(k) != v):
            raise InputError(
                f"checkpoint {step} is of an adapter to other weights: "
                f"{', '.join(other)} differ(s). Resume with the model that it was "
                "trained on, or give the run another run.dir."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        return unflatten(like, self._verified(step, abstract))

    def arrays(self) -> dict[str, Any]:
        """What the newest checkpoint holds, by path, as host arrays.

        Raises:
          InputError: there is none, or it is damaged.
        """
        if (step := self.latest()) is None:
            raise InputError(f"{self._folder}: there is no checkpoint yet.")
        # As NumPy's: the devices that they lay on may not be there.
        abstract = {
            name: np.broadcast_to(np.zeros((), found.dtype), found.shape)
            for name, found in self._list(step).items()
        }
        return self._verified(step, abstract)

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._finish()

    def _finish(self) -> None:
        """Waits, as Orbax would long for a process that could not write its part: what
        kept one of them from it is raised in all."""
        if jax.process_count() == 1:
            self._manager.wait_until_finished()
            return
        waiting = ThreadPoolExecutor(1)
        saved = waiting.submit(self._manager.wait_until_finished)
        waiting.shutdown(wait=False)

        def is_saving() -> bool:
            if self._failures:
                raise self._failures[0]
            if not saved.done():
                return True
            saved.result()  # its error, if any
            return False

        pause = 0.01
        while any(processes.gather(is_saving)):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def close(self) -> None:
        """Finishes saving and lets go of the folder."""
        self._finish()
        self._manager.close()

    def preempted(self, step: int) -> bool:
        """Whether the machines are about to be taken away, as all processes agree.

        jax's preemption service, which ``jax.distributed.initialize`` starts, carries
        the notice of one machine to all and names the step to stop after.
        """
        return self._manager.reached_preemption(step)

    def _list(self, step: int | None) -> dict[str, Any]:
        """What a checkpoint holds, unread."""

        def read() -> dict[str, Any]:
            found = self._read(step, lambda: self._manager.item_metadata(step))
            if found := dict(getattr(found, "tree", found) or {}):
                return found
            raise DamagedCheckpoint(
                f"{self._folder / str(step)}: damaged: the list of its arrays is gone."
            )

        return processes.together(read)

    def _sums_of_frozen(self, state: TrainState) -> dict[str, str]:
        """Checksums of what never changes, taken once."""
        if self._frozen is None:
            leaves = jax.tree_util.tree_leaves_with_path(state.frozen)
            self._frozen = sums({jax.tree_util.keystr(p): x for p, x in leaves})
        return self._frozen

    def _verified(self, step: int | None, abstract: Any) -> dict[str, Any]:
        args = ocp.args.StandardRestore(abstract)
        # Before the checksums, which all processes compute together or none.
        arrays = processes.together(
            lambda: self._read(step, lambda: self._manager.restore(step, args=args))
        )
        about = self.about(step) if step is not None else {}
        kind = next((kind for kind in (SHA256, SUMS) if about.get(kind)), None)
        if kind is None:
            raise DamagedCheckpoint(
                f"{self._folder / str(step)}: damaged: there are no checksums."
            )
        saved, now = about[kind], checksums(arrays, kind)
        if wrong := sorted(name for name in now if now[name] != saved.get(name)):
            raise DamagedCheckpoint(
                f"{self._folder / str(step)}: damaged: {', '.join(wrong)} differ(s) "
                "from what was saved."
            )
        return arrays

    def _read(self, step: int | None, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            _raise_unless_damage(error)
            first = str(error).strip().partition("\n")[0][:200]
            raise DamagedCheckpoint(
                f"{self._folder / str(step)}: damaged, it cannot be read: {first}."
            ) from error

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self._folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(step)).rename(aside)
                self._scores.pop(step, None)
        ocp.multihost.sync_global_processes("jaxrl_post:damaged")
        self._manager.reload()

    def _note_score(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._best) if self._best else None
        if value is not None and np.isfinite(value):
            self._scores[step] = float(value)


def newest_step(run_dir: str | Path) -> int:
    """The step of a run's newest checkpoint.

    Raises:
      InputError: there is no checkpoint.
    """
    folder = Path(run_dir) / FOLDER
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    if not steps:
        raise InputError(f"{run_dir}: there is no checkpoint yet.")
    return max(steps)


def load_policy(
    run_dir: str | Path, mesh: jax.sharding.Mesh | None = None
) -> tuple[Any, Any, Any]:
    """Policy, parameters and tokenizer of a run, as its newest checkpoint has them.

    Args:
      run_dir: the run's folder, with its ``config.yaml``.
      mesh: that the parameters are to lie on, if any.

    Raises:
      InputError: there is no checkpoint.
    """
    from jaxrl_post.training.config import load_config
    from jaxrl_post.training.setup import open_model

    config = load_config(Path(run_dir) / "config.yaml")
    newest_step(run_dir)  # raises
    checkpoints = Checkpoints(run_dir, read_only=True)
    try:
        saved = checkpoints.arrays()
    finally:
        checkpoints.close()
    policy, params, tokenizer = open_model(config, mesh)

    def newest(path, leaf):
        name = f".trainable{jax.tree_util.keystr(path)}"
        return processes.place(saved[name], leaf.sharding) if name in saved else leaf

    return policy, jax.tree_util.tree_map_with_path(newest, params), tokenizer


def _raise_unless_damage(error: Exception) -> None:
    """A machine without memory for a checkpoint says nothing about the checkpoint."""
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        raise error
