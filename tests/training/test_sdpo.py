"""SDPO and PGPO through the update step, against whole logits."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import GROUP_SIZE, GROUPS, PARAMS, POLICY, TIME, make_batch

from jaxrl_post import losses, recipes
from jaxrl_post.models.stack import decoder
from jaxrl_post.training.forward import predicting_states
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step
from jaxrl_post.transforms import scale_by_information

ROWS = GROUPS * GROUP_SIZE
TEACHER = POLICY.init(jax.random.key(7))


def distillation_batch(seed=0):
    rng = np.random.default_rng(100 + seed)
    batch = make_batch(seed)
    return batch.replace(
        old_logps=None,
        teacher_contexts=rng.integers(0, 19, (3, 9)).astype(np.int32),
        teacher_context_mask=np.arange(9)[::-1] < np.array([[9], [5], [7]]),
        teacher_index=rng.integers(0, 3, ROWS).astype(np.int32),
        extras={
            "distilled": np.arange(ROWS) % 4 != 1,
            "distillation_weight": np.ones(ROWS, np.float32),
        },
    )


def step(recipe, batch, optimizer, **options):
    state = init_state(
        jax.tree.map(jnp.copy, PARAMS), optimizer, recipe, jax.random.key(0)
    ).replace(teacher=jax.tree.map(jnp.copy, TEACHER))
    return make_update_step(POLICY, recipe, optimizer, **options)(state, batch)


def logits(params, contexts, mask, index, batch):
    states = predicting_states(
        POLICY, params, contexts, mask, index, batch.responses, batch.token_mask
    )
    return states @ POLICY.unembedding(params)[:19].T


def plain_loss(params, batch, teacher="ema", teacher_rate=0.05, **arguments):
    """SDPO's loss from logits that exist, and the entropies of both sides."""
    kind = teacher
    student = logits(params, batch.contexts, batch.context_mask, None, batch)
    teacher = logits(
        TEACHER,
        batch.teacher_contexts,
        batch.teacher_context_mask,
        batch.teacher_index,
        batch,
    )
    if kind == "trust_region":
        live = logits(
            params,
            batch.teacher_contexts,
            batch.teacher_context_mask,
            batch.teacher_index,
            batch,
        )
        teacher = (1 - teacher_rate) * teacher + teacher_rate * live
    values = losses.self_distillation(student, teacher, **arguments)
    logps = jax.nn.log_softmax(student)
    logps = jnp.take_along_axis(logps, batch.responses[..., None], -1)[..., 0]
    values *= losses.truncated_importance_weights(
        jax.lax.stop_gradient(logps), batch.sampler_logps, batch.loss_mask
    )
    mask = batch.loss_mask & batch.extras["distilled"][:, None]
    loss = losses.reduce(values, mask, mode="sequence_mean_over_all").mean()
    return loss, (losses.entropy(student), losses.entropy(teacher), mask)


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.5, "top_k": 5},
        {"alpha": 1.0, "top_k": None},
        {"alpha": 0.0, "top_k": 5, "tail": False, "support": "teacher"},
        {"teacher": "trust_region", "teacher_rate": 0.3, "top_k": None},
    ],
    ids=["jsd-top5-tail", "reverse-full", "forward-top5-of-teacher", "trust-region"],
)
def test_gradient_equals_that_of_whole_logits(arguments):
    batch = distillation_batch()
    (value, _), expected = jax.jit(
        jax.value_and_grad(lambda p: plain_loss(p, batch, **arguments), has_aux=True)
    )(PARAMS)
    sgd = optax.sgd(1.0)
    state, metrics = step(recipes.sdpo(**arguments), batch, sgd, chunk_size=7)
    ours = jax.tree.map(lambda a, b: a - b, PARAMS, state.trainable)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    chex.assert_trees_all_close(ours, expected, atol=2e-6)


def test_pgpo_scales_the_step_of_the_whole_batch():
    """One gain from all micro-batches; moments as without; the update is rho times."""
    batch = distillation_batch(1)
    _, (student, teacher, mask) = plain_loss(PARAMS, batch, alpha=0.5, top_k=5)
    per_sequence = (jnp.where(mask, student - teacher, 0).sum(1))[mask.any(1)]
    gain = float((per_sequence / mask.sum(1)[mask.any(1)]).mean())
    rho = min(np.exp(3.0 * gain), 2.0)
    assert abs(rho - 1) > 1e-3

    adam = optax.adam(1e-3)
    plain, _ = step(recipes.sdpo(top_k=5), batch, adam)
    recipe = recipes.pgpo(top_k=5, sensitivity=3.0)
    chained = optax.chain(adam, scale_by_information(3.0))
    whole, metrics = step(recipe, batch, chained)
    cut, cut_metrics = step(recipe, batch, chained, micro_batch_tokens=9 + TIME + 20)

    np.testing.assert_allclose(metrics["information/gain"], gain, rtol=1e-4)
    np.testing.assert_allclose(metrics["information/multiplier"], rho, rtol=1e-4)
    np.testing.assert_allclose(
        cut_metrics["information/gain"], metrics["information/gain"], rtol=1e-5
    )
    chex.assert_trees_all_equal(whole.opt_state[0], plain.opt_state)
    scaled = jax.tree.map(lambda p, s: p + rho * (s - p), PARAMS, plain.trainable)
    chex.assert_trees_all_close(whole.trainable, scaled, atol=1e-6)
    chex.assert_trees_all_close(cut.trainable, whole.trainable, atol=2e-5)


def test_nothing_to_distil_moves_nothing():
    batch = distillation_batch(2)
    batch = batch.replace(extras={**batch.extras, "distilled": np.zeros(ROWS, bool)})
    chained = optax.chain(optax.sgd(1.0), scale_by_information(1.0))
    state, metrics = step(recipes.pgpo(top_k=5), batch, chained)
    chex.assert_trees_all_equal(state.trainable, PARAMS)
    assert float(metrics["loss"]) == 0
    assert float(metrics["information/multiplier"]) == 1


def products_with(jaxpr, size) -> int:
    """Matrix products in a program, loops included once, that touch a dimension."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            count += any(size in shape for shape in shapes)
        for inner in jex.jaxprs_in_params(equation.params):
            count += products_with(inner, size)
    return count


def test_pgpo_costs_what_sdpo_costs():
    """The entropies come out of the pass that the loss makes anyway."""
    vocabulary = 1024
    # A width at which products outweigh softmaxes, as in any real model.
    wide = {"hidden_size": 256, "vocab_size": vocabulary, "padded_vocab_size": None}
    policy = decoder(replace(POLICY.config, **wide))
    batch, sgd = distillation_batch(), optax.sgd(1.0)
    optimizers = {
        recipes.sdpo(log_entropy=False): sgd,
        recipes.pgpo(log_entropy=False): optax.chain(sgd, scale_by_information(1.0)),
    }
    products, operations = [], []
    for recipe, optimizer in optimizers.items():
        params = jax.eval_shape(policy.init, jax.random.key(0))
        state = jax.eval_shape(
            lambda p, o=optimizer, r=recipe: init_state(p, o, r, jax.random.key(0)),
            params,
        )
        update = make_update_step(policy, recipe, optimizer)
        products.append(
            products_with(jax.make_jaxpr(update)(state, batch).jaxpr, vocabulary)
        )
        cost = update.lower(state, batch).compile().cost_analysis()
        operations.append(cost["flops"])
    assert products[0] == products[1] >= 4
    assert abs(operations[1] / operations[0] - 1) < 0.01
