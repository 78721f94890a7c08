"""A run whose judge hangs, dies, raises and returns what is no verdict goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.training.metrics import read_metrics


def test_a_run_goes_on_whatever_its_judge_does(tiny_config, caplog):
    config = tiny_config(
        task={"name": "bad_judge_task:load", "judge_timeout": 2.0},
        training={"steps": 2, "prompts_per_step": 8},
        evaluation={"held": {"rows": 4, "samples": 4, "split": "test"}},
    )
    result = training.run(config)
    assert result.last_row["step"] == 2
    rows = read_metrics(result.dir)
    for row in rows[1:]:
        assert 0 < row["reward/unjudged"] < 1
        assert all(math.isfinite(row[key]) for key in ("loss", "reward/mean"))
    assert all(0 <= row["eval/held/unjudged"] < 1 for row in (rows[0], rows[-1]))

    written = [
        json.loads(line)
        for path in sorted(Path(result.dir, "completions").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    errors = [row["extra"].get("error") for row in written]
    rewards = [row["reward"] for row in written]
    assert {reward for reward in rewards if reward is not None} == {0.0, 1.0}
    assert all(r is None for r, e in zip(rewards, errors, strict=True) if e)
    told = " ".join(error for error in errors if error)
    assert "died" in told and "reward is nan" in told
    messages = [r.getMessage() for r in caplog.records]
    assert any(m.startswith("judge bad_judge_task.judge: ") for m in messages)


def test_a_judge_that_fails_at_everything_ends_the_run_and_says_why(tiny_config):
    config = tiny_config(task={"reward": "bad_judge_task:raises"}, evaluation={})
    words = "none of the 16 completions of step 1: .*unreadable"
    with pytest.raises(InputError, match=words):
        training.run(config)


def test_rewards_of_the_wrong_number_are_found_before_the_model(tiny_config):
    """Judged one at a time, as after a failure, some of them would look right."""
    config = tiny_config(
        task={"reward": "bad_judge_task:one_short"}, model={"path": "no-model"}
    )
    words = "task: The reward function one_short returned 1 rewards for 2 completions"
    with pytest.raises(InputError, match=words):
        training.run(config)
    assert not Path(config.run.dir).exists()
