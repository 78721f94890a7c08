"""Observations between turns: seen by every forward pass, part of no loss."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_groups import make_demonstrations, make_groups
from tiny_policy import PARAMS, POLICY, TIME, make_batch

from jaxrl_post import models, recipes
from jaxrl_post.generation import Rollouts
from jaxrl_post.tasks import science
from jaxrl_post.training import assembly
from jaxrl_post.training.state import init_state
from jaxrl_post.training.turns import go_on, observation_tokens
from jaxrl_post.training.update import make_update_step
from jaxrl_post.types import Verdict

OBSERVED = (np.arange(TIME) == 1) | (np.arange(TIME) == 2)
SGD = optax.sgd(1.0)


def gradients(recipe):
    """A function of batches: what one SGD step of rate 1 subtracts, and the metrics."""
    update = make_update_step(POLICY, recipe, SGD)

    def gradient(batch):
        params = jax.tree.map(jnp.copy, PARAMS)
        state = init_state(params, SGD, recipe, jax.random.key(0))
        state, metrics = update(state, batch)
        return jax.tree.map(jnp.subtract, PARAMS, state.trainable), metrics

    return gradient


def far(one, other):
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, one, other))
    return difference > 1e-3 * optax.tree.norm(other)


def batch_of_turns():
    """Tokens 1 and 2 of each response are an observation."""
    batch = make_batch(3)
    rows = batch.size
    return batch.replace(
        loss_mask=batch.token_mask & ~OBSERVED,
        teacher_contexts=np.roll(batch.contexts, 1),
        teacher_context_mask=np.ones_like(batch.context_mask),
        teacher_index=np.arange(rows, dtype=np.int32) // 2,
        is_teacher=np.zeros((rows, TIME), bool),
        extras={
            "distilled": np.ones(rows, bool),
            "distillation_weight": np.ones(rows, np.float32),
            "confidence": np.full(rows, 0.5, np.float32),
        },
    )


@pytest.mark.parametrize("name", ["grpo", "sdpo", "pgpo", "hapo"])
def test_observations_are_read_and_not_trained_on(name):
    of_teacher = {"teacher": "live", "feedback": "always"}
    recipe = recipes.make(name, **(of_teacher if "pgpo sdpo".count(name) else {}))
    batch, gradient = batch_of_turns(), gradients(recipe)
    expected, metrics = gradient(batch)
    # What sampler and old policy say of observations is garbage.
    other, other_metrics = gradient(
        batch.replace(
            old_logps=np.where(OBSERVED, np.nan, batch.old_logps),
            sampler_logps=np.where(OBSERVED, np.inf, batch.sampler_logps),
        ),
    )
    chex.assert_trees_all_equal(other, expected)
    chex.assert_trees_all_equal(other_metrics, metrics)
    # Behind another observation the policy's own tokens are others' successors.
    responses = np.where(OBSERVED, (batch.responses + 5) % 19, batch.responses)
    seen, _ = gradient(batch.replace(responses=responses))
    assert far(seen, expected)
    # Nor is it the same without them.
    unseen, _ = gradient(batch.replace(token_mask=batch.token_mask & ~OBSERVED))
    assert far(unseen, expected)


def test_assembly_and_injection_keep_observations_out():
    groups = make_groups([[0.0, 1.0]])
    observed = np.zeros_like(groups.mask)
    observed[:, :, 2:4] = True
    groups = replace(groups, observed=observed)
    batch = assembly.make_batch(groups, recipes.grpo(), count=1, context_limit=4)
    np.testing.assert_array_equal(batch.token_mask, True)
    np.testing.assert_array_equal(batch.loss_mask, ~observed[0])
    given = replace(groups, demonstrations=make_demonstrations([True]))
    (injection,) = recipes.make("hapo", threshold=0.6).group_transforms
    injected = injection(given)
    replaced = injected.is_teacher.any(2)
    assert replaced.sum() == 1
    np.testing.assert_array_equal(injected.observed, observed & ~replaced[..., None])


def first_turn(tokenizer, text, width):
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    mask = np.arange(width)[None] < len(ids)
    logps = np.where(mask, -1.0, 0.0).astype(np.float32)
    return Rollouts(tokens, mask, logps, logps, np.ones(1, bool))


def test_an_answer_goes_on_behind_the_calculator(tiny_model):
    """Prefix, tokens, masks and texts of two turns; the room for a third is missing."""
    _, _, tokenizer = models.load(tiny_model)
    task = science.load("test", levels=(1,), domains=["physics"], tool="calculator")
    prompts, width = task.rows([0]), 12
    contexts, turns = [], []

    def generate(turn):
        contexts.append([*turn.before[0], *turn.observed[0]])
        turns.append((turn.number, turn.rows))
        return first_turn(tokenizer, "+1=", width)

    rollouts = first_turn(tokenizer, "17*6=", width)
    answers = go_on(
        rollouts,
        ["17*6="],
        task.judge(prompts, ["17*6="]),
        [[9, 9]],
        turns=task.turns,
        tokenizer=tokenizer,
        generate=generate,
        judge=lambda rows, texts, tokens: task.judge(prompts, texts),
    )
    end = tokenizer.eos_token_id
    one, said = (tokenizer(x)["input_ids"] for x in ("17*6=", "102"))
    assert contexts == [[9, 9, *one, end, *said]] and turns == [(1, [0])]
    # 6 + 3 tokens leave 3 of the second turn's 4: it is cut, and has no third.
    two = tokenizer("+1=")["input_ids"]
    assert answers.rollouts.tokens[0].tolist() == [*one, end, *said, *two]
    assert answers.rollouts.mask.all() and not answers.rollouts.stopped.any()
    assert np.flatnonzero(~answers.written[0]).tolist() == [6, 7, 8]
    assert (answers.rollouts.logps[0] == 0).tolist() == (~answers.written[0]).tolist()
    assert answers.texts == ("17*6=102+1=",)
    assert answers.verdicts[0].observation == "103"


def test_observations_with_a_chat_template_open_the_next_turn(tiny_model):
    _, _, tokenizer = models.load(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    end = tokenizer.eos_token_id
    message = {"role": "tool", "content": "42 <end>"}
    ids = observation_tokens(tokenizer, message, [5, end])
    assert tokenizer.decode(ids) == "[tool]42 <end><end>[assistant]"
    assert ids.count(end) == 1  # what an observation says ends no turn
    # A turn that did not end with the token that closes it is closed.
    assert observation_tokens(tokenizer, message, [5, 6])[0] == end


def test_the_judge_asks_for_no_more_than_the_task_allows():
    task = science.load("test", levels=(1,), tool="calculator", turns=2)
    assert task.turns == 2 and science.load("test", levels=(1,)).turns == 1
    verdict = task.judge(task.rows([0]), ["answer 5"])[0]
    assert verdict.observation is None and isinstance(verdict, Verdict)
