"""Checkpoints of a run, through Orbax, each whole or not there at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_post.errors import InputError
from jaxrl_post.training.state import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints in a run's folder.

    A checkpoint holds the whole `TrainState` as a flat mapping from paths to arrays:
    what is compared on restoring is then names and shapes, not classes of optax.
    Saving is asynchronous; `wait` and `close` finish it.
    """

    def __init__(self, run_dir: str | Path, *, keep: int = 2) -> None:
        """Opens the folder, made if absent.

        Args:
          run_dir: the run's folder.
          keep: how many of the newest checkpoints stay.
        """
        self._manager = ocp.CheckpointManager(
            (Path(run_dir) / FOLDER).absolute(),
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, create=True
            ),
        )

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Begins to save the state under its step; a step is saved once."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_flatten(state)))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state of a checkpoint, laid out like `like`.

        Args:
          like: a state of the run that resumes; gives shapes, dtypes and shardings.
          step: which; None: the newest.

        Raises:
          InputError: the checkpoint does not fit; every difference is listed.
        """
        step = self.latest() if step is None else step
        wanted = _flatten(like)
        found = self._manager.item_metadata(step)
        found = dict(getattr(found, "tree", found) or {})
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
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return _unflatten(like, restored)

    def arrays(self) -> dict[str, Any]:
        """What the newest checkpoint holds, by path, as host arrays.

        Raises:
          InputError: there is none.
        """
        if (step := self.latest()) is None:
            raise InputError(f"{self._manager.directory}: there is no checkpoint yet.")
        return self._manager.restore(step, args=ocp.args.StandardRestore())

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes saving and lets go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_policy(run_dir: str | Path) -> tuple[Any, Any, Any]:
    """Policy, parameters and tokenizer of a run, as its newest checkpoint has them.

    Args:
      run_dir: the run's folder, with its ``config.yaml``.

    Raises:
      InputError: there is no checkpoint.
    """
    from jaxrl_post.training.config import load_config
    from jaxrl_post.training.setup import open_model

    config = load_config(Path(run_dir) / "config.yaml")
    if not (Path(run_dir) / FOLDER).is_dir():
        raise InputError(f"{run_dir}: there is no checkpoint yet.")
    checkpoints = Checkpoints(run_dir)
    try:
        saved = checkpoints.arrays()
    finally:
        checkpoints.close()
    policy, params, tokenizer = open_model(config)

    def newest(path, leaf):
        name = f".trainable{jax.tree_util.keystr(path)}"
        return jax.device_put(saved[name], leaf.sharding) if name in saved else leaf

    return policy, jax.tree_util.tree_map_with_path(newest, params), tokenizer


def _flatten(state: TrainState) -> dict[str, Any]:
    """Arrays by path; the random key as its data; empty arrays, which Orbax refuses,
    left out. The host's float64 goes by its bits: jax would round it."""
    state = state.replace(rng=jax.random.key_data(state.rng))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): leaf.view(np.uint32) if _is_double(leaf) else leaf
        for path, leaf in leaves
        if leaf.size
    }


def _unflatten(like: TrainState, leaves: dict[str, Any]) -> TrainState:
    def restored(path, leaf):
        if not leaf.size:
            return leaf
        value = leaves[jax.tree_util.keystr(path)]
        return np.asarray(value).view(np.float64) if _is_double(leaf) else value

    state = jax.tree_util.tree_map_with_path(
        restored, like.replace(rng=jax.random.key_data(like.rng))
    )
    impl = jax.random.key_impl(like.rng)
    return state.replace(rng=jax.random.wrap_key_data(state.rng, impl=impl))


def _is_double(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype == np.float64
