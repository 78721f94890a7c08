"""Replay: the same completions make the same parameters, and nothing is sampled."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_runs import assert_same_state, lasting

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.generation import Sampler
from jaxrl_post.training.completions import completions_file
from jaxrl_post.training.metrics import read_metrics

OPTIONS = {
    "training": {"steps": 3, "updates_per_step": 2},
    "recipe": {"truncated_importance": 1.0, "mask_truncated": True},
    "evaluation": {},
}


@pytest.fixture
def original(tiny_config, tmp_path):
    return training.run(tiny_config(run={"dir": str(tmp_path / "run")}, **OPTIONS))


@pytest.fixture
def replaying(tiny_config, tmp_path, original):
    def make(name="again", source=original.dir, **sections):
        run = {"dir": str(tmp_path / name), "replay": str(source)}
        return tiny_config(run=run, **{**OPTIONS, **sections})

    return make


def test_a_replay_trains_as_the_run_did_without_sampling(
    original, replaying, monkeypatch, tmp_path
):
    def generate(*args, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr(Sampler, "generate", generate)
    again = training.run(replaying())
    assert_same_state(again.state, original.state)
    rows, expected = (lasting(read_metrics(d)) for d in (again.dir, original.dir))
    for row in expected:
        for name in ("rounds", "dropped_prompts", "kept_groups"):
            row.pop(f"sampling/{name}", None)
    assert rows == expected

    # A change of the loss is what it is for; too few steps, what to look out for.
    other = training.run(replaying("other", recipe={"kl_weight": 0.5}))
    assert "loss/kl" in other.last_row
    with pytest.raises(InputError, match="step 4 was not saved.*at most 3"):
        training.run(replaying("longer", training={"steps": 4}))
    with pytest.raises(InputError, match="training.group_size=3"):
        training.run(replaying("groups", training={"steps": 1, "group_size": 3}))
    with pytest.raises(InputError, match="this run's own folder"):
        training.run(replaying("run", training={"steps": 4}), allow_changes=True)
    shown = {"task": {"name": "shown_task:load"}, "recipe": {"name": "luffy"}}
    with pytest.raises(InputError, match="puts demonstrations among"):
        training.run(replaying("shown", **shown))
    with pytest.raises(InputError, match="no completions of a step 1"):
        training.run(replaying("none", source=tmp_path / "nothing"))


def test_log_probabilities_are_saved_to_the_bit(original):
    lines = completions_file(original.dir, 2).read_text().splitlines()
    values = np.array([x for line in lines for x in json.loads(line)["sampler_logps"]])
    # Each is the decimal of one float32, not of the nearest one with six digits.
    assert [float(str(x)) for x in values.astype(np.float32)] == values.tolist()
    assert len({len(repr(x)) for x in values}) > 1 and (values != values.round(6)).any()
