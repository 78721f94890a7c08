"""Windows and soft-caps: every way to compute the same hidden states agrees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models

CONFIG = models.DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    window=3,
    local_layers=(0, 2),
    attention_softcap=2.0,
    query_scalar=3.0,
    qk_norm=True,
    joint_qk_norm=True,
    post_norm=True,
    norm_offset=1.0,
    scale_embeddings=True,
    activation="gelu_tanh",
)
CONTEXT, RESPONSE = 7, 5


def jitted(config, how="plain"):
    policy = models.decoder(config, attention=how)
    return dataclasses.replace(policy, hidden=jax.jit(policy.hidden))


POLICIES = {how: jitted(CONFIG, how) for how in ("plain", "chunked")}


@pytest.fixture(scope="module")
def params():
    """Random, norms too."""
    leaves, treedef = jax.tree.flatten(POLICIES["plain"].init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    noisy = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([4, 7])
    return {
        "contexts": [rng.integers(50, size=n) for n in lengths],
        "lengths": lengths,
        "responses": rng.integers(50, size=(4, RESPONSE)),
        "index": np.repeat([0, 1], 2),
    }


@pytest.fixture(scope="module")
def expected(params, batch):
    """Each sequence alone, without padding, cache or prefix; and with full windows."""
    wide = jitted(dataclasses.replace(CONFIG, local_layers=(), window=None))
    rows: dict = {"windows": [], "full": []}
    for i, response in enumerate(batch["responses"]):
        tokens = np.concatenate([batch["contexts"][batch["index"][i]], response])[None]
        positions = np.arange(tokens.shape[1])[None]
        for name, policy in (("windows", POLICIES["plain"]), ("full", wide)):
            hidden, _ = policy.hidden(
                params, tokens, positions, np.ones_like(tokens), None
            )
            rows[name].append(hidden[0, -RESPONSE:])
    windows, full = np.stack(rows["windows"]), np.stack(rows["full"])
    assert np.abs(windows - full).max() > 0.1  # the windows matter
    return windows


def behind_prefix(policy, params, batch, left, grouped, unstacked=False):
    """Responses behind the contexts' caches, padded on the left or on the right."""
    contexts = np.zeros((2, CONTEXT + 2), int)
    mask = np.zeros_like(contexts)
    for i, tokens in enumerate(batch["contexts"]):
        at = slice(-len(tokens), None) if left else slice(len(tokens))
        contexts[i, at], mask[i, at] = tokens, 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    empty = policy.init_cache(2, contexts.shape[1])
    _, cache = policy.hidden(params, contexts, positions, mask, empty)
    prefix = cache.as_prefix(None if grouped else jnp.asarray(batch["index"]))
    own = policy.init_cache(4, RESPONSE).replace(prefix=prefix)
    if unstacked:
        own, params = own.unstack(), models.unstack_params(params)
    lengths = batch["lengths"][batch["index"]]
    return own, params, lengths[:, None] + np.arange(RESPONSE)


@pytest.mark.parametrize(
    ("how", "left", "grouped"),
    [
        ("plain", False, False),
        ("plain", True, True),
        ("chunked", True, False),
        ("chunked", False, True),
    ],
)
def test_behind_a_shared_prefix(how, left, grouped, params, batch, expected):
    policy = POLICIES[how]
    own, params, positions = behind_prefix(policy, params, batch, left, grouped)
    tokens = batch["responses"]
    hidden, _ = policy.hidden(params, tokens, positions, np.ones_like(tokens), own)
    np.testing.assert_allclose(hidden, expected, atol=1e-4)


def test_token_by_token(params, batch, expected):
    policy = POLICIES["plain"]
    cache, params, positions = behind_prefix(policy, params, batch, False, True, True)
    one, out = np.ones((4, 1), int), []
    step = policy.hidden
    for t in range(RESPONSE):
        at = slice(t, t + 1)
        hidden, cache = step(
            params, batch["responses"][:, at], positions[:, at], one, cache
        )
        out.append(hidden)
    np.testing.assert_allclose(np.concatenate(out, 1), expected, atol=1e-4)


@pytest.mark.slow  # compiles two backward passes
def test_gradients_of_blocks(params, batch):
    """Through the prefix, the windows and the caps: as of all scores at once."""

    def loss(policy, params):
        own, params, positions = behind_prefix(policy, params, batch, False, True)
        tokens = batch["responses"]
        hidden, _ = policy.hidden(params, tokens, positions, np.ones_like(tokens), own)
        return jnp.sum(jnp.sin(hidden))

    plain, chunked = (
        jax.jit(jax.grad(lambda p, policy=policy: loss(policy, p)))(params)
        for policy in POLICIES.values()
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3),
        plain,
        chunked,
    )


def test_a_window_beyond_all_tokens_is_none(params):
    wide = dataclasses.replace(CONFIG, window=64)
    none = dataclasses.replace(CONFIG, window=None, local_layers=())
    tokens = np.random.default_rng(3).integers(50, size=(2, 9))
    rest = np.broadcast_to(np.arange(9), tokens.shape), np.ones_like(tokens)
    for how in POLICIES:
        first, second = (
            jitted(c, how).hidden(params, tokens, *rest)[0] for c in (wide, none)
        )
        # Two programs, each with roundings of its own (1.7e-6 on jax 0.12).
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_what_lies_before_the_window_does_not_matter(params):
    """With windows in all layers a token depends on the ``L (w - 1)`` before it."""
    config = dataclasses.replace(CONFIG, local_layers=(0, 1, 2))
    policy = jitted(config)
    tokens = np.random.default_rng(4).integers(50, size=(1, 12))
    other = tokens.copy()
    other[0, : 12 - 1 - 3 * 2] = 1
    rest = np.arange(12)[None], np.ones_like(tokens)
    first, second = (policy.hidden(params, t, *rest)[0] for t in (tokens, other))
    np.testing.assert_array_equal(first[:, -1], second[:, -1])
    assert np.abs(first[:, -2] - second[:, -2]).max() > 1e-4


@pytest.mark.parametrize("grouped", [False, True])
def test_in_a_ring(grouped, params, batch, expected):
    """Decoding that began near the ring's end, with what it held before in the way."""
    policy = POLICIES["plain"]
    cache, _, positions = behind_prefix(policy, params, batch, False, grouped)
    prefix = cache.prefix
    prefix = prefix.replace(keys=jnp.swapaxes(prefix.keys, -1, -2))
    size, first = RESPONSE + 1, RESPONSE - 2
    ring = policy.init_cache(4, size).as_ring().replace(prefix=prefix)
    ring = ring.replace(keys=ring.keys + 3.0, values=ring.values + 5.0)
    ring = ring.replace(segment_ids=jnp.full((4, size), 7, jnp.int32))
    one, out = np.ones((4, 1), int), []
    step = jax.jit(policy.hidden)
    for t in range(RESPONSE):
        at = slice(t, t + 1)
        ring = ring.replace(length=jnp.int32((first + t) % size))
        hidden, ring = step(
            params, batch["responses"][:, at], positions[:, at], one, ring
        )
        out.append(hidden)
    np.testing.assert_allclose(np.concatenate(out, 1), expected, atol=1e-4)
