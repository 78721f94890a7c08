"""Updates that were skipped: their batches kept, and the run ended when it must be."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_post.recipes.batch import Batch

FOLDER = "faults"

MOST = 10
"""Batches that are kept of a run: the first ones tell how it began."""


def save_batch(
    run_dir: Path, step: int, update: int, batch: Batch, metrics: Mapping[str, Any]
) -> Path | None:
    """Keeps the batch of a skipped update, for a look at what was wrong with it.

    The file ``faults/step_000012_update_1.npz`` holds every array of the batch by the
    name of its field, such as ``advantages`` or ``extras['distilled']``, and every
    metric of the update as ``metric/<name>``.

    Args:
      run_dir: the run's folder.
      step: of the run.
      update: of the step, counted from 1.
      batch: on the host or a device.
      metrics: of the update.

    Returns:
      The file; None where the folder already holds `MOST` others.
    """
    folder = run_dir / FOLDER
    path = folder / f"step_{step:06d}_update_{update}.npz"
    if not path.exists() and len([*folder.glob("*.npz")]) >= MOST:
        return None
    folder.mkdir(exist_ok=True)
    arrays = {
        jax.tree_util.keystr(where).lstrip("."): np.asarray(leaf)
        for where, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    arrays |= {f"metric/{name}": np.asarray(x) for name, x in metrics.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    partial = path.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)
    return path


def stop_if_stuck(skipped: int, step: int, limit: int, key: str) -> None:
    """Ends a run that learns nothing any more.

    Args:
      skipped: `TrainState.skipped` after the step.
      step: its number.
      limit: skipped updates in a row that are too many.
      key: of that limit in the config.

    Raises:
      RuntimeError: with advice.
    """
    if skipped >= limit:
        raise RuntimeError(
            f"step {step}: the last {skipped} updates were skipped, for losses or "
            f"gradients that were not finite or, with training.spike_deviations, too "
            f"large ({key}={limit}). The parameters are those before them, and "
            f"{FOLDER}/ has the batches. Lower optimizer.learning_rate, and begin in "
            "another run.dir; with model.compute_dtype=bfloat16, try float32; the "
            "metrics of the steps before (grad_norm, entropy, sampler/logp_gap) show "
            "what led there."
        )
