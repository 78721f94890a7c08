"""Turns in training: rollouts, evaluations and the teacher's answers."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest

from jaxrl_post import generation, training
from jaxrl_post.generation.plan import Plan
from jaxrl_post.training.metrics import read_metrics

SECTIONS = {
    "task": {"name": "tiny_task:load_in_turns"},
    "recipe": {"name": "sdpo", "max_length": 64},
    "training": {"steps": 2, "teacher_samples": 3, "evaluate_every": 1},
    # A seventh of what a random model writes ends a turn.
    "sampling": {"max_new_tokens": 24, "stop": [*string.ascii_letters[:36]]},
}


def trained(config):
    """The rows of a run's metrics and of its completions."""
    training.run(config)
    run_dir = Path(config.run.dir)
    files = sorted(run_dir.glob("completions/*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return read_metrics(run_dir), [json.loads(line) for line in lines]


@pytest.fixture
def calls(monkeypatch):
    """How many answers went on, turn by turn, behind kept caches."""
    counts, go_on = [], generation.Conversation.go_on

    def noted(self, params, rows, tokens, mask, **options):
        counts.append(len(rows))
        return go_on(self, params, rows, tokens, mask, **options)

    monkeypatch.setattr(generation.Conversation, "go_on", noted)
    return counts


def test_kept_caches_train_as_whole_contexts_do(
    tiny_config, calls, monkeypatch, tmp_path
):
    metrics, kept = trained(tiny_config(**SECTIONS))
    # Each step's rollouts and teacher, and three evaluations, of up to two more turns.
    assert 8 < len(calls) <= 2 * 2 * 2 + 3 * 2
    calls.clear()
    monkeypatch.setattr(Plan, "at_once", False)
    run = {"dir": str(tmp_path / "whole"), "judge_workers": 1}
    again, whole = trained(tiny_config(**SECTIONS, run=run))
    assert not calls
    assert sum("so?" in row["response"] for row in kept) > len(kept) / 2
    for row, other in zip(kept, whole, strict=True):
        assert row["response_ids"] == other["response_ids"]
        assert row["response"] == other["response"]
    for row, other in zip(metrics, again, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith(("time/", "throughput/", "memory/")):
                # float32 sums in other orders, through two updates
                np.testing.assert_allclose(row[name], other[name], 1e-3, 1e-5, name)
    assert "teacher/accuracy" in metrics[1]


@pytest.mark.parametrize(
    ("section", "most"),
    [
        ({"sampling": {"slots": 5}}, 0),
        ({"mesh": {"data": 8}, "training": {"prompts_per_step": 8}}, 0),
        # The first step's are sampled before there is an update to make meanwhile.
        (
            {
                "training": {"steps_off_policy": 1},
                "recipe": {"name": "grpo", "truncated_importance": 2.0},
            },
            2,
        ),
    ],
    ids=["slots", "mesh", "off policy"],
)
def test_where_caches_are_not_kept_turns_are_read_anew(
    tiny_config, calls, section, most
):
    sections = {"task": SECTIONS["task"], "evaluation": {}}
    for name in ("training", "sampling"):
        sections[name] = {**SECTIONS[name], **section.get(name, {})}
    sections["mesh"] = section.get("mesh", {"data": 1})
    sections["recipe"] = section.get("recipe", {"name": "grpo"})
    sections["training"]["teacher_samples"] = None
    _, completions = trained(tiny_config(**sections))
    assert len(calls) <= most
    assert sum("so?" in row["response"] for row in completions) > 10
