"""The update step: what may not change the gradient, and what must."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import (
    GROUP_SIZE,
    GROUPS,
    PARAMS,
    POLICY,
    TIME,
    WIDTH,
    make_batch,
)

from jaxrl_post import losses, recipes
from jaxrl_post.errors import InputError
from jaxrl_post.recipes import Recipe, Teacher, Term
from jaxrl_post.training.forward import compute_scores, predicting_states
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_score_step, make_update_step

SGD = optax.sgd(1.0)


def gradient(recipe, batch, **options):
    """What one SGD step of rate 1 subtracts, and the metrics."""
    params = jax.tree.map(jnp.copy, PARAMS)
    state = init_state(params, SGD, recipe, jax.random.key(0))
    update = make_update_step(POLICY, recipe, SGD, **options)
    state, metrics = update(state, batch)
    return jax.tree.map(lambda a, b: a - b, PARAMS, state.trainable), metrics


@pytest.mark.parametrize("mode", ["token_mean", "prompt_mean", "constant"])
def test_micro_batches_change_nothing(mode):
    length = TIME if mode == "constant" else None
    recipe = recipes.grpo(
        reduction=mode, max_length=length, entropy_weight=0.1, truncated_importance=2.0
    )
    batch = make_batch()
    whole, metrics = gradient(recipe, batch)
    norm = float(optax.tree.norm(whole))
    assert norm > 1e-3
    tokens = GROUPS * WIDTH + GROUPS * GROUP_SIZE * TIME
    # Every reduction takes the same path from the weights on; 8 cuts through groups.
    for parts in (2, 4, 8) if mode == "token_mean" else (8,):
        bound = tokens // parts if parts < 8 else WIDTH + TIME
        cut, cut_metrics = gradient(recipe, batch, micro_batch_tokens=bound)
        chex.assert_trees_all_close(cut, whole, atol=1e-6 * max(norm, 1))
        chex.assert_trees_all_close(cut_metrics, metrics, rtol=2e-5, atol=1e-6)


def test_micro_batches_bound_is_checked():
    with pytest.raises(InputError, match="micro_batch_tokens=5 is below the 11 tokens"):
        gradient(recipes.grpo(), make_batch(), micro_batch_tokens=5)


def test_gradient_equals_plain_computation():
    """The whole path, against logits that are built and differentiated as they are."""
    batch = make_batch(1)
    recipe = recipes.grpo()

    def loss(params):
        total, count = 0.0, 0
        for b in range(batch.size):
            group = b // GROUP_SIZE
            context = batch.contexts[group][batch.context_mask[group]]
            response = batch.responses[b][batch.token_mask[b]]
            tokens = jnp.concatenate([context, response])[None]
            ones = jnp.ones_like(tokens)
            where = jnp.arange(tokens.shape[1])[None]
            hidden, _ = POLICY.hidden(params, tokens, where, ones)
            head = POLICY.unembedding(params)[:19]
            logps = jax.nn.log_softmax(hidden[0] @ head.T)[len(context) - 1 : -1]
            logps = jnp.take_along_axis(logps, response[:, None], 1)[:, 0]
            values = losses.clipped_policy_gradient(
                logps[None],
                batch.old_logps[b][batch.token_mask[b]][None],
                batch.advantages[b][None],
            )
            total, count = total + values.sum(), count + len(response)
        return total / count

    value, expected = jax.value_and_grad(loss)(PARAMS)
    ours, metrics = gradient(recipe, batch, chunk_size=7)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    chex.assert_trees_all_close(ours, expected, atol=2e-6)


def test_padding_and_garbage_change_nothing():
    batch = make_batch(2)
    # Some tokens are attended to and yet not trained on.
    batch = batch.replace(loss_mask=batch.token_mask & (np.arange(TIME) != 1))
    recipe = recipes.grpo(kl_weight=0.1, truncated_importance=2.0)
    expected, metrics = gradient(recipe, batch)
    wide = batch.replace(
        contexts=np.pad(batch.contexts, ((0, 0), (3, 0)), constant_values=7),
        context_mask=np.pad(batch.context_mask, ((0, 0), (3, 0))),
        responses=np.where(batch.token_mask, batch.responses, 23),
        old_logps=np.where(batch.loss_mask, batch.old_logps, np.nan),
        sampler_logps=np.where(batch.loss_mask, batch.sampler_logps, np.inf),
    )
    wide = jax.tree.map(
        lambda x: np.pad(x, ((0, 0), (0, 2))) if x.shape[1:] == (TIME,) else x, wide
    )
    ours, padded_metrics = gradient(recipe, wide)
    chex.assert_trees_all_close(ours, expected, atol=1e-6)
    chex.assert_trees_all_close(padded_metrics, metrics, rtol=1e-4, atol=1e-6)


def test_filler_rows_change_nothing():
    batch = make_batch(3)
    recipe = recipes.grpo(reduction="sequence_mean_over_all")
    expected, _ = gradient(recipe, batch)
    more = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    real = np.arange(2 * batch.size) < batch.size
    more = more.replace(
        sequence_mask=real, advantages=np.where(real, more.advantages, np.nan)
    )
    ours, _ = gradient(recipe, more)
    chex.assert_trees_all_close(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"log_entropy": False}, {"logps"}),
        ({}, {"logps", "entropy"}),
        ({"kl_weight": 0.1, "log_entropy": False}, {"logps", "ref_logps"}),
    ],
)
def test_grpo_scores_what_its_terms_and_its_log_ask_for(arguments, names):
    """No teacher, and no entropy that is not logged."""
    recipe, batch = recipes.grpo(**arguments), make_batch()
    state = jax.eval_shape(
        lambda p: init_state(p, SGD, recipe, jax.random.key(0)), PARAMS
    )
    assert state.teacher is None
    assert (state.reference is None) == ("ref_logps" not in names)
    models = {"student": PARAMS, "reference": PARAMS}
    scores = jax.eval_shape(lambda m: compute_scores(POLICY, recipe, m, batch), models)
    assert scores.keys() == names


def test_score_step_returns_rows_in_order():
    batch = make_batch(4)
    whole = make_score_step(POLICY)(PARAMS, batch)
    cut = make_score_step(POLICY, micro_batch_tokens=25)(PARAMS, batch)
    # Two programs of other shapes, which sum in other orders: 1.4e-6 on some machines.
    np.testing.assert_allclose(whole, cut, atol=1e-5)
    assert (np.asarray(whole)[~batch.token_mask] == 0).all()
    assert (np.asarray(whole)[batch.token_mask] < 0).all()


def test_context_index_equals_adjacent_groups():
    batch = make_batch(5)
    expected, _ = gradient(recipes.grpo(), batch)
    shuffled = np.array([2, 0, 3, 1])
    indexed = batch.replace(
        contexts=batch.contexts[shuffled],
        context_mask=batch.context_mask[shuffled],
        context_index=np.argsort(shuffled)[np.arange(batch.size) // GROUP_SIZE].astype(
            np.int32
        ),
    )
    for bound in (None, 40):
        ours, _ = gradient(recipes.grpo(), indexed, micro_batch_tokens=bound)
        chex.assert_trees_all_close(ours, expected, atol=1e-6)


def test_non_finite_gradient_is_skipped_and_counted():
    recipe = recipes.grpo()
    state = init_state(
        jax.tree.map(jnp.copy, PARAMS), optax.adam(1e-2), recipe, jax.random.key(0)
    )
    update = make_update_step(POLICY, recipe, optax.adam(1e-2))
    bad = make_batch().replace(advantages=np.full(8, np.nan, np.float32))
    before = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    state, metrics = update(state, bad)
    chex.assert_trees_all_equal((state.trainable, state.opt_state), before)
    assert int(state.update) == 1 and int(state.skipped) == 1
    assert float(metrics["update/skipped"]) == 1
    state, _ = update(state, make_batch())
    assert int(state.update) == 2 and int(state.skipped) == 0


def test_update_compiles_once():
    term = recipes.grpo().terms[0]

    @chex.assert_max_traces(n=1)
    def loss(scores, batch):
        return term.loss(scores, batch)

    recipe = Recipe("counted", (Term("t", term.scores, loss),))
    state = init_state(jax.tree.map(jnp.copy, PARAMS), SGD, recipe, jax.random.key(0))
    update = make_update_step(POLICY, recipe, SGD)
    for seed in range(3):
        state, _ = update(state, make_batch(seed))


def test_ema_teacher_moves_every_other_update():
    term = Term(
        "distil",
        scores=lambda v: {
            "logps": v.student.log_probs(v.tokens),
            "teacher_logps": v.teacher.log_probs(v.tokens),
        },
        loss=lambda s, b: s["logps"] - s["teacher_logps"],
        needs=frozenset({"teacher"}),
    )
    recipe = Recipe("ema", (term,), teacher=Teacher("ema", rate=0.25, every=2))
    batch = make_batch()
    batch = batch.replace(
        teacher_contexts=batch.contexts, teacher_context_mask=batch.context_mask
    )
    state = init_state(jax.tree.map(jnp.copy, PARAMS), SGD, recipe, jax.random.key(0))
    update = make_update_step(POLICY, recipe, SGD)
    state, metrics = update(state, batch)
    np.testing.assert_allclose(metrics["loss"], 0.0, atol=1e-6)
    chex.assert_trees_all_equal(state.teacher, PARAMS)
    state, _ = update(state, batch)
    expected = jax.tree.map(lambda t, s: t + 0.25 * (s - t), PARAMS, state.trainable)
    chex.assert_trees_all_close(state.teacher, expected, atol=1e-7)


def test_predicting_states_ignore_padding_side():
    batch = make_batch(6)

    def states(contexts, mask):
        return predicting_states(
            POLICY, PARAMS, contexts, mask, None, batch.responses, batch.token_mask
        )

    left = states(batch.contexts, batch.context_mask)
    rows = [c[m] for c, m in zip(batch.contexts, batch.context_mask, strict=True)]
    right = np.zeros((GROUPS, WIDTH + 2), np.int32)
    mask = np.zeros((GROUPS, WIDTH + 2), bool)
    for i, row in enumerate(rows):
        right[i, : len(row)], mask[i, : len(row)] = row, True
    right = states(right, mask)
    real = batch.token_mask
    np.testing.assert_allclose(left[real], right[real], atol=1e-5)
