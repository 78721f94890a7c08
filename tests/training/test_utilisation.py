"""Model FLOP utilisation of a run, against what its completions say it did."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import training
from jaxrl_post.training.completions import completions_file
from jaxrl_post.training.flops import Lengths
from jaxrl_post.training.loss import effective_samples
from jaxrl_post.training.metrics import read_metrics

PEAK = 1e9


def passes_of(row):
    """A completion's multiplications and additions of one pass, without its context's:
    two layers of hidden size 16, one key-value head of two, an MLP of 32."""
    d, dim, context = 16, 8, len(row["prompt_ids"])
    weights = 2 * (d * dim * (2 + 2 * 1) + 2 * dim * d + 3 * d * 32)
    tokens = len(row["response_ids"])
    pairs = sum(context + t + 1 for t in range(tokens))
    return 2 * (weights + 264 * d) * tokens + 4 * 2 * 2 * dim * pairs


def context_of(row):
    d, dim, tokens = 16, 8, len(row["prompt_ids"])
    weights = 2 * (d * dim * (2 + 2 * 1) + 2 * dim * d + 3 * d * 32)
    return 2 * weights * tokens + 4 * 2 * 2 * dim * tokens * (tokens + 1) / 2


@pytest.mark.parametrize("updates", [1, 2])
def test_tokens_that_were_sampled_and_trained_on_count(tiny_config, updates):
    config = tiny_config(
        mesh={"peak_flops": PEAK},
        training={"steps": 1, "updates_per_step": updates},
        evaluation={},
    )
    run_dir = Path(training.run(config).dir)
    row = read_metrics(run_dir)[-1]
    lines = completions_file(run_dir, 1).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    once = sum(map(passes_of, rows)) + sum(map(context_of, rows[::4]))
    trained = once * (3 if updates == 1 else 4)  # scored first
    expected = trained / row["time/update"] / PEAK
    np.testing.assert_allclose(row["throughput/update_mfu"], expected, rtol=1e-6)
    expected = (trained + once) / row["time/step"] / PEAK
    np.testing.assert_allclose(row["throughput/mfu"], expected, rtol=1e-6)
    assert ("policy/ess" in row) == (updates > 1)
    assert 0 < row.get("policy/ess", 1.0) <= 1


def test_there_is_none_where_the_peak_is_not_known(tiny_config):
    row = training.run(tiny_config(training={"steps": 1}, evaluation={})).last_row
    assert not [name for name in row if "mfu" in name]


def test_lengths_of_masks():
    seen = Lengths.of([[0, 1, 1], [0, 0, 1]], [[1, 0], [1, 1], [0, 0], [1, 1]])
    assert seen.contexts.tolist() == [2, 1] and seen.before.tolist() == [2, 2, 1, 1]
    assert seen.responses.tolist() == [1, 2, 0, 2]
    named = Lengths.of([[0, 1, 1], [0, 0, 1]], [[1, 0], [1, 1]], index=[1, 0])
    assert named.before.tolist() == [1, 2]


def test_effective_samples_are_kishs():
    """Of weights 1 and 3 the share is (1 + 3)^2 / (2 (1 + 9)); equal ones count all."""
    means = {"a/ratio": jnp.array(2.0), "a/ratio_squared": jnp.array(5.0)}
    means |= {"b/ratio": jnp.array(3.0), "b/ratio_squared": jnp.array(9.0)}
    means |= {"c/ratio": jnp.array(0.0), "c/ratio_squared": jnp.array(0.0)}
    found = effective_samples(means)
    assert found.keys() == {"a/ess", "b/ess", "c/ess"}
    np.testing.assert_allclose([found["a/ess"], found["b/ess"]], [0.8, 1.0], rtol=1e-6)
    assert found["c/ess"] == 1  # no samples
