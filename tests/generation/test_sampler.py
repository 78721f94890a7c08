"""Sampling against full forward passes, and against itself cut up in other ways."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models, sharding, vocabulary
from jaxrl_post.generation import Sampler

KEY = jax.random.key(7)
STOPS = (3, 4, 11)
T, G = 9, 4


def assert_same(one, other, rows=slice(None), atol=1e-4):
    np.testing.assert_array_equal(one.tokens, other.tokens[rows])
    np.testing.assert_array_equal(one.mask, other.mask[rows])
    np.testing.assert_array_equal(one.stopped, other.stopped[rows])
    np.testing.assert_allclose(one.logps, other.logps[rows], atol=atol)
    np.testing.assert_allclose(one.sampler_logps, other.sampler_logps[rows], atol=atol)


def recompute(policy, params, context, response, temperature):
    """Log-probs of a response as a trainer that knows no cache computes them."""
    tokens = jnp.concatenate([context, response])[None]
    positions = jnp.arange(tokens.size)[None]
    hidden, _ = policy.hidden(params, tokens, positions, jnp.ones_like(tokens))
    scores = vocabulary.map_logits(
        lambda logits, ids: (logits.log_probs(ids), logits.top_k(1)[1][:, 0]),
        hidden[0, len(context) - 1 : -1],
        policy.unembedding(params),
        jnp.asarray(response),
        temperature=temperature,
        vocab_size=policy.vocab_size,
    )
    return [np.asarray(x) for x in scores]


@pytest.fixture(scope="module")
def sampled(policy, params, prompts):
    sampler = Sampler(policy, max_new_tokens=T, stop_tokens=STOPS, temperature=0.7)
    return sampler.generate(params, *prompts, key=KEY, group_size=G)


def test_logps_are_what_a_trainer_recomputes(policy, params, prompts, sampled):
    contexts, mask = prompts
    for row in range(3 * G):
        real = sampled.mask[row]
        logps, _ = recompute(
            policy,
            params,
            contexts[row // G][mask[row // G]],
            sampled.tokens[row][real],
            0.7,
        )
        np.testing.assert_allclose(sampled.logps[row][real], logps, atol=1e-4)
    np.testing.assert_allclose(sampled.sampler_logps, sampled.logps, atol=1e-6)
    assert len({tuple(row) for row in sampled.tokens[:G]}) > 1


def test_masks_end_at_stop_tokens(sampled):
    for tokens, mask, stopped in zip(
        sampled.tokens, sampled.mask, sampled.stopped, strict=True
    ):
        ends = np.flatnonzero(np.isin(tokens[mask], STOPS))
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert ends.tolist() == ([mask.sum() - 1] if stopped else [])
        assert stopped or mask.all()
        assert (tokens[~mask] == 0).all()
    assert 0 < sampled.stopped.sum() < len(sampled.stopped)
    assert sampled.lengths.tolist() == sampled.mask.sum(-1).tolist()
    assert (sampled.logps[~sampled.mask] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        # two waves, the second with a filler group; pad == eos
        {
            "slots": 8,
            "steps_per_dispatch": 3,
            "pad_token": STOPS[0],
            "continuous": False,
        },
        # a group in two parts
        {"slots": 3, "steps_per_dispatch": 1, "continuous": False},
        {"slots": 8, "steps_per_dispatch": 3},
        # fewer contexts at a time than there are, and one column of them at a time
        {"slots": 1, "steps_per_dispatch": 2, "prefill_tokens": 1},
    ],
    ids=str,
)
def test_slots_their_order_and_dispatches_change_nothing(
    policy, params, prompts, sampled, settings
):
    sampler = Sampler(
        policy, max_new_tokens=T, stop_tokens=STOPS, temperature=0.7, **settings
    )
    got = sampler.generate(params, *prompts, key=KEY, group_size=G)
    if "pad_token" in settings:
        assert (got.tokens[~got.mask] == STOPS[0]).all()
        got = got.replace(tokens=np.where(got.mask, got.tokens, 0))
    assert_same(got, sampled)


def test_side_of_padding_changes_nothing(policy, params, prompts, sampled):
    contexts, mask = prompts
    right = np.stack(
        [np.roll(c, m.sum() - len(m)) for c, m in zip(contexts, mask, strict=True)]
    )
    right_mask = np.sort(mask, axis=1)[:, ::-1]
    junk = np.where(right_mask, right, 5)
    wide = [np.pad(x, ((0, 0), (3, 2))) for x in (junk, right_mask)]
    sampler = Sampler(policy, max_new_tokens=T, stop_tokens=STOPS, temperature=0.7)
    assert_same(sampler.generate(params, *wide, key=KEY, group_size=G), sampled)


def test_greedy_is_the_argmax_of_full_forward_passes(policy, params, prompts):
    sampler = Sampler(policy, max_new_tokens=T, temperature=0, stop_tokens=STOPS[:1])
    got = sampler.generate(params, *prompts, key=KEY)
    contexts, mask = prompts
    for row in range(3):
        real = got.mask[row]
        logps, best = recompute(
            policy, params, contexts[row][mask[row]], got.tokens[row][real], 1.0
        )
        assert got.tokens[row][real].tolist() == best.tolist()
        np.testing.assert_allclose(got.logps[row][real], logps, atol=1e-4)
    assert (got.sampler_logps == 0).all()


def test_truncation_reaches_sampler_logps_only(policy, params, prompts):
    sampler = Sampler(policy, max_new_tokens=1, top_k=3)
    got = sampler.generate(params, *prompts, key=KEY, group_size=G)
    contexts, mask = prompts
    logps, _ = recompute(policy, params, contexts[0][mask[0]], got.tokens[0], 1.0)
    np.testing.assert_allclose(got.logps[0], logps, atol=1e-4)
    assert (got.sampler_logps > got.logps).all()


def test_temperature_of_a_call_and_of_the_sampler_agree(
    policy, params, prompts, sampled
):
    sampler = Sampler(policy, max_new_tokens=T, stop_tokens=STOPS)
    got = sampler.generate(params, *prompts, key=KEY, group_size=G, temperature=0.7)
    assert_same(got, sampled)
    other = sampler.generate(params, *prompts, key=KEY, group_size=G)
    assert (other.tokens != sampled.tokens).any()


def test_softcap_comes_before_temperature(policy, params, prompts):
    capped = dataclasses.replace(policy, logit_softcap=2.0)
    got = Sampler(capped, max_new_tokens=1, temperature=0.5).generate(
        params, *prompts, key=KEY
    )
    # 2 tanh(z / 2) / 0.5 is within [-4, 4]
    assert (got.logps > -8 - np.log(29)).all()
    plain = Sampler(policy, max_new_tokens=1, temperature=0.5).generate(
        params, *prompts, key=KEY
    )
    assert np.abs(plain.logps - got.logps).max() > 1e-3


def test_a_program_each_for_prefill_and_decoding(policy, params, prompts):
    traces = Counter()

    def counted(params, tokens, *args):
        traces[tokens.shape] += 1
        return policy.hidden(params, tokens, *args)

    contexts, mask = prompts
    sampler = Sampler(
        dataclasses.replace(policy, hidden=counted),
        max_new_tokens=5,
        slots=8,
        steps_per_dispatch=2,
    )
    for seed, rows in enumerate(([0, 1, 2], [2], [0, 1], [0, 1, 2, 0, 1])):
        for scale in (1.0, 0.5):
            sampler.generate(
                params,
                contexts[rows],
                mask[rows],
                key=jax.random.key(seed),
                group_size=G,
                temperature=scale,
            )
    # [2] alone is padded to one context, and its group fills 4 slots; [0, 1] fill all,
    # as groups; the others are refilled from 4 contexts, all there are or 2 at a time.
    assert traces == {(4, 6): 1, (2, 6): 1, (1, 6): 1, (8, 1): 2, (4, 1): 1}


def counted_runs(policy, **settings):
    """A sampler, and how often it runs a forward pass of each length."""
    runs = Counter()

    def counted(params, tokens, *args):
        jax.debug.callback(lambda: runs.update([tokens.shape[1]]))
        return policy.hidden(params, tokens, *args)

    return Sampler(dataclasses.replace(policy, hidden=counted), **settings), runs


def test_nothing_is_computed_twice_or_after_the_end(policy, params, prompts):
    settings = {
        "max_new_tokens": 40,
        "stop_tokens": tuple(range(0, 29, 2)),
        "slots": 8,
        "steps_per_dispatch": 4,
    }
    sampler, runs = counted_runs(policy, **settings, continuous=False)
    got = sampler.generate(params, *prompts, key=KEY, group_size=G)
    jax.effects_barrier()
    assert got.stopped.all()
    # two waves, each as long as its longest sequence
    waves = got.lengths[:8].max(), got.lengths[8:].max()
    assert runs == {6: 2, 1: sum(waves) - 2}

    sampler, runs = counted_runs(policy, **settings)
    got = sampler.generate(params, *prompts, key=KEY, group_size=G)
    jax.effects_barrier()
    # The next sequence begins in the step after the one that frees its slot; only the
    # first ones have their first token without a step.
    ends = sorted(got.lengths[:8] - 1)
    for length in got.lengths[8:]:
        ends = sorted([ends[0] + length, *ends[1:]])
    assert runs == {6: 1, 1: max(ends)}


def test_one_token(policy, params, prompts):
    got = Sampler(policy, max_new_tokens=1).generate(params, *prompts, key=KEY)
    assert got.tokens.shape == (3, 1) and got.mask.all() and not got.stopped.any()


def test_greedy_is_what_transformers_generates():
    folder = Path(__file__).parents[1] / "goldens" / "models" / "llama_tied"
    policy, params, _ = models.load(folder)
    golden = np.load(folder / "golden.npz")
    limit = golden["greedy"].shape[1]
    sampler = Sampler(policy, max_new_tokens=limit, temperature=0)
    got = sampler.generate(params, golden["prompts"], golden["prompt_mask"], key=KEY)
    np.testing.assert_array_equal(got.tokens, golden["greedy"])


def test_a_mesh_changes_nothing(policy, params, prompts, sampled):
    mesh = sharding.make_mesh(2, 2, 2)
    placed = sharding.shard(params, policy.logical_axes, mesh)
    with jax.set_mesh(mesh):
        sampler = Sampler(
            policy, max_new_tokens=T, stop_tokens=STOPS, temperature=0.7, slots=8
        )
        got = sampler.generate(placed, *prompts, key=KEY, group_size=G)
    assert_same(got, sampled)


def test_refusals(policy, params, prompts):
    contexts, mask = prompts
    sampler = Sampler(policy, max_new_tokens=60)
    with pytest.raises(ValueError, match="context 0 has 6 tokens.*max_new_tokens=60"):
        sampler.generate(params, contexts, mask, key=KEY)
    with pytest.raises(ValueError, match="context 2 is empty"):
        empty = mask & (np.arange(3) < 2)[:, None]
        sampler.generate(params, contexts, empty, key=KEY)
    with pytest.raises(ValueError, match=r"both be \[P, S\]"):
        sampler.generate(params, contexts, mask[:, 1:], key=KEY)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"min_p": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampler(policy, max_new_tokens=1, **wrong)
    with pytest.raises(ValueError, match="stop_tokens: id=29"):
        Sampler(policy, max_new_tokens=1, stop_tokens=(29,))
    with jax.set_mesh(sharding.make_mesh(4, 2, 1)):
        with pytest.raises(ValueError, match="slots=4.*8 shards"):
            Sampler(policy, max_new_tokens=1, slots=4).generate(
                params, contexts, mask, key=KEY
            )
