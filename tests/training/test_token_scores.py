"""The teacher's log-probs of completions that are shown: what they are, where kept."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models, training
from jaxrl_post.training.token_scores import token_texts


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return models.load(tiny_model)


def logps_of(policy, params, ids, tokens):
    """By whole logits, one sequence alone."""
    row = jnp.array([[*ids, *tokens]])
    ones = jnp.ones_like(row)
    states, _ = policy.hidden(params, row, jnp.arange(row.shape[1])[None], ones, None)
    head = policy.unembedding(params)[: policy.vocab_size]
    logps = jax.nn.log_softmax(states[0] @ head.T)
    places = np.arange(len(ids) - 1, len(ids) - 1 + len(tokens))
    return np.asarray(logps)[places, tokens]


def test_shown_completions_hold_both_log_probs(tiny_config, loaded):
    policy, params, tokenizer = loaded
    config = tiny_config(
        recipe={"name": "sdpo", "teacher": "live"},
        training={"steps": 3, "teacher_tokens": True, "checkpoint_every": 9},
        evaluation={},
    )
    result = training.run(config)

    def rows(step):
        path = result.dir / "completions" / f"step_{step:06d}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    shown = [row for row in rows(1) if "teacher_logps" in row]
    assert 0 < len(shown) <= 4  # one of each group that has a success to show
    assert any("teacher_logps" in row for row in rows(3))
    assert not any("teacher_logps" in row for row in rows(2))  # neither first nor last
    differs = False
    for row in shown:
        # Before the first update the student is the base, and so is the teacher.
        expected = logps_of(policy, params, row["prompt_ids"], row["response_ids"])
        np.testing.assert_allclose(row["logps"], expected, atol=2e-4)
        np.testing.assert_allclose(row["logps"], row["sampler_logps"], atol=2e-4)
        differs |= not np.allclose(row["logps"], row["teacher_logps"], atol=1e-3)
        assert len(row["pieces"]) == len(row["response_ids"])
        assert "".join(row["pieces"]).startswith(row["response"])
    assert differs  # the teacher has a context of its own


def test_pieces_are_the_text_whatever_the_bytes(loaded):
    *_, tokenizer = loaded
    ids = tokenizer("aé€ b", add_special_tokens=False)["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert "".join(pieces) == "aé€ b"
    assert pieces == ["a", "", "é", "", "", "€", " ", "b"]
    broken = [*ids[:2], *ids[:1]]  # a character that never ends
    assert "".join(token_texts(tokenizer, broken)) == tokenizer.decode(broken)
