"""A run compiles what it needs in its first step, and nothing later."""

from __future__ import annotations

from collections import Counter

import jax

from jaxrl_post import training
from jaxrl_post.training.progress import Progress

EVENT = "/jax/core/compile/backend_compile_duration"


def test_nothing_is_compiled_after_the_first_step(tiny_config):
    """Prompts and answers of other lengths, evaluations and checkpoints included."""
    compiled, step = Counter(), 0

    def note(event, seconds, **about):
        if event == EVENT:
            compiled[step] += 1

    class Stepwise(Progress):
        def update(self, done, row):
            nonlocal step
            super().update(done, row)
            step = done + 1

    options = {"steps": 5, "evaluate_every": 2, "checkpoint_every": 2}
    config = tiny_config(training=options, task={"count": 40})
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        training.run(config, progress=Stepwise)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    # The base's evaluation, and the step that trains first; half of these are single
    # operations of a microsecond.
    assert set(compiled) == {0, 1}
    assert compiled.total() < 80
