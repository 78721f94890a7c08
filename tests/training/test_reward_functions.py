"""What TRL's reward functions are told of a run, and when a wrong one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.training.completions import completions_file


def completions_of(run_dir, step):
    lines = completions_file(Path(run_dir), step).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("off_policy", [0, 1])
def test_functions_see_the_tokens_that_are_trained_on_and_the_step(
    tiny_config, off_policy
):
    config = tiny_config(
        task={"reward": "noting_rewards:notes"},
        recipe={"truncated_importance": 2.0},
        training={"steps": 3, "steps_off_policy": off_policy},
        evaluation={},
    )
    run_dir = training.run(config).dir
    for step in (1, 2, 3):
        for row in completions_of(run_dir, step):
            assert row["extra"]["ids"] == row["response_ids"]
            assert row["extra"]["at"] == [step - 1, 3]


def test_stages_count_on(tiny_config):
    stages = {"one": {"training": {"steps": 1}}, "two": {"training": {"steps": 2}}}
    config = tiny_config(
        task={"reward": "noting_rewards:notes"}, stages=stages, evaluation={}
    )
    assert config.total_steps == 3
    run_dir = training.run(config).dir
    seen = [completions_of(run_dir, step)[0]["extra"]["at"] for step in (1, 2, 3)]
    assert seen == [[0, 1], [1, 3], [2, 3]]


def test_tokens_of_several_turns_and_of_demonstrations(tiny_config, monkeypatch):
    """Where texts are judged that no sampler has just ended."""
    config = tiny_config(
        task={"name": "tiny_task:load_demonstrated", "reward": "noting_rewards:notes"},
        recipe={"name": "luffy"},
        sampling={"max_new_tokens": 8},
        training={"steps": 1},
        evaluation={},
    )
    # "4" and the end token are two tokens, "123" four: only those are accepted.
    rows = completions_of(training.run(config).dir, 1)
    given = [row for row in rows if row.get("teacher_tokens")]
    assert given and all(len(row["extra"]["ids"]) > 3 for row in given)


@pytest.mark.parametrize("command", ["run", "evaluate_run"])
def test_a_wrong_function_of_an_evaluation_is_found_before_the_model(
    tiny_config, command
):
    blocks = {"held": {"split": "test", "reward": "bad_judge_task:one_short"}}
    config = tiny_config(model={"path": "no-model"}, evaluation=blocks)
    words = "evaluation.held: The reward function one_short returned 1 rewards for 2"
    with pytest.raises(InputError, match=words):
        getattr(training, command)(config)


def test_an_evaluation_tells_how_far_training_was(tiny_config, monkeypatch):
    config = tiny_config(task={"reward": "noting_rewards:notes"}, training={"steps": 2})
    told = []
    from jaxrl_post.training import evaluation

    def tell(task, now):
        told.append((now.global_step, now.max_steps))

    monkeypatch.setattr(evaluation, "tell", tell)
    result = training.run(config)
    training.evaluate_run(config, result.dir)
    training.evaluate_run(config)
    assert told == [(0, 2), (2, 2), (2, 2), (0, 2)]
