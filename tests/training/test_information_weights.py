"""Losses weighted by information: weights of mean 1, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import PARAMS, TIME
from whole_logits import (
    both_logits,
    distillation_batch,
    sampled_logps,
    step,
    token_losses,
)

from jaxrl_post import losses, recipes
from jaxrl_post.recipes import Recipe, Teacher, Term

SENSITIVITY, CAP, FLOOR = 8.0, 1.6, 0.7
BOUNDS = {
    "sensitivity": SENSITIVITY,
    "max_multiplier": CAP,
    "min_multiplier": FLOOR,
}
ONE_ROW = 9 + 5 + 2 * TIME  # tokens of a part of one sequence


def gradient(recipe, batch, **options):
    """What a step of rate 1 subtracts, before the whole step is scaled."""
    state, metrics = step(recipe, batch, optax.sgd(1.0), **options)
    return jax.tree.map(jnp.subtract, PARAMS, state.trainable), metrics


def rho_of(student, teacher, mask, level):
    """The multiplier of every sequence, or token, from whole logits."""
    gain = jax.lax.stop_gradient(losses.entropy(student) - losses.entropy(teacher))
    if level == "sequence":
        rows = jnp.where(mask, gain, 0).sum(1) / jnp.maximum(mask.sum(1), 1)
        gain = jnp.broadcast_to(rows[:, None], gain.shape)
    return jnp.clip(jnp.exp(SENSITIVITY * gain), FLOOR, CAP)


def plain_loss(params, batch, level, policy_gradient_weight):
    student, teacher = both_logits(params, batch)
    values, mask = token_losses(student, teacher, batch, alpha=0.5, top_k=5)
    rho = rho_of(student, teacher, mask, level)

    def mean(x, mask=mask):
        return losses.reduce(x, mask, mode="sequence_mean_over_all").mean()

    weights = rho * mean(jnp.ones_like(rho)) / mean(rho)
    logps = sampled_logps(student, batch)
    other = losses.clipped_policy_gradient(
        logps, jax.lax.stop_gradient(logps), batch.advantages
    )
    distillation = (1 - policy_gradient_weight) * mean(weights * values)
    loss = distillation + policy_gradient_weight * mean(other, batch.loss_mask)
    return loss, (distillation, weights, mask)


@pytest.mark.parametrize(
    ("level", "policy_gradient_weight"), [("sequence", 0.0), ("token", 0.25)]
)
def test_gradient_equals_that_of_whole_logits(level, policy_gradient_weight):
    """Whole, and one sequence at a time: the mean of the weights is the batch's."""
    batch = distillation_batch(5)
    (value, (distillation, weights, mask)), expected = jax.jit(
        jax.value_and_grad(plain_loss, has_aux=True), static_argnums=(2, 3)
    )(PARAMS, batch, level, policy_gradient_weight)
    spread = np.asarray(weights)[mask]
    assert spread.max() / spread.min() > 1.3  # they do change the gradient
    recipe = recipes.pgpo(
        top_k=5, weights=level, policy_gradient_weight=policy_gradient_weight, **BOUNDS
    )
    for options in ({"chunk_size": 7}, {"micro_batch_tokens": ONE_ROW}):
        ours, metrics = gradient(recipe, batch, **options)
        chex.assert_trees_all_close(ours, expected, atol=2e-6)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        if policy_gradient_weight:
            np.testing.assert_allclose(
                metrics["loss/distillation"], distillation, rtol=1e-5
            )


def test_no_sensitivity_is_no_weight():
    batch = distillation_batch(6)
    plain, metrics = gradient(recipes.sdpo(top_k=5), batch)
    recipe = recipes.pgpo(top_k=5, weights="token", sensitivity=1e-30)
    ours, weighted = gradient(recipe, batch)
    chex.assert_trees_all_equal(ours, plain)
    assert float(weighted["loss"]) == float(metrics["loss"])


@pytest.mark.parametrize("reduction", ["token_mean", "prompt_mean"])
def test_a_loss_that_is_the_same_everywhere_stays(reduction):
    """The weights' mean is 1 as the term's own reduction takes it."""
    batch = distillation_batch(7)
    recipe = recipes.pgpo(top_k=5, weights="token", reduction=reduction, **BOUNDS)
    (term,) = recipe.terms

    def constant(scores, batch):
        # Of value 3, and with a gradient, so that weights have something to change.
        noise = scores["logps"] - jax.lax.stop_gradient(scores["logps"])
        return 3 + noise

    same = replace(term, loss=constant, metrics=None)
    _, weighted = gradient(replace(recipe, terms=(same,)), batch)
    plain = replace(recipes.sdpo(top_k=5, reduction=reduction), terms=(same,))
    _, unweighted = gradient(plain, batch)
    np.testing.assert_allclose(weighted["loss"], unweighted["loss"], rtol=1e-6)
    assert abs(float(weighted["grad_norm"] / unweighted["grad_norm"]) - 1) > 1e-3


def test_nothing_distilled_moves_nothing():
    batch = distillation_batch(8)
    none = np.zeros_like(batch.extras["distilled"])
    batch = batch.replace(extras={**batch.extras, "distilled": none})
    ours, metrics = gradient(recipes.pgpo(top_k=5, weights="token"), batch)
    assert float(metrics["loss"]) == 0 and not float(optax.tree.norm(ours))


def test_weights_need_a_term_that_reads_the_teacher():
    term = Term("t", lambda v: {}, lambda s, b: jnp.zeros(()))
    information = recipes.Information(weights="token")
    with pytest.raises(ValueError, match="use weights='none'"):
        Recipe("r", (term,), teacher=Teacher("live"), information=information)
    with pytest.raises(ValueError, match="one of none, sequence, token"):
        recipes.Information(weights="group")
