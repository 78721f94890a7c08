"""Prompts that are too long: few are passed over, many are an error before any step."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.tasks import Row, RowsTask
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.types import Verdict


def judge(prompts, completions):
    return [Verdict(float("e" in text)) for text in completions]


def load(split="train", *, long=1):
    """Twenty questions, of which so many have 40 characters."""
    texts = ["x" * 40 if i < long else f"q{i}" for i in range(20)]
    rows = [
        Row(str(i), ({"role": "user", "content": text},), {}, None)
        for i, text in enumerate(texts)
    ]
    return RowsTask("twenty", rows, judge)


def config(tiny_config, long):
    return tiny_config(
        task={"name": "test_long_prompts:load", "long": long},
        training={"steps": 10, "prompts_per_step": 2, "group_size": 2},
        evaluation={},
    )


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_one_long_prompt_among_a_step_s_few_is_passed_over(tiny_config):
    """Half of its step, and 5 % of the task: no reason to stop a run that goes."""
    result = training.run(config(tiny_config, long=1))
    dropped = [row.get("sampling/dropped_prompts") for row in read_metrics(result.dir)]
    assert sum(filter(None, dropped)) == 1 and result.last_row["step"] == 10


def test_many_long_prompts_are_an_error_before_any_step(tiny_config):
    words = r"^task: \d+ of 256 prompts are longer.*=16 tokens.*max_dropped_share=0.1"
    with pytest.raises(InputError, match=words):
        training.run(config(tiny_config, long=5))


def test_an_evaluation_block_is_named(tiny_config):
    made = tiny_config(
        task={"name": "test_long_prompts:load", "long": 0},
        evaluation={"held": {"rows": 20, "samples": 2, "long": 5}},
    )
    with pytest.raises(InputError, match=r"^evaluation\.held: 5 of 20 prompts"):
        training.run(made)
