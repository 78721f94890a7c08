"""Exact resume: 2N steps equal N, death, resume and N, to the bit, for every recipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from tiny_runs import DieAfter, Died, assert_same_run, assert_same_state

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.provenance import code_version

SHOWN = {"name": "shown_task:load"}
REPROMPT = {"max_length": 64}
CASES = {
    "grpo": {
        "recipe": {"dynamic_sampling": True, "max_sampling_rounds": 2},
        "task": {"curriculum": {"floor": 0.1}},
    },
    "sdpo": {
        "recipe": {"top_k": 5, **REPROMPT},
        "task": {"name": "tiny_task:load_stream"},
    },
    "pgpo": {
        "recipe": {
            **{"top_k": 5, "weights": "token", "sensitivity": 2.0, **REPROMPT},
            "adapt": {"target": 1.5, "rate": 0.5},
        },
    },
    "hapo": {
        "recipe": {"gate": "thompson", "posterior_discount": 0.9},
        "task": SHOWN,
        "training": {"spike_deviations": 50.0, "spike_window": 3},
    },
    "luffy": {
        "recipe": {"prefix": {"lowest": 0.2, "highest": 0.9}},
        "task": SHOWN,
    },
    "srft": {"task": SHOWN},
    "replace_sft": {"task": SHOWN},
    "sft": {"task": SHOWN, "training": {"group_size": 1}},
    "off_policy": {
        "recipe": {"name": "sdpo", "top_k": 5, **REPROMPT},
        "training": {"steps_off_policy": 1},
    },
    "stages": {
        "recipe": {"name": "grpo", "kl_weight": 0.5},
        "task": SHOWN,
        "training": {"steps": 2},
        "stages": {
            "warm": {"recipe": {"name": "sft"}, "training": {"group_size": 1}},
            "rl": {},
        },
    },
}


def was_active(name, rows):
    """Whether there was something of the recipe's own to lose."""
    return {
        "grpo": lambda: any(row["sampling/passed_over"] for row in rows),
        "pgpo": lambda: (
            any(row["teacher/reprompted"] for row in rows)
            and any(row["information/multiplier"] != 1 for row in rows)
            and len({row["information/sensitivity"] for row in rows}) > 1
        ),
        "hapo": lambda: any(row["injection/count"] for row in rows),
        "luffy": lambda: all(row["injection/count"] for row in rows),
        "stages": lambda: [row["stage"] for row in rows] == [1, 1, 2, 2],
    }.get(name, lambda: True)()


# What the others have, in other recipes; `test_off_policy` has what is its own.
LONG = {"sdpo", "srft", "replace_sft", "sft", "off_policy"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in CASES],
)
def test_a_run_that_died_resumes_to_the_same_bits(tiny_config, tmp_path, name):
    """Ten questions, four a step: the third step, done twice, crosses the epoch."""
    case = CASES[name]
    common = {
        "recipe": {"name": name, **case.get("recipe", {})},
        **{key: case[key] for key in ("task", "stages") if key in case},
        "training": {
            **{"group_size": 2, "updates_per_step": 2, "evaluate_every": 2},
            **{"checkpoint_every": 2, **case.get("training", {})},
        },
    }
    whole = tiny_config(run={"dir": str(tmp_path / "whole")}, **common)
    cut = tiny_config(run={"dir": str(tmp_path / "cut")}, **common)

    expected = training.run(whole)
    with pytest.raises(Died):
        training.run(cut, progress=DieAfter)
    checkpoints = Checkpoints(tmp_path / "cut", read_only=True)
    assert checkpoints.latest() == 2
    about = checkpoints.about(2)["about"]
    assert about == {"code": code_version(), "config": about["config"]}
    assert about["config"] == yaml.safe_load(cut.to_yaml())
    checkpoints.close()
    resumed = training.run(cut)

    assert was_active(name, read_metrics(tmp_path / "whole")[1:])
    assert_same_state(resumed.state, expected.state)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    model = "model/model.safetensors"
    assert (tmp_path / "cut" / model).read_bytes() == (
        tmp_path / "whole" / model
    ).read_bytes()


def test_a_changed_config_says_what_changed_and_needs_permission(tiny_config):
    def make(steps, rate):
        return tiny_config(
            training={"steps": steps, "group_size": 2},
            optimizer={"learning_rate": rate},
            evaluation={},
        )

    training.run(make(1, 0.01))
    with pytest.raises(InputError) as error:
        training.run(make(2, 0.5))
    lines = str(error.value).split("\n")
    assert "  optimizer.learning_rate: 0.01 -> 0.5 (alters the mathematics)" in lines
    assert "  training.steps: 1 -> 2" in lines
    assert "--allow-changes" in lines[-1]
    # A key that the version before did not have was at its default.
    path = Path(make(1, 0.01).run.dir) / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["training"]["spike_window"], tree["run"]["replay"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError) as error:
        training.run(make(2, 0.5))
    assert str(error.value).split("\n") == lines

    result = training.run(make(2, 0.5), allow_changes=True)
    assert result.last_row["step"] == 2
    assert result.last_row["learning_rate"] == 0.5
    # The changes are now the run's config. Killed before it wrote its model, the run
    # that was made longer is not finished by the model of the shorter one.
    assert training.run(make(2, 0.5)).state is None
    model = result.dir / "model" / "config.json"
    os.utime(model, (0, 0))
    assert training.run(make(2, 0.5)).state is not None
    assert model.stat().st_mtime > 0
