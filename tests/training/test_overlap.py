"""What the host and the device do at the same time, and what they wait for."""

from __future__ import annotations

import time
from collections import Counter

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from tiny_runs import assert_same_run

from jaxrl_post import training
from jaxrl_post.generation import Sampler
from jaxrl_post.training.rollout import Collector

NOTING = {"name": "noting_task:load", "max_prompt_length": 16}


def wait_for_lines(path, count):
    """Returns when a file has so many lines; the judge writes one for each verdict."""
    end = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end, "nothing is judged before the last token"
        time.sleep(0.01)


def test_what_has_ended_is_judged_while_others_are_decoded(
    tiny_config, tmp_path, monkeypatch
):
    """The sampler goes on when all that it has given away is judged, at a pace that
    only a judge beside it can keep. The results are those of judging at the end."""
    stream, parts = Sampler.follow, Counter()

    def patient(self, *args, **options):
        given = sum(parts.elements())
        for rows, part in stream(self, *args, **options):
            yield rows, part
            given += len(rows)
            parts[len(rows)] += 1
            wait_for_lines(noted, given)

    def at_the_end(self, *args, **options):
        rows, some = zip(*stream(self, *args, **options), strict=True)
        yield np.concatenate(rows), jax.tree.map(lambda *x: np.concatenate(x), *some)

    common = {
        "training": {"steps": 1},
        "sampling": {"max_new_tokens": 40, "slots": 4},
        "evaluation": {},
    }
    for name, pace in {"early": patient, "late": at_the_end}.items():
        noted = tmp_path / f"{name}.txt"
        config = tiny_config(
            run={"dir": str(tmp_path / name)},
            task={**NOTING, "path": str(noted)},
            **common,
        )
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "follow", pace)
            training.run(config)
    assert sum(parts.elements()) == 16 and parts.total() > 2
    assert_same_run(tmp_path / "early", tmp_path / "late")


@pytest.fixture
def fetches(monkeypatch):
    """A list that grows by one whenever the host asks the first device for numbers."""
    found, inside = [], []
    value, first = ArrayImpl._value, jax.devices()[0]

    def note(tree):
        arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
        if not inside and any(first in x.devices() for x in arrays):
            found.append(len(arrays))

    def noting(fetch):
        def fetched(tree, *args, **options):
            note(tree)
            inside.append(fetch)
            try:
                return fetch(tree, *args, **options)
            finally:
                inside.pop()

        return fetched

    # NumPy reads an array of this machine's memory without asking it.
    for module, name in ((np, "asarray"), (np, "array"), (jax, "device_get")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    monkeypatch.setattr(ArrayImpl, "_value", property(noting(value.fget)))
    return found


def test_the_hook_sees_every_way_to_fetch(fetches):
    x = jax.numpy.arange(3.0)
    ways = (np.asarray, np.array, jax.device_get, lambda x: x.tolist())
    for way in (*ways, lambda x: float(x[0]), lambda x: bool(x[0] < 1)):
        before = len(fetches)
        way(x)
        assert len(fetches) == before + 1


def test_a_step_fetches_once_after_its_rollout(tiny_config, monkeypatch, fetches):
    """Until the next rollout begins, whatever the loop does in between."""
    collect, begun, ended = Collector.collect, [], []

    def watched(self, *args):
        begun.append(len(fetches))
        collected = collect(self, *args)
        ended.append(len(fetches))
        return collected

    monkeypatch.setattr(Collector, "collect", watched)
    config = tiny_config(
        training={"steps": 3, "updates_per_step": 2, "group_size": 2},
        optimizer={"schedule": "cosine", "warmup_updates": 1},
        evaluation={},
    )
    training.run(config)
    assert [b - a for a, b in zip(ended, begun[1:], strict=False)] == [1, 1]
