"""Losses of single tokens: gradients made with the logits equal those made after."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import GROUPS, PARAMS, POLICY, TIME, WIDTH, make_batch

from jaxrl_post import recipes
from jaxrl_post.recipes import Recipe
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step

SGD = optax.sgd(1.0)
PADDED = {"reduction": "padded_length", "max_length": TIME}
TOKENWISE = {
    "grpo": recipes.grpo(
        kl_weight=0.1, entropy_weight=0.1, truncated_importance=2.0, dual_clip=3.0
    ),
    "cispo": recipes.grpo(importance="clipped", reduction="prompt_mean"),
    "sdpo": recipes.sdpo(alpha=0.3, top_k=4, policy_gradient_weight=0.3),
    "sampled": recipes.sdpo(alpha=1.0, support="sampled", teacher="live"),
    "trust_region": recipes.sdpo(teacher="trust_region", top_k=None),
    "pgpo": recipes.pgpo(top_k=4),
    "pgpo by token": recipes.pgpo(top_k=4, weights="token"),
    "hapo": recipes.hapo(teacher_weight="doubt"),
    "luffy": recipes.luffy(**PADDED),
    "srft": recipes.srft(),
    "sft": recipes.sft(),
}
OTHERS = {
    "gspo": recipes.grpo(importance="sequence"),
    "corrected by sequence": recipes.grpo(
        truncated_importance=2.0, truncated_importance_level="sequence"
    ),
    "pgpo by sequence": recipes.pgpo(weights="sequence"),
    "one of two weighted": recipes.pgpo(weights="token", policy_gradient_weight=0.5),
}


def full_batch():
    """With everything that a recipe may read."""
    batch, rng = make_batch(), np.random.default_rng(1)
    rows = batch.size
    given = np.zeros((rows, TIME), bool)
    given[1::2] = True
    return batch.replace(
        teacher_contexts=rng.integers(0, 19, (GROUPS, WIDTH + 2)).astype(np.int32),
        teacher_context_mask=np.ones((GROUPS, WIDTH + 2), bool),
        is_teacher=given,
        extras={
            "confidence": rng.random(rows).astype(np.float32),
            "distilled": np.arange(rows) % 3 > 0,
            "distillation_weight": np.arange(rows, dtype=np.float32) / rows,
            "of another shape": np.zeros((rows, 3, 2), np.float32),
        },
    )


def gradient(recipe: Recipe, batch, monkeypatch, *, tokenwise: bool):
    with monkeypatch.context() as patch:
        if not tokenwise:
            patch.setattr(Recipe, "tokenwise", False)
        assert recipe.tokenwise == tokenwise
        params = jax.tree.map(jnp.copy, PARAMS)
        state = init_state(params, SGD, recipe, jax.random.key(0))
        if state.teacher is not None:
            noise = jax.random.normal(jax.random.key(1), ())
            state = state.replace(
                teacher=jax.tree.map(lambda x: x * (1 + 0.1 * noise), state.teacher)
            )
        update = make_update_step(POLICY, recipe, SGD, chunk_size=16)
        state, metrics = update(state, batch)
    return jax.tree.map(lambda a, b: a - b, PARAMS, state.trainable), metrics


@pytest.mark.parametrize("name", TOKENWISE)
def test_gradient_and_metrics_are_the_same(name, monkeypatch):
    recipe, batch = TOKENWISE[name], full_batch()
    made, metrics = gradient(recipe, batch, monkeypatch, tokenwise=True)
    assert float(optax.tree.norm(made)) > 1e-3
    after, expected = gradient(recipe, batch, monkeypatch, tokenwise=False)
    chex.assert_trees_all_close(made, after, atol=2e-6)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_sequences_are_not_taken_apart(name):
    assert not OTHERS[name].tokenwise


def test_a_users_term_is_not_unless_it_says_so():
    """A term may look at whole sequences: the trainer must not assume otherwise."""
    term = recipes.Term(
        "mean log-prob",
        scores=recipes.grpo().terms[0].scores,
        loss=lambda scores, batch: (
            -scores["logps"].mean(-1, keepdims=True) + 0 * scores["logps"]
        ),
    )
    recipe = Recipe("own", (term,))
    assert not recipe.tokenwise
    assert replace(recipe, terms=(replace(term, tokenwise=True),)).tokenwise
