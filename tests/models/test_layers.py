"""Identities of the decoder: every way to compute the same hidden states agrees."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.models.kinds import Rotations
from jaxrl_post.models.layers import cos_sin_of, rotate

CONFIG = models.DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
    qk_norm=True,
)
POLICY = models.decoder(CONFIG)
hidden = jax.jit(POLICY.hidden)


@pytest.fixture(scope="module")
def params():
    """Random, norms and biases too."""
    tree = POLICY.init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def batch():
    """Two contexts of unlike length, three responses to each, and all of it at once."""
    rng = np.random.default_rng(0)
    contexts, responses = rng.integers(50, size=(2, 5)), rng.integers(50, size=(6, 4))
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    index = np.repeat([0, 1], 3)
    lengths = mask.sum(1)[index]
    whole = np.concatenate([contexts[index], responses], axis=1)
    segments = np.concatenate([mask[index], np.ones_like(responses)], axis=1)
    return {
        "contexts": contexts,
        "mask": mask,
        "context_positions": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
        "index": index,
        "responses": responses,
        "positions": lengths[:, None] + np.arange(4),
        "whole": whole,
        "segments": segments,
        "whole_positions": np.maximum(np.cumsum(segments, axis=1) - 1, 0),
    }


@pytest.fixture(scope="module")
def expected(params, batch):
    """Hidden states of the responses, computed without cache or prefix."""
    out, cache = hidden(
        params, batch["whole"], batch["whole_positions"], batch["segments"]
    )
    assert cache is None
    return out[:, 5:]


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_responses_after_a_shared_prefix(params, batch, expected, grouped, unstacked):
    cache = POLICY.init_cache(2, 5)
    if unstacked:
        params, cache = models.unstack_params(params), cache.unstack()
    _, filled = hidden(
        params, batch["contexts"], batch["context_positions"], batch["mask"], cache
    )
    prefix = filled.as_prefix(None if grouped else jnp.asarray(batch["index"]))
    cache = POLICY.init_cache(6, 4).replace(prefix=prefix)
    if unstacked:
        cache = cache.unstack()
    ones = np.ones_like(batch["responses"])
    out, cache = hidden(params, batch["responses"], batch["positions"], ones, cache)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert int(cache.length) == 4


def test_prefix_rows_in_any_order(params, batch, expected):
    """`index` says whose context it is; rows of a group need not be adjacent."""
    order = np.array([4, 0, 3, 1, 5, 2])
    _, filled = hidden(
        params,
        batch["contexts"],
        batch["context_positions"],
        batch["mask"],
        POLICY.init_cache(2, 5),
    )
    prefix = filled.as_prefix(jnp.asarray(batch["index"][order]))
    cache = POLICY.init_cache(6, 4).replace(prefix=prefix)
    responses, positions = batch["responses"][order], batch["positions"][order]
    out, _ = hidden(params, responses, positions, np.ones_like(responses), cache)
    np.testing.assert_allclose(out, expected[order], atol=2e-5)


def test_token_by_token_through_the_cache(params, batch, expected):
    cache = POLICY.init_cache(6, 12)  # more slots than tokens
    for t in range(9):
        column = slice(t, t + 1)
        out, cache = hidden(
            params,
            batch["whole"][:, column],
            batch["whole_positions"][:, column],
            batch["segments"][:, column],
            cache,
        )
        if t >= 5:
            np.testing.assert_allclose(out[:, 0], expected[:, t - 5], atol=2e-5)
    np.testing.assert_array_equal(cache.segment_ids[:, :9], batch["segments"])
    assert not np.any(cache.segment_ids[:, 9:])


def test_what_stands_at_padding_does_not_matter(params, batch, expected):
    tokens = np.where(batch["segments"] > 0, batch["whole"], 49)
    positions = np.where(batch["segments"] > 0, batch["whole_positions"], 11)
    out, _ = hidden(params, tokens, positions, batch["segments"])
    np.testing.assert_allclose(out[:, 5:], expected, atol=1e-6)
    assert np.all(np.isfinite(out))


def test_gradients_scanned_unstacked_and_recomputed(params, batch):
    """The same derivative from the scan, the loop and with rematerialisation."""
    inputs = batch["whole"], batch["whole_positions"], batch["segments"]

    def gradient(policy, tree):
        def loss(tree):
            return jnp.sum(jnp.sin(policy.hidden(tree, *inputs)[0][:, 5:]))

        return jax.jit(jax.grad(loss))(tree)

    plain = gradient(POLICY, params)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(plain["layers"]))
    again = gradient(models.decoder(CONFIG, remat="full"), params)
    chex.assert_trees_all_close(again, plain, atol=1e-4, rtol=1e-4)
    looped = gradient(POLICY, models.unstack_params(params))
    chex.assert_trees_all_close(
        looped, models.unstack_params(plain), atol=1e-4, rtol=1e-4
    )


def test_rematerialisation_recomputes(params, batch):
    inputs = batch["whole"], batch["whole_positions"], batch["segments"]

    def jaxpr(policy):
        return str(jax.make_jaxpr(lambda p: policy.hidden(p, *inputs)[0])(params))

    assert "remat" in jaxpr(models.decoder(CONFIG, remat="full"))
    assert "remat" not in jaxpr(models.decoder(CONFIG, remat="none"))


def test_bfloat16_compute(params, batch, expected):
    policy = models.decoder(CONFIG, compute_dtype=jnp.bfloat16)
    out, _ = policy.hidden(
        params, batch["whole"], batch["whole_positions"], batch["segments"]
    )
    assert out.dtype == jnp.bfloat16
    assert policy.init_cache(1, 2).keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(out[:, 5:].astype(jnp.float32), expected, atol=0.15)


def test_logical_axes_name_every_dimension(params):
    for config in (CONFIG, dataclasses.replace(CONFIG, tie_embeddings=True)):
        policy = models.decoder(config)
        shapes = jax.eval_shape(policy.init, jax.random.key(0))
        jax.tree.map(
            lambda leaf, names: chex.assert_equal(leaf.ndim, len(names)),
            shapes,
            policy.logical_axes,
        )


def turned_to(x, positions, theta):
    half = x.shape[-1] // 2
    plain = (theta ** -(np.arange(half) / half))[None].astype(np.float32)
    ways = Rotations(plain, np.ones(1, np.float32), np.zeros(1, np.int32))
    return rotate(jnp.asarray(x, jnp.float32), cos_sin_of(ways, jnp.asarray(positions)))


def test_rotation_closed_form():
    """``(x_i + i x_{i + d/2}) * exp(i position theta^(-2 i / d))`` in float64."""
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 6))
    positions = np.array([[0, 1, 5], [7, 100, 31]])
    angles = positions[..., None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, :, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(turned_to(x, positions, 10_000.0), turned, atol=2e-5)


def test_rotation_makes_scores_depend_on_distance_only():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at, other):
        left = turned_to(q, [[at]], 100.0)
        right = turned_to(k, [[other]], 100.0)
        return jnp.sum(left * right)

    np.testing.assert_allclose(score(13, 9), score(4, 0), atol=1e-5)
    assert abs(score(13, 9) - score(13, 8)) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"padded_vocab_size": 49}, "padded_vocab_size=49 is below"),
    ],
)
def test_impossible_configs(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)
