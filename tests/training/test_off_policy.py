"""Rollouts from the parameters of one step before: what they train, and when."""

from __future__ import annotations

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import CONFIG, PARAMS, POLICY, WIDTH
from tiny_runs import StopAfter, assert_same_run, assert_same_state, lasting

from jaxrl_post import recipes, training
from jaxrl_post.errors import ConfigError, InputError
from jaxrl_post.recipes import Batch
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.stages import make_stages
from jaxrl_post.training.state import init_state
from jaxrl_post.training.trainer import Trainer
from jaxrl_post.training.update import make_update_step

TOKENS = CONFIG.vocab_size


@pytest.mark.parametrize("threshold", [1e6, 1.2])
def test_the_correction_gives_the_gradient_of_the_expected_advantage(threshold):
    """Every token that may follow a context, as often as an older policy writes it: an
    expectation without a sample. Truncation leaves out what exceeds it, no more."""
    rng = np.random.default_rng(0)
    context = rng.integers(0, TOKENS, (1, WIDTH)).astype(np.int32)
    advantages = rng.normal(size=TOKENS).astype(np.float32)

    def logps_of(params):
        where = jnp.arange(WIDTH)[None]
        hidden, _ = POLICY.hidden(params, context, where, jnp.ones_like(context))
        return jax.nn.log_softmax(hidden[0, -1] @ POLICY.unembedding(params)[:TOKENS].T)

    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(PARAMS))))
    older = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), PARAMS
    )
    logps, sampler_logps = np.asarray(logps_of(PARAMS)), np.asarray(logps_of(older))
    sampled, ratio = np.exp(sampler_logps), np.exp(logps - sampler_logps)
    weights = sampled * np.minimum(ratio, threshold)
    assert (np.any(ratio > threshold)) == (threshold < 2) and ratio.std() > 0.1

    def loss(params):
        return -jnp.sum(weights * advantages * logps_of(params))

    ones = np.ones((TOKENS, 1), bool)
    batch = Batch(
        contexts=context,
        context_mask=np.ones_like(context, bool),
        responses=np.arange(TOKENS, dtype=np.int32)[:, None],
        token_mask=ones,
        loss_mask=ones,
        sequence_mask=ones[:, 0],
        advantages=TOKENS * sampled * advantages,  # the loss is a mean
        sampler_logps=sampler_logps[:, None],
    )
    recipe = recipes.grpo(truncated_importance=threshold, log_entropy=False)
    sgd = optax.sgd(1.0)
    state = init_state(jax.tree.map(jnp.copy, PARAMS), sgd, recipe, jax.random.key(0))
    state, metrics = make_update_step(POLICY, recipe, sgd)(state, batch)
    ours = jax.tree.map(lambda a, b: a - b, PARAMS, state.trainable)
    chex.assert_trees_all_close(ours, jax.grad(loss)(PARAMS), atol=1e-6)
    if threshold > 2:  # nothing is cut off: the on-policy gradient, whatever sampled

        def expected(params):
            return -jnp.sum(jnp.exp(logps_of(params)) * advantages)

        chex.assert_trees_all_close(ours, jax.grad(expected)(PARAMS), atol=1e-6)
    for name, value in {
        "ratio": ratio.mean(),
        "ratio_squared": np.square(ratio).mean(),
        "truncated": np.mean(ratio > threshold),
        "ess": ratio.sum() ** 2 / (ratio.size * np.square(ratio).sum()),
    }.items():
        np.testing.assert_allclose(metrics[f"sampler/{name}"], value, rtol=1e-4)


OFF = {"steps_off_policy": 1}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "grpo"}, "'policy_gradient', that takes all completions for the"),
        ({"name": "sdpo", "truncated_importance": None}, "'distillation', that takes"),
        ({"name": "sdpo", "policy_gradient_weight": 0.1}, "'policy_gradient', that"),
        ({"name": "hapo", "truncated_importance": 2.0, "posterior_discount": 0.9},
         "remembers success rates"),
        ({"name": "sft"}, "samples nothing"),
        ({"name": "best_of_k"}, "learns nothing"),
        ({"name": "multi_turn"}, "learns nothing"),
    ],
)  # fmt: skip
def test_recipes_that_would_take_old_samples_for_new_are_refused(
    tiny_config, recipe, message
):
    size = {"group_size": 1} if recipe["name"] == "sft" else {}
    config = tiny_config(recipe=recipe, training={**OFF, **size})
    with pytest.raises(InputError, match=message) as error:
        make_stages(config)
    assert "training.steps_off_policy=0" in str(error.value)


def test_recipes_that_correct_are_not_refused(tiny_config):
    weights = {"truncated_importance": 2.0, "kl_weight": 0.1, "entropy_weight": 0.1}
    mixed = dict.fromkeys(("grpo", "hapo", "luffy", "srft", "replace_sft"), weights)
    for name, arguments in {"sdpo": {}, "pgpo": {}, **mixed}.items():
        config = tiny_config(recipe={"name": name, **arguments}, training=OFF)
        assert make_stages(config)[0].off_policy


def test_a_curriculum_would_go_by_what_is_not_known_yet(tiny_config):
    config = tiny_config(
        recipe={"truncated_importance": 2.0}, task={"curriculum": {}}, training=OFF
    )
    with pytest.raises(InputError, match="leave out task.curriculum"):
        make_stages(config)


def test_a_replay_samples_nothing_ahead(tiny_config):
    with pytest.raises(ConfigError, match="with run.replay nothing is sampled"):
        tiny_config(run={"replay": "runs/other"}, training=OFF)


def test_the_next_rollout_is_judged_during_the_update(
    tiny_config, tmp_path, monkeypatch
):
    """Without learning it changes nothing. With it a step's completions are those of
    the parameters before the last update; and a run that is stopped and goes on, whose
    rollouts are not those that were thrown away, is the whole run to the bit."""
    begun, judged = tmp_path / "begun", []
    begin = Trainer._begin_updates

    def noting(self, state, batch):
        result = begin(self, state, batch)
        notes = Path(self.config.task.options["path"])
        judged.append(len(notes.read_text().splitlines()))
        begun.touch()
        return result

    monkeypatch.setattr(Trainer, "_begin_updates", noting)

    def make(name, rate, off, **waits):
        notes = str(tmp_path / f"{name}.txt")
        return tiny_config(
            run={"dir": str(tmp_path / name)},
            task={
                **{"name": "noting_task:load", "judge_timeout": 60},
                **{"path": notes, **waits},
            },
            recipe={
                **{"truncated_importance": 2.0, "dynamic_sampling": True},
                "max_sampling_rounds": 2,
            },
            training={"steps": 3, "steps_off_policy": off},
            optimizer={"learning_rate": rate},
            evaluation={},
        )

    still = {off: make(f"still-{off}", 0.0, off) for off in (0, 1)}
    for config in still.values():
        training.run(config)
    rows = [lasting(read_metrics(c.run.dir))[1:] for c in still.values()]
    staleness = [row.pop("sampling/staleness") for row in rows[1]]
    assert staleness == [0, 1, 1]
    assert rows[0] == rows[1]
    assert max(row["sampling/rounds"] for row in rows[0]) == 2

    # The judge keeps back the verdicts of the second step until the first learns.
    begun.unlink()
    whole = make("whole", 0.03, 1, after=judged[0], until=str(begun))
    expected = training.run(whole)
    moved = lasting(read_metrics(whole.run.dir))[1:]
    assert not any(row["reward/unjudged"] for row in moved)
    assert written(whole, 1) == written(still[0], 1)
    assert written(whole, 2) == written(still[0], 2)
    assert written(whole, 3) != written(still[0], 3)
    assert moved[0]["loss"] == rows[0][0]["loss"]
    gaps = [row["sampler/logp_gap"] for row in moved]
    assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:])

    cut = make("cut", 0.03, 1)
    with pytest.raises(training.Interrupted):
        training.run(cut, progress=StopAfter)
    assert_same_state(training.run(cut).state, expected.state)
    assert_same_run(Path(cut.run.dir), Path(whole.run.dir))


def written(config, step):
    """The tokens that a step's completions are made of."""
    path = Path(config.run.dir) / "completions" / f"step_{step:06d}.jsonl"
    return [json.loads(line)["response_ids"] for line in path.read_text().splitlines()]
