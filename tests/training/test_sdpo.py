"""SDPO and PGPO through the update step, against whole logits."""

from __future__ import annotations

import functools
from dataclasses import replace

import chex
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import GROUPS, PARAMS, POLICY, TIME, make_batch
from whole_logits import (
    ROWS,
    TEACHER,
    both_logits,
    distillation_batch,
    step,
    token_losses,
)

from jaxrl_post import losses, recipes
from jaxrl_post.information import AdaptiveSensitivity, information_gain
from jaxrl_post.models.stack import decoder
from jaxrl_post.training.forward import compute_scores
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step
from jaxrl_post.transforms import pgpo_adamw, scale_by_information


def plain_loss(params, batch, teacher="ema", teacher_rate=0.05, **arguments):
    """SDPO's loss from logits that exist, and the entropies of both sides."""
    student, taught = both_logits(params, batch, teacher, teacher_rate)
    values, mask = token_losses(student, taught, batch, **arguments)
    loss = losses.reduce(values, mask, mode="sequence_mean_over_all").mean()
    return loss, (losses.entropy(student), losses.entropy(taught), mask)


def test_teacher_logps_are_those_of_a_plain_forward():
    """One response behind teacher contexts of 9, 5 and 7 tokens, with padding on
    either side, against contexts and responses as they are, without any."""
    batch = distillation_batch(3)
    same = np.broadcast_to(batch.responses[0], batch.responses.shape)
    batch = batch.replace(
        responses=np.where(batch.token_mask, same, 0),
        teacher_index=np.arange(ROWS, dtype=np.int32) % 3,
    )
    left = batch.teacher_contexts, batch.teacher_context_mask
    rows = [c[m] for c, m in zip(*left, strict=True)]
    right = [np.zeros((3, 12), x.dtype) for x in left]
    for i, row in enumerate(rows):
        right[0][i, : len(row)], right[1][i, : len(row)] = row, True
    models = {"student": PARAMS, "teacher": TEACHER}
    recipe = recipes.sdpo(support="sampled", alpha=1.0)

    @jax.jit
    def scored(contexts, mask):
        padded = batch.replace(teacher_contexts=contexts, teacher_context_mask=mask)
        return compute_scores(POLICY, recipe, models, padded)["teacher_logps"]

    for contexts, mask in (left, right):
        found = scored(contexts, mask)
        for b in range(ROWS):
            context = rows[b % 3]
            response = batch.responses[b][batch.token_mask[b]]
            tokens = jnp.concatenate([context, response])[None]
            where = jnp.arange(tokens.shape[1])[None]
            hidden, _ = POLICY.hidden(TEACHER, tokens, where, jnp.ones_like(tokens))
            logps = jax.nn.log_softmax(hidden[0] @ POLICY.unembedding(TEACHER)[:19].T)
            plain = logps[len(context) - 1 : -1][np.arange(len(response)), response]
            np.testing.assert_allclose(found[b][: len(response)], plain, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.5, "top_k": 5},
        {"alpha": 1.0, "top_k": None},
        {"alpha": 0.0, "top_k": 5, "tail": False, "support": "teacher"},
        {"teacher": "trust_region", "teacher_rate": 0.3, "alpha": 0.5, "top_k": None},
        {"support": "sampled", "alpha": 1.0},
    ],
    ids=["jsd-top5-tail", "reverse", "forward-top5-of-teacher", "trust", "sampled"],
)
def test_gradient_equals_that_of_whole_logits(arguments):
    """On policy, and off it where the full vocabulary or one token is compared."""
    batch = distillation_batch()
    if arguments["alpha"] == 1:
        batch = batch.replace(old_logps=make_batch().old_logps)
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


def test_an_optimizer_with_injected_numbers_reports_its_multiplier():
    """Among them are names that the modulation's own state has too."""
    adapt = AdaptiveSensitivity(target=1.5, quantile=0.9, rate=0.1)
    inject = optax.inject_hyperparams(pgpo_adamw, static_args=("delay",))
    _, metrics = step(
        recipes.pgpo(top_k=5),
        distillation_batch(1),
        inject(1e-3, sensitivity=3.0, adapt=adapt),
    )
    rho = np.exp(3.0 * metrics["information/gain"])
    np.testing.assert_allclose(metrics["information/multiplier"], rho, rtol=1e-5)
    alpha = 3.0 * np.exp(0.1 * ((rho <= 1.5) - 0.9))
    np.testing.assert_allclose(metrics["information/sensitivity"], alpha, rtol=1e-5)
    _, plain = step(recipes.pgpo(top_k=5), distillation_batch(1), optax.sgd(1.0))
    assert "information/multiplier" not in plain and "information/gain" in plain


@functools.cache
def everything_at_once(micro_batch_tokens=None):
    """PGPO with all that may depend on how a batch is laid out; compiled once each."""
    recipe = recipes.pgpo(top_k=5, weights="token", policy_gradient_weight=0.25)
    optimizer = optax.chain(optax.sgd(1.0), recipe.information.transform())
    update = make_update_step(
        POLICY, recipe, optimizer, micro_batch_tokens=micro_batch_tokens
    )

    def run(batch):
        params, teacher = jax.tree.map(jnp.copy, (PARAMS, TEACHER))
        state = init_state(params, optimizer, recipe, jax.random.key(0))
        state, metrics = update(state.replace(teacher=teacher), batch)
        return state.trainable, metrics

    return run


def permuted(batch, order):
    """The batch with its sequences in another order, and their contexts as before."""
    rows = {
        name: np.asarray(getattr(batch, name))[order]
        for name in (
            *("responses", "token_mask", "loss_mask", "sequence_mask", "advantages"),
            *("sampler_logps", "teacher_index"),
        )
    }
    return batch.replace(**rows, extras={k: v[order] for k, v in batch.extras.items()})


def padded(batch, garbage):
    """Wider contexts and responses, with garbage wherever a mask allows it."""

    def pad(x, left=0, right=0):
        return np.pad(x, ((0, 0), (left, right)), constant_values=x.dtype.type(garbage))

    def widen(contexts, mask, by):
        return pad(np.where(mask, contexts, garbage), by), np.pad(
            mask, ((0, 0), (by, 0))
        )

    contexts, context_mask = widen(batch.contexts, batch.context_mask, 3)
    taught, taught_mask = widen(batch.teacher_contexts, batch.teacher_context_mask, 2)
    mask = np.pad(batch.token_mask, ((0, 0), (0, 2)))
    return batch.replace(
        contexts=contexts,
        context_mask=context_mask,
        teacher_contexts=taught,
        teacher_context_mask=taught_mask,
        responses=pad(np.where(batch.token_mask, batch.responses, garbage), right=2),
        token_mask=mask,
        loss_mask=mask,
        sampler_logps=np.where(mask, pad(batch.sampler_logps, right=2), np.nan),
    )


@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.booleans(), min_size=GROUPS, max_size=GROUPS),
    st.integers(0, 18),
)
def test_layout_changes_nothing(seed, swapped, garbage):
    """Siblings in another order, padding, micro-batches of one sequence."""
    batch = distillation_batch(seed)
    order = np.arange(ROWS) ^ np.repeat(swapped, 2)
    whole = everything_at_once()
    expected = whole(batch)
    for other in (
        whole(permuted(batch, order)),
        whole(padded(batch, garbage)),
        everything_at_once(9 + 5 + 2 * TIME)(batch),
    ):
        chex.assert_trees_all_close(other, expected, atol=2e-5, rtol=2e-5)


def test_nothing_to_distil_moves_nothing():
    batch = distillation_batch(2)
    batch = batch.replace(extras={**batch.extras, "distilled": np.zeros(ROWS, bool)})
    chained = optax.chain(optax.sgd(1.0), scale_by_information(1.0))
    state, metrics = step(recipes.pgpo(top_k=5), batch, chained)
    chex.assert_trees_all_equal(state.trainable, PARAMS)
    assert float(metrics["loss"]) == 0
    assert float(metrics["information/multiplier"]) == 1


@pytest.mark.parametrize(
    ("arguments", "complete"),
    [
        ({"top_k": 5}, losses.append_tail),
        ({"top_k": 5, "tail": False, "support": "teacher"}, losses.renormalize),
        ({"top_k": None}, lambda logps: logps),
    ],
    ids=["tail", "renormalised", "full"],
)
def test_entropies_of_what_the_loss_compares(arguments, complete):
    batch = distillation_batch(4)
    pair = both_logits(PARAMS, batch)
    chosen = pair[arguments.get("support") == "teacher"]
    _, ids = jax.lax.top_k(chosen, arguments["top_k"] or chosen.shape[-1])
    logps = (
        complete(jnp.take_along_axis(jax.nn.log_softmax(z), ids, -1)) for z in pair
    )
    student, teacher = (-(jnp.exp(x) * x).sum(-1) for x in logps)
    mask = batch.loss_mask & batch.extras["distilled"][:, None]
    gain = information_gain(student, teacher, mask).mean()
    recipe = recipes.pgpo(entropy_support="loss", **arguments)
    sgd = optax.sgd(0.0)
    optimizer = optax.chain(sgd, recipe.information.transform())
    _, metrics = step(recipe, batch, optimizer, chunk_size=7)
    np.testing.assert_allclose(metrics["information/gain"], gain, rtol=1e-4)
    found = metrics["information/student_entropy"], metrics["information/multiplier"]
    np.testing.assert_allclose(found[0], student[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(found[1], min(np.exp(gain), 2.0), rtol=1e-4)
    if arguments["top_k"] is None:
        _, whole = step(recipes.pgpo(**arguments), batch, optimizer)
        np.testing.assert_allclose(whole["information/gain"], gain, rtol=1e-4)


def test_the_sampled_token_has_no_entropies_of_its_own():
    with pytest.raises(ValueError, match="entropy_support='loss'"):
        recipes.pgpo(support="sampled", alpha=1.0, entropy_support="loss")
    with pytest.raises(ValueError, match="it is full or loss"):
        recipes.pgpo(entropy_support="top_k")


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
    """The entropies come out of the pass that the loss makes anyway, and weights are
    numbers per token: as many products with the vocabulary, as many operations."""
    vocabulary = 1024
    # A width at which products outweigh softmaxes, as in any real model.
    wide = {"hidden_size": 256, "vocab_size": vocabulary, "padded_vocab_size": None}
    policy = decoder(replace(POLICY.config, **wide))
    batch, sgd = distillation_batch(), optax.sgd(1.0)
    params = jax.eval_shape(policy.init, jax.random.key(0))

    def program(recipe):
        information = recipe.information
        modulation = [] if information is None else [information.transform()]
        optimizer = optax.chain(sgd, *modulation)
        state = jax.eval_shape(
            lambda p: init_state(p, optimizer, recipe, jax.random.key(0)), params
        )
        return make_update_step(policy, recipe, optimizer), state

    def products(recipe):
        update, state = program(recipe)
        return products_with(jax.make_jaxpr(update)(state, batch).jaxpr, vocabulary)

    def operations(recipe):
        update, state = program(recipe)
        return update.lower(state, batch).compile().cost_analysis()["flops"]

    sdpo, pgpo = (make(log_entropy=False) for make in (recipes.sdpo, recipes.pgpo))
    assert products(sdpo) == products(pgpo) >= 4
    assert abs(operations(pgpo) / operations(sdpo) - 1) < 0.01
    further = {"weights": "token", "entropy_support": "loss", "log_entropy": False}
    assert products(recipes.pgpo(**further)) == products(sdpo)
