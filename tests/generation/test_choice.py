"""Token choice against float64 numpy and against the frequencies it promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.generation.choice import choose_tokens, truncate

BATCH, VOCAB = 5, 37


def reference(logits, top_k=None, top_p=None, min_p=None):
    """Probabilities after truncation as transformers' warpers make them, by sorting."""
    probs = np.exp(logits.astype(np.float64) - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if top_k is not None:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    if top_p is not None:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= top_p]] = 0
        probs /= probs.sum()
    if min_p is not None:
        probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 6},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1.0},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.15},
]


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (BATCH, VOCAB)).astype(np.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_kept_probabilities_and_logps(logits, settings):
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    kept = np.asarray(truncate(weights, **settings), np.float64)
    expected = np.stack([reference(row, **settings) for row in logits])
    assert ((kept > 0) == (expected > 0)).all()
    np.testing.assert_allclose(
        kept / kept.sum(-1, keepdims=True), expected, rtol=1e-5, atol=1e-9
    )

    uniforms = np.random.default_rng(1).random((BATCH, 2), np.float32)
    choice = choose_tokens(jnp.asarray(logits), jnp.asarray(uniforms), **settings)
    at = (np.arange(BATCH), np.asarray(choice.tokens))
    np.testing.assert_allclose(choice.sampler_logps, np.log(expected[at]), atol=1e-5)
    plain = np.stack([reference(row) for row in logits])
    np.testing.assert_allclose(choice.logps, np.log(plain[at]), atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 9, "top_p": 0.8, "min_p": 0.15}], ids=str
)
def test_frequencies(logits, settings):
    draws = 40_000
    row = jnp.broadcast_to(logits[0], (draws, VOCAB))
    uniforms = jax.random.uniform(jax.random.key(0), (draws, 2))
    tokens = jax.jit(lambda x, u: choose_tokens(x, u, **settings).tokens)(row, uniforms)
    seen = np.bincount(np.asarray(tokens), minlength=VOCAB)
    expected = draws * reference(logits[0], **settings)
    assert (seen[expected == 0] == 0).all()
    often = expected >= 5
    statistic = ((seen - expected)[often] ** 2 / expected[often]).sum()
    # mean k, variance 2 k: five standard deviations
    freedom = often.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0]])
    choice = choose_tokens(logits, jnp.zeros((1, 2)), greedy=True, top_p=0.1)
    assert choice.tokens.tolist() == [1]
    assert choice.sampler_logps.tolist() == [0.0]
    expected = 3 - np.log(np.exp([0, 3, 3, 1]).sum())
    np.testing.assert_allclose(choice.logps, [expected], rtol=1e-6)


def test_ties_with_the_last_kept_token_stay():
    weights = jnp.array([[1.0, 0.5, 0.5, 0.25]])
    assert (truncate(weights, top_k=2)[0] > 0).tolist() == [True, True, True, False]
    # probabilities .444 .222 .222 .111
    assert (truncate(weights, top_p=0.5)[0] > 0).tolist() == [True, True, True, False]


def test_what_has_no_probability_is_never_drawn():
    logits = jnp.array([[-1e9, 0.0, -jnp.inf, 0.0, -1e9]])
    edges = [0.0, np.nextafter(np.float32(1), np.float32(0))]
    for first in edges:
        for second in edges:
            choice = choose_tokens(logits, jnp.array([[first, second]]))
            assert choice.tokens.tolist()[0] in (1, 3)
            assert np.isfinite(choice.logps).all()
