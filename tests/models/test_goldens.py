"""The decoder against transformers' torch models, see scripts/make_model_goldens.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import GOLDENS, NAMES

from jaxrl_post import models
from jaxrl_post.generation import Sampler
from jaxrl_post.sharding import make_mesh

TOLERANCE = 2e-4
PADDING = 8


def logits_of(policy, params, hidden):
    logits = hidden @ policy.unembedding(params).T
    cap = policy.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """Policy, parameters, golden arrays and a compiled forward pass to logits."""
    folder = GOLDENS / request.param
    policy, params, tokenizer = models.load(folder)
    assert tokenizer is None
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)

    @jax.jit
    def forward(params, tokens, positions, segment_ids):
        hidden, _ = policy.hidden(params, tokens, positions, segment_ids)
        return logits_of(policy, params, hidden)

    return policy, params, golden, forward


def test_right_padding(case):
    _, params, golden, forward = case
    tokens = np.pad(golden["tokens"], ((0, 0), (0, PADDING)), constant_values=7)
    segments = np.pad(np.ones_like(golden["tokens"]), ((0, 0), (0, PADDING)))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    logits = forward(params, tokens, positions, segments)[:, :-PADDING]
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE, rtol=0)


def test_left_padding(case):
    _, params, golden, forward = case
    tokens = np.pad(golden["tokens"], ((0, 0), (PADDING, 0)), constant_values=7)
    segments = np.pad(np.ones_like(golden["tokens"]), ((0, 0), (PADDING, 0)))
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    logits = forward(params, tokens, positions, segments)[:, PADDING:]
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE, rtol=0)


def test_packing(case):
    """Two sequences in a row, the second as if it were alone."""
    _, params, golden, forward = case
    rows, length = golden["tokens"].shape
    other = np.roll(golden["tokens"], 1, axis=0)[:, :PADDING]
    tokens = np.concatenate([other, golden["tokens"]], axis=1)
    segments = np.repeat([[1, 2]], rows, axis=0).repeat([PADDING, length], axis=1)
    positions = np.concatenate([np.arange(PADDING), np.arange(length)])
    positions = np.broadcast_to(positions, tokens.shape)
    logits = forward(params, tokens, positions, segments)
    np.testing.assert_allclose(
        logits[:, PADDING:], golden["logits"], atol=TOLERANCE, rtol=0
    )
    first = np.roll(golden["logits"], 1, axis=0)[:, :PADDING]
    np.testing.assert_allclose(logits[:, :PADDING], first, atol=TOLERANCE, rtol=0)


def test_greedy_decoding(case):
    """Token for token what `generate` writes, through the cache."""
    policy, params, golden, _ = case
    prompts, mask = golden["prompts"], golden["prompt_mask"].astype(np.int32)
    (rows, length), new = prompts.shape, golden["greedy"].shape[1]

    @jax.jit
    def decode(params):
        def pick(hidden):
            logits = hidden[:, -1] @ policy.unembedding(params).T
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def step(carry, _):
            token, position, cache = carry
            ones = jnp.ones((rows, 1), jnp.int32)
            hidden, cache = policy.hidden(
                params, token[:, None], position[:, None], ones, cache
            )
            return (pick(hidden), position + 1, cache), token

        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        cache = policy.init_cache(rows, length + new)
        hidden, cache = policy.hidden(params, prompts, positions, mask, cache)
        start = (pick(hidden), jnp.asarray(mask.sum(1)), cache)
        return jax.lax.scan(step, start, length=new)[1].T

    np.testing.assert_array_equal(decode(params), golden["greedy"])


@pytest.mark.parametrize("name", ["gemma2", "olmo3"])
def test_the_sampler_keeps_windows_and_caps(name):
    """More sequences than slots, through the sampler's own caches."""
    policy, params, _ = models.load(GOLDENS / name)
    with np.load(GOLDENS / name / "golden.npz") as golden:
        prompts, mask, greedy = (
            golden["prompts"],
            golden["prompt_mask"],
            golden["greedy"],
        )
    sampler = Sampler(policy, max_new_tokens=64, slots=2, temperature=0.0)
    rollouts = sampler.generate(
        params, prompts, mask.astype(bool), group_size=1, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(rollouts.tokens, greedy)


@pytest.mark.parametrize("name", ["olmo3", "phi3", "qwen3_moe"])
def test_spread_over_a_mesh(name):
    """Each device's part read by itself: norms over all heads, rows of fused tensors,
    experts.
    """
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    policy, params, _ = models.load(GOLDENS / name, mesh)
    if name == "qwen3_moe":
        assert params["layers"]["mlp"]["gate"]["kernel"].sharding.spec[1] == "tensor"
    with np.load(GOLDENS / name / "golden.npz") as golden, jax.set_mesh(mesh):
        tokens, expected = golden["tokens"][:2], golden["logits"][:2]
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        logits = jax.jit(
            lambda p: logits_of(
                policy, p, policy.hidden(p, tokens, positions, tokens >= 0)[0]
            )
        )(params)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
