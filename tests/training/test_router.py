"""The balance of experts as a summand of the loss."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import CONFIG, GROUP_SIZE, TIME, WIDTH, make_batch
from tiny_policy import POLICY as DENSE

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.models.experts import balance_loss
from jaxrl_post.models.stack import decoder
from jaxrl_post.reduction import Reduction
from jaxrl_post.sharding import make_mesh, param_shardings
from jaxrl_post.training.accumulation import sanitise
from jaxrl_post.training.forward import expert_load
from jaxrl_post.training.loss import loss_metrics, with_share
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 8}
POLICY = decoder(replace(CONFIG, **EXPERTS, normalise_experts=True))
PARAMS = jax.tree.map(lambda x: 2 * x, POLICY.init(jax.random.key(0)))
RECIPE, SGD, COEF = recipes.grpo(), optax.sgd(1.0), 0.7


def gradient(batch, coef=COEF, mesh=None, **options):
    params = jax.tree.map(jnp.copy, PARAMS)
    if mesh is not None:
        params = jax.device_put(
            params, param_shardings(params, POLICY.logical_axes, mesh)
        )
        options["mesh"] = mesh
    state = init_state(params, SGD, RECIPE, jax.random.key(0))
    update = make_update_step(POLICY, RECIPE, SGD, router_aux_loss_coef=coef, **options)
    state, metrics = update(state, batch)
    after = jax.device_get(state.trainable)
    return jax.tree.map(lambda a, b: a - b, PARAMS, after), metrics


def filled_batch():
    """One whose last group is filler, with a context of its own."""
    batch = make_batch()
    real = np.arange(batch.size) < batch.size - GROUP_SIZE
    return batch.replace(sequence_mask=real)


@pytest.fixture(scope="module")
def whole():
    return gradient(filled_batch())


def whole_sequences(params, batch):
    """The balance of contexts and responses in one row each, as transformers' is."""
    owner = np.arange(batch.size) // GROUP_SIZE
    tokens = np.concatenate([batch.contexts[owner], batch.responses], 1)
    mask = np.concatenate([batch.context_mask[owner], batch.token_mask], 1)
    mask = (mask & batch.sequence_mask[:, None]).astype(np.int32)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    load = POLICY.routing(params, tokens, positions, mask)[2]
    whole = jax.tree.map(lambda x: x.sum((0, 1)), load)
    return balance_loss(whole, whole)


def test_it_adds_the_balance_of_all_whole_sequences(whole):
    batch, (found, metrics) = filled_batch(), whole
    plain, before = gradient(batch, coef=0.0)
    value, expected = jax.jit(jax.value_and_grad(lambda p: whole_sequences(p, batch)))(
        PARAMS
    )
    assert value > 1.01 * EXPERTS["experts_per_token"]  # of perfect balance
    np.testing.assert_allclose(metrics["loss/router"], COEF * value, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], before["loss"] + COEF * value, rtol=1e-5
    )
    assert "loss/router" not in before
    added = jax.tree.map(lambda a, b: (a - b) / COEF, found, plain)
    assert np.abs(expected["layers"]["mlp"]["router"]).max() > 1e-2
    chex.assert_trees_all_close(added, expected, atol=2e-5)


def test_micro_batches_change_nothing(whole):
    """Cut through groups, so that each sequence carries its own context."""
    cut, metrics = gradient(filled_batch(), micro_batch_tokens=WIDTH + TIME)
    chex.assert_trees_all_close(cut, whole[0], atol=1e-5)
    chex.assert_trees_all_close(metrics, whole[1], rtol=2e-5, atol=1e-6)


def test_however_contexts_are_stored_the_load_is_that_of_whole_sequences():
    batch = sanitise(filled_batch())
    owner = (np.arange(batch.size) // GROUP_SIZE).astype(np.int32)
    copies = {k: getattr(batch, k)[owner] for k in ("contexts", "context_mask")}
    layouts = {}, {"context_index": owner}, copies
    load = jax.jit(lambda batch: expert_load(POLICY, PARAMS, batch))
    found = [load(batch.replace(**kind)) for kind in layouts]
    count = batch.token_mask.sum() + copies["context_mask"][:-GROUP_SIZE].sum()
    assert found[0].tokens == count * CONFIG.num_layers
    for other in found[1:]:
        chex.assert_trees_all_close(other, found[0], rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing(whole):
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    found, metrics = gradient(filled_batch(), mesh=mesh)
    chex.assert_trees_all_close(found, whole[0], atol=1e-5)
    chex.assert_trees_all_close(metrics, whole[1], rtol=2e-5, atol=1e-6)


def test_information_does_not_weight_it():
    recipe = recipes.pgpo(weights="token")
    (term,) = recipe.terms
    one, spread = jnp.ones(()), Reduction(jnp.array(6.0), jnp.array(2.0))
    aux = {term.name: one}, {}, [spread]
    losses, (shares, _, means) = with_share([one], aux, "router", 5 * one)
    assert [float(x) for x in losses] == [5, 1] and means == [None, spread]
    metrics = loss_metrics(recipe, shares, [1.0, 0.25])
    assert {k: float(v) for k, v in metrics.items()} == {
        "loss": 5.25,
        f"loss/{term.name}": 0.25,
        "loss/router": 5.0,
    }
    losses, (_, _, means) = with_share([one, one], ({}, {}, [None, spread]), "r", one)
    assert [float(x) for x in losses] == [2, 1] and means == [None, spread]


def test_a_model_without_experts_has_nothing_to_balance():
    assert DENSE.routing is None
    with pytest.raises(InputError, match="router_aux_loss_coef=0.7.*has no experts"):
        make_update_step(DENSE, RECIPE, SGD, router_aux_loss_coef=COEF)
