"""Evaluation blocks: what those that differ in temperature share, and what not."""

from __future__ import annotations

import jax

from jaxrl_post.isolation import JudgePool
from jaxrl_post.training.evaluation import Evaluator, open_tasks
from jaxrl_post.training.setup import open_model

EVENT = "/jax/core/compile/backend_compile_duration"


def measured(config):
    """The metrics of a config's blocks, and the programs that they took."""
    policy, params, tokenizer = open_model(config)
    compiled = []

    def note(event, seconds, **about):
        if event == EVENT:
            compiled.append(about)

    with JudgePool(0) as pool:
        evaluate = Evaluator(config, policy, tokenizer, pool)
        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            return evaluate(params), len(compiled)
        finally:
            jax.monitoring.unregister_event_duration_listener(note)


def test_a_further_temperature_costs_no_program_and_is_a_temperature(tiny_config):
    rows = {"rows": 4, "samples": 1, "max_new_tokens": 200, "split": "test"}
    blocks = {"warm": rows, "greedy": {**rows, "greedy": True}}
    measured(tiny_config(evaluation=blocks))  # single operations compile but once
    alone, programs = measured(tiny_config(evaluation=blocks))
    further = {**blocks, "cold": {**rows, "temperature": 1e-4}}
    together, same = measured(tiny_config(evaluation=further))
    assert same == programs > 0
    assert alone.items() <= together.items()
    greedy, cold = (
        {k.rsplit("/")[-1]: v for k, v in together.items() if k.startswith(block)}
        for block in ("eval/greedy/", "eval/cold/")
    )
    assert cold == greedy
    assert together["eval/warm/length"] != greedy["length"]


def test_blocks_with_the_same_questions_share_a_task(tiny_config):
    rows = {"rows": 4, "samples": 1, "split": "test"}
    blocks = {"a": rows, "b": {**rows, "greedy": True}, "c": {**rows, "split": "train"}}
    opened = open_tasks(tiny_config(evaluation=blocks))
    assert opened["a"] is opened["b"] is not opened["c"]


def test_blocks_end_where_training_does_unless_they_say_otherwise(tiny_config):
    blocks = {
        "same": {"rows": 4},
        "other": {"rows": 4, "task": "tiny_task:load"},
        "own": {"rows": 4, "stop": ["x"]},
        "none": {"rows": 4, "stop": []},
    }
    config = tiny_config(sampling={"stop": ["a", "b"]}, evaluation=blocks)
    stops = {name: config.evaluation[name].stop for name in blocks}
    assert stops == {"same": ("a", "b"), "other": (), "own": ("x",), "none": ()}
    rows = {"rows": 4, "samples": 4, "split": "test", "max_new_tokens": 100}
    few = [chr(i) for i in range(ord("a"), ord("z"))]
    blocks = {"short": {**rows, "stop": few}, "long": rows}
    found, _ = measured(tiny_config(evaluation=blocks))
    assert found["eval/short/length"] < 0.5 * found["eval/long/length"]
