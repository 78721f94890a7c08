"""Runs that are stopped, and what of two runs must be equal."""

from __future__ import annotations

import signal

import jax
import numpy as np

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
