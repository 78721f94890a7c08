"""Policies of others' modules: Linen and NNX, with tokens in the place of a cache."""

from __future__ import annotations

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import make_batch

from jaxrl_post import recipes
from jaxrl_post.generation import Sampler
from jaxrl_post.training.forward import predicting_states
from jaxrl_post.training.state import init_state
from jaxrl_post.training.update import make_update_step

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def documented():
    """The policies that the docs define, by their own words."""
    names: dict = {}
    snippets = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S
    )
    for snippet in snippets[:2]:
        exec(compile(snippet, "snippet", "exec"), names)
    return {"linen": names["policy"], "nnx": names["policy_nnx"]}


@pytest.fixture(params=["linen", "nnx"])
def policy(documented, request):
    return documented[request.param]


def whole(policy, params, tokens):
    """Hidden states of one sequence without padding."""
    tokens = jnp.asarray(tokens)[None]
    where = jnp.arange(tokens.shape[1])[None]
    return policy.hidden(params, tokens, where, jnp.ones_like(tokens))[0][0]


def test_shared_contexts_are_seen_as_if_they_stood_before_each(policy):
    params, batch = policy.init(jax.random.key(1)), make_batch()
    parts = (batch.contexts, batch.context_mask, None)
    found = jax.jit(lambda p: predicting_states(policy, p, *parts, *rest))
    rest = (batch.responses, batch.token_mask)
    found = found(params)
    for b in range(batch.size):
        context = batch.contexts[b // 2][batch.context_mask[b // 2]]
        response = batch.responses[b][batch.token_mask[b]]
        states = whole(policy, params, np.concatenate([context, response]))
        expected = states[len(context) - 1 : -1]
        np.testing.assert_allclose(found[b, : len(response)], expected, atol=1e-5)


def test_greedy_tokens_are_the_likeliest(policy):
    params = policy.init(jax.random.key(2))
    contexts = np.array([[0, 5, 7], [3, 1, 30]])
    mask = np.array([[False, True, True], [True, True, True]])
    sampler = Sampler(policy, max_new_tokens=6, temperature=0.0)
    tokens = sampler.generate(params, contexts, mask, key=jax.random.key(0)).tokens
    for row, (context, real) in enumerate(zip(contexts, mask, strict=True)):
        sequence = list(context[real])
        for token in tokens[row]:
            logits = whole(policy, params, sequence)[-1] @ policy.unembedding(params).T
            assert token == np.argmax(logits)
            sequence.append(token)


def test_an_update_follows_the_gradient(policy):
    """Of ``-sum(advantage * log-prob) / tokens``, with the logits built whole."""
    params, batch = policy.init(jax.random.key(3)), make_batch()
    batch = batch.replace(old_logps=None, sampler_logps=None)

    def loss(params):
        total = 0.0
        for b in range(batch.size):
            context = batch.contexts[b // 2][batch.context_mask[b // 2]]
            response = batch.responses[b][batch.token_mask[b]]
            states = whole(policy, params, np.concatenate([context, response]))
            logits = states[len(context) - 1 : -1] @ policy.unembedding(params).T
            logps = jax.nn.log_softmax(logits)[np.arange(len(response)), response]
            total -= batch.advantages[b] * jnp.sum(logps)
        return total / batch.token_mask.sum()

    expected = jax.jit(jax.grad(loss))(params)
    before = jax.tree.map(np.asarray, params)
    recipe, optimizer = recipes.grpo(), optax.sgd(1.0)
    state = init_state(params, optimizer, recipe, jax.random.key(0))
    state, _ = make_update_step(policy, recipe, optimizer)(state, batch)
    found = jax.tree.map(lambda a, b: a - b, before, state.trainable)
    assert float(optax.tree.norm(expected)) > 1e-2
    chex.assert_trees_all_close(found, expected, atol=1e-5)
