"""Runs that are stopped, and what of two runs must be equal."""

from __future__ import annotations

import signal

import jax
import numpy as np

from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.progress import Progress


def lasting(rows):
    """Rows without what may differ between two identical runs."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
        for row in rows
    ]


class StopAfter(Progress):
    """Sends this process a signal when a step has been shown."""

    step = 2
    signum = signal.SIGINT

    def update(self, step, row):
        super().update(step, row)
        if step == self.step:
            signal.raise_signal(self.signum)


def assert_same_state(state, other):
    """To the bit, but for the random key, which has no numbers to compare."""
    for a, b in zip(
        jax.tree.leaves(state.replace(rng=0)),
        jax.tree.leaves(other.replace(rng=0)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


class DieAfter(Progress):
    """Raises when a step has been shown: what was not saved by then is lost."""

    step = 3

    def update(self, step, row):
        super().update(step, row)
        if step == self.step:
            raise Died


class Died(Exception):
    """Stands for whatever may end a process."""


def files(folder):
    """The bytes of every file, by its path below the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_run(run, other):
    """Metrics but for times, completions and checkpoints of two folders, to the bit."""
    assert lasting(read_metrics(run)) == lasting(read_metrics(other))
    assert files(run / "completions") == files(other / "completions")
    saved, expected = newest_arrays(run), newest_arrays(other)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def newest_arrays(run):
    """What the newest checkpoint of a run holds, by path."""
    checkpoints = Checkpoints(run, read_only=True)
    try:
        return checkpoints.arrays()
    finally:
        checkpoints.close()
