"""A policy of a few thousand parameters and batches for it."""

from __future__ import annotations

import jax
import numpy as np

from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.stack import decoder
from jaxrl_post.recipes import Batch

GROUPS, GROUP_SIZE, WIDTH, TIME = 4, 2, 5, 6
CONFIG = DecoderConfig(
    vocab_size=19,
    padded_vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
)
POLICY = decoder(CONFIG)
PARAMS = POLICY.init(jax.random.key(0))


def make_batch(seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = GROUPS * GROUP_SIZE
    lengths = rng.integers(1, TIME + 1, rows)
    lengths[0], lengths[1] = TIME, 1
    mask = np.arange(TIME) < lengths[:, None]
    context_mask = np.arange(WIDTH)[::-1] < rng.integers(1, WIDTH + 1, GROUPS)[:, None]
    return Batch(
        contexts=rng.integers(0, 19, (GROUPS, WIDTH)).astype(np.int32),
        context_mask=context_mask,
        responses=rng.integers(0, 19, (rows, TIME)).astype(np.int32),
        token_mask=mask,
        loss_mask=mask,
        sequence_mask=np.ones(rows, bool),
        advantages=rng.normal(size=rows).astype(np.float32),
        old_logps=rng.normal(-3, 0.3, (rows, TIME)).astype(np.float32),
        sampler_logps=rng.normal(-3, 0.3, (rows, TIME)).astype(np.float32),
    )
