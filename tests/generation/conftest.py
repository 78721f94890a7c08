from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.stack import decoder

PADDED, VOCAB = 32, 29


@pytest.fixture(scope="session")
def policy():
    return decoder(
        DecoderConfig(
            vocab_size=VOCAB,
            padded_vocab_size=PADDED,
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            max_positions=64,
        )
    )


@pytest.fixture(scope="session")
def params(policy):
    """Random parameters whose next-token distributions are neither flat nor sharp,
    and whose padding rows would win if they took part."""
    params = jax.jit(policy.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 2.0 * x, params)
    return {**params, "unembed": params["unembed"].at[VOCAB:].mul(20.0)}


@pytest.fixture(scope="session")
def prompts():
    """Three contexts of 6, 4 and 2 tokens, padded on the left."""
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, VOCAB, (3, 6)).astype(np.int32)
    mask = np.arange(6)[None] >= np.array([0, 2, 4])[:, None]
    return contexts, mask
