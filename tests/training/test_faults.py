"""Updates that must not happen: skipped, counted, kept; nothing learns from them."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import PARAMS, POLICY, make_batch
from whole_logits import distillation_batch

from jaxrl_post import recipes, training
from jaxrl_post.training import faults, make_update_step, trainer
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.state import init_state

# The gate remembers posteriors, and the measured teacher is a moving average.
BOTH = {
    "name": "hapo",
    "posterior_discount": 0.9,
    "information": {"reprompt": {"max_length": 64}},
}


@pytest.fixture
def spoiled(monkeypatch):
    """Makes the advantages of the steps after the first NaN."""
    make_batch, made = trainer.make_batch, []

    def spoil(*args, **options):
        made.append(make_batch(*args, **options))
        if len(made) == 1:
            return made[0]
        return made[-1].replace(advantages=made[-1].advantages * np.nan)

    monkeypatch.setattr(trainer, "make_batch", spoil)
    return made


def test_a_skipped_step_leaves_everything_learned_untouched(
    tiny_config, tmp_path, spoiled
):
    def make(name, steps):
        return tiny_config(
            run={"dir": str(tmp_path / name)},
            recipe=BOTH,
            task={"name": "shown_task:load"},
            training={"steps": steps, "updates_per_step": 2},
            evaluation={},
        )

    one = training.run(make("one", 1)).state
    spoiled.clear()
    two = training.run(make("two", 2)).state
    assert (two.gate != 1).any()
    for field in ("trainable", "opt_state", "teacher", "gate"):
        chex.assert_trees_all_equal(getattr(two, field), getattr(one, field))
    assert (int(two.step), int(two.cursor)) == (2, 8)
    assert (int(two.update), int(two.skipped)) == (4, 2)
    rows = read_metrics(tmp_path / "two")
    assert [row["update/skipped"] for row in rows[1:]] == [0, 1]

    kept = sorted(path.name for path in (tmp_path / "two" / faults.FOLDER).iterdir())
    assert kept == [f"step_000002_update_{i}.npz" for i in (1, 2)]
    with np.load(tmp_path / "two" / faults.FOLDER / kept[1]) as batch:
        expected = spoiled[1].responses[8:]
        np.testing.assert_array_equal(batch["responses"], expected)
        assert np.isnan(batch["advantages"]).all()
        assert batch["metric/update/skipped"] == 1
        assert np.isnan(batch["metric/grad_norm"])


def test_a_run_that_only_skips_ends_with_advice(tiny_config, spoiled):
    config = tiny_config(
        training={"steps": 9, "group_size": 2, "max_skipped_updates": 2}, evaluation={}
    )
    with pytest.raises(RuntimeError) as error:
        training.run(config)
    for part in ("step 3", "last 2 updates", "max_skipped_updates=2", "learning_rate"):
        assert part in str(error.value)


def test_only_so_many_batches_are_kept(tmp_path):
    batch = make_batch()
    names = [faults.save_batch(tmp_path, step, 1, batch, {}) for step in range(12)]
    assert [name is not None for name in names] == [True] * faults.MOST + [False] * 2
    assert faults.save_batch(tmp_path, 3, 1, batch, {}) == names[3]  # done again


def make_state(window=None):
    return init_state(
        jax.tree.map(jnp.copy, PARAMS),
        optax.sgd(1e-3),
        recipes.grpo(),
        jax.random.key(0),
        spike_window=window,
    )


def test_a_spike_is_skipped_once_the_window_is_full():
    update = make_update_step(
        POLICY, recipes.grpo(), optax.sgd(1e-3), spike_deviations=8.0
    )
    spiked = make_batch(9).replace(advantages=1e4 * make_batch(9).advantages)
    state, metrics = update(make_state(4), spiked)
    assert metrics["update/spike"] == 0  # nothing to compare with yet
    for seed in range(4):
        state, metrics = update(state, make_batch(seed))
        assert metrics["update/skipped"] == 0
    before = jax.tree.map(np.asarray, state.trainable)
    state, metrics = update(state, spiked)
    assert metrics["update/spike"] == metrics["update/skipped"] == 1
    assert int(state.skipped) == 1
    chex.assert_trees_all_equal(state.trainable, before)
    np.testing.assert_allclose(state.norms[-1], metrics["grad_norm"])
    state, metrics = update(state, make_batch(0))
    assert metrics["update/skipped"] == 0 == int(state.skipped)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is():
    def loss(scores, batch):
        return scores["logps"] + jax.lax.stop_gradient(scores["logps"] * jnp.inf)

    grpo = recipes.grpo()
    term = recipes.Term("bad", scores=grpo.terms[0].scores, loss=loss)
    recipe = recipes.Recipe("bad", (term,))
    state, metrics = make_update_step(POLICY, recipe, optax.sgd(1e-3))(
        make_state(), make_batch()
    )
    assert np.isfinite(metrics["grad_norm"]) and metrics["update/skipped"] == 1
    chex.assert_trees_all_equal(state.trainable, PARAMS)


def test_a_gain_that_is_not_finite_is_skipped_though_the_loss_is():
    """GRPO's loss reads no teacher; the step's size would, of one that is broken."""
    recipe = recipes.with_information(recipes.grpo())
    state = init_state(
        jax.tree.map(jnp.copy, PARAMS), optax.sgd(1e-3), recipe, jax.random.key(0)
    )
    broken = jax.tree.map(lambda x: x * jnp.nan, state.teacher)
    update = make_update_step(POLICY, recipe, optax.sgd(1e-3))
    state, metrics = update(state.replace(teacher=broken), distillation_batch(5))
    assert np.isnan(metrics["information/gain"]) and metrics["update/skipped"] == 1
    assert np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(state.trainable, PARAMS)
