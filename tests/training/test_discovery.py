"""Searches for a first success: who learns, when they end, what they write."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import StopAfter

from jaxrl_post import models, training
from jaxrl_post.errors import InputError
from jaxrl_post.generation import tokenize_prompts
from jaxrl_post.recipes import multi_turn
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.training.completions import completions_file
from jaxrl_post.training.discovery import (
    discovery_config,
    first_success,
    write_discovery,
)
from jaxrl_post.training.history import History
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.types import Prompts, Verdict


@pytest.fixture
def search(tiny_config, tmp_path):
    """Makes the config of a search; no evaluation."""

    def make(method, name="run", attempts=None, question="two", seed=0, **sections):
        usual = {
            "run": {"dir": str(tmp_path / name), "seed": seed},
            "task": {"name": "rare_task:load", "max_prompt_length": 100},
            "recipe": {"name": "sdpo", "feedback": "always", "max_length": 100},
            "training": {"steps": 4, "prompts_per_step": 1},
            "evaluation": {},
            "optimizer": {"learning_rate": 1e-3},
        }
        config = tiny_config(**usual | sections)
        return discovery_config(config, method, question, attempts)

    return make


def saved(run_dir):
    """The rows of all completions, in order."""
    files = sorted((Path(run_dir) / "completions").iterdir())
    return [json.loads(x) for path in files for x in path.read_text().splitlines()]


def changed(config):
    """Whether a run's model is another than the one that it began with."""
    _, before, _ = models.load(config.model.path)
    _, after, _ = models.load(Path(config.run.dir) / "model")
    leaves = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    return any(not np.array_equal(a, b) for a, b in leaves)


def test_sdpo_learns_until_the_first_success(search):
    config = search("sdpo", attempts=64, seed=1)
    training.run(config)
    rows, found = write_discovery(Path(config.run.dir)), saved(config.run.dir)
    assert {row["prompt_id"] for row in found} == {"two"}
    assert [row["success"] for row in rows] == [row["success"] for row in found]
    right = [i for i, row in enumerate(found, start=1) if row["success"]]
    assert first_success(rows) == right[0]
    steps = [row["step"] for row in rows]
    assert steps[right[0] - 1] == steps[-1] < 16
    assert [r["discovery@k"] for r in rows] == [r["attempt"] >= right[0] for r in rows]
    assert changed(config)
    times = {p: p.stat().st_mtime_ns for p in Path(config.run.dir).rglob("*.safe*")}
    assert training.run(config).state is None  # finished
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_multi_turn_reads_what_was_said_and_resumes(search):
    whole, cut = (search("multi_turn", x, 4, question="one") for x in ("whole", "cut"))
    training.run(whole)
    with pytest.raises(training.Interrupted):
        training.run(cut, progress=StopAfter)
    training.run(cut)
    rows = saved(whole.run.dir)
    assert rows == saved(cut.run.dir)
    assert not any(row["success"] for row in rows) and len(rows) == 4
    for i, row in enumerate(rows):
        told = [earlier["feedback"] for earlier in rows[:i]]
        assert "\n".join(told) in row["prompt"]
        assert row["prompt"].count("not ") == i
    assert not changed(whole)
    assert read_metrics(whole.run.dir)[-1]["step"] == 4


def test_history_forgets_the_oldest_first(search, tiny_model):
    _, _, tokenizer = models.load(tiny_model)
    task = {"name": "rare_task:load", "max_prompt_length": 55}
    config = search("multi_turn", task=task)
    history = History(config, multi_turn().history, tokenizer)
    messages = ({"role": "user", "content": "q?"},)
    prompts = Prompts(("q",), (messages,), ({},), (None,))
    assert history.show(prompts, step=1) == prompts
    said = ["first.", "second <end>.", " ", None, "third."]
    verdicts = tuple(Verdict(0.0, False, text) for text in said)
    history.add(_judged(prompts, verdicts))
    (shown,) = history.show(prompts, step=2).messages
    # 55 tokens, a byte each: two of the three fit, and no text ends a turn.
    assert "first" not in shown[-1]["content"]
    assert "second" in shown[-1]["content"] and "third." in shown[-1]["content"]
    (ids,) = tokenize_prompts(tokenizer, [shown])
    assert len(ids) <= config.task.max_prompt_length
    assert tokenizer.eos_token_id not in ids
    # What cannot be shown at all leaves the question.
    history.add(_judged(prompts, (Verdict(0.0, False, "x" * 80),)))
    assert history.show(prompts, step=3).messages == prompts.messages


def _judged(prompts, verdicts):
    size = len(verdicts)
    zeros = np.zeros((1, size, 1))
    return Groups(
        prompts=prompts,
        contexts=np.ones((1, 1), np.int32),
        context_mask=np.ones((1, 1), bool),
        tokens=zeros,
        mask=zeros,
        sampler_logps=zeros,
        stopped=zeros[..., 0],
        completions=(("",) * size,),
        verdicts=(verdicts,),
        rewards=zeros[..., 0],
        judged=zeros[..., 0],
    )


def test_best_of_k_asks_the_base(search):
    config = search("best_of_k", attempts=8, question="one")
    result = training.run(config)
    assert not jax.tree.leaves(result.state.opt_state)
    assert int(result.state.update) == 0 and not changed(config)
    assert completions_file(Path(config.run.dir), 2).is_file()


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("sdpo", {"attempts": 6}, "multiple of 4"),
        ("sdpo", {"attempts": 0}, "at least 1"),
        ("best_of_k", {"attempts": 7}, "multiple of 4"),
        ("sdpo", {"recipe": {"name": "grpo"}}, "learns nothing as long as"),
        ("sdpo", {"recipe": {"name": "sdpo"}}, "learns nothing as long as"),
        ("sdpo", {"recipe": {"name": "best_of_k"}}, "learns nothing as long as"),
        ("sdpo", {"stages": {"a": {}}}, "a search has none"),
        ("sdpo", {"run": {"dir": "x", "replay": "y"}}, "a search samples"),
    ],
)
def test_searches_that_cannot_be_made(search, method, options, message):
    with pytest.raises(InputError, match=message):
        search(method, **options)


@pytest.mark.parametrize(
    "question, task, message",
    [
        ("tow", "load", "task.questions: no question 'tow'; did you mean 'two'?"),
        (2, "load", "task.questions: no row 2; the task has 2"),
        (0, "load_unsure", "does not say what a success is"),
    ],
)
def test_questions_that_cannot_be_asked(search, question, task, message):
    options = {"name": f"rare_task:{task}", "max_prompt_length": 100}
    config = search("best_of_k", question=question, task=options)
    with pytest.raises(InputError, match=message):
        training.run(config)
