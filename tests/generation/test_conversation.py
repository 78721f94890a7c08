"""Turns behind kept caches: as those behind whole contexts, which are read again."""

from __future__ import annotations

import dataclasses
from collections import Counter

import chex
import jax
import numpy as np
import pytest

from jaxrl_post.generation import Sampler, pad_contexts
from jaxrl_post.generation.conversation import Conversation
from jaxrl_post.models.stack import decoder

KEY, SECOND, THIRD = (jax.random.key(i) for i in (3, 4, 5))
STOPS, G = (5,), 4
# A token read behind a cache and one that is decoded are sums of up to 300 float32
# terms in other orders.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def long_policy(policy):
    config = dataclasses.replace(policy.config, max_positions=2000)
    return dataclasses.replace(policy, config=config)


def sampler(policy, new=160, **settings):
    return Sampler(policy, max_new_tokens=new, stop_tokens=STOPS, **settings)


def said_to(rows, seed, most=6):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 29, rng.integers(1, most)).tolist() for _ in rows]


def written(rollouts, row):
    return rollouts.tokens[row][rollouts.mask[row]].tolist()


def padded_right(rows):
    tokens, mask = np.zeros((len(rows), max(map(len, rows))), int), []
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
        mask.append(np.arange(tokens.shape[1]) < len(ids))
    return tokens, np.array(mask)


class Both:
    """A conversation, and the texts that it has come to."""

    def __init__(self, sampler, params, contexts, mask, **options):
        self.sampler, self.params, self.options = sampler, params, options
        self.kept = Conversation(sampler)
        self.last = self.kept.begin(
            params, contexts, mask, key=KEY, group_size=G, **options
        )
        self.before = [
            [*contexts[row // G][mask[row // G]], *written(self.last, row)]
            for row in range(len(contexts) * G)
        ]

    def go_on(self, rows, said, key, **options):
        """Rollouts of the next turn, from kept caches and from whole contexts."""
        own = [
            [self.before[row][-1], *ids] for row, ids in zip(rows, said, strict=True)
        ]
        whole = [[*self.before[r], *ids] for r, ids in zip(rows, said, strict=True)]
        again = self.sampler.generate(
            self.params, *pad_contexts(whole), key=key, **self.options
        )
        tokens, mask = padded_right(own)
        self.last = self.kept.go_on(
            self.params, rows, tokens, mask, key=key, **options, **self.options
        )
        self.before = [[*ids, *written(self.last, i)] for i, ids in enumerate(whole)]
        return self.last, again


def assert_alike(kept, again):
    for name in ("tokens", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(again, name))
    for name in ("logps", "sampler_logps"):
        np.testing.assert_allclose(
            getattr(kept, name), getattr(again, name), **ROUNDING
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},  # 12 slots
        {"steps_per_dispatch": 7, "slots": 12},
        {"prefill_tokens": 5},  # prefilled some at a time
        {"continuous": False},
    ],
    ids=str,
)
def test_turns_are_those_of_whole_contexts(long_policy, params, prompts, settings):
    both = Both(sampler(long_policy, **settings), params, *prompts)
    first = both.sampler.generate(params, *prompts, key=KEY, group_size=G)
    chex.assert_trees_all_equal(both.last, first)
    assert both.last.lengths.min() < 20 and both.last.lengths.max() > 60
    rows = np.flatnonzero(both.last.stopped)[1:]
    assert 4 < len(rows) < 12
    second = both.go_on(rows, said_to(rows, 0), SECOND)
    assert_alike(*second)
    assert second[0].lengths.max() > 40
    rows = np.flatnonzero(both.last.stopped)[::-1][:-1]  # in another order
    third = both.go_on(rows, said_to(rows, 1, 30), THIRD, width=512)
    assert_alike(*third)


@pytest.fixture(scope="module")
def contexts_of_many():
    rng = np.random.default_rng(1)
    mask = np.arange(5)[None] >= rng.integers(0, 5, (6, 1))
    return rng.integers(0, 29, (6, 5)).astype(np.int32), mask


def test_slots_that_were_given_up_are_kept(long_policy, params, contexts_of_many):
    """24 slots shrink to 6 and caches grow from 128 columns to 159 meanwhile."""
    both = Both(sampler(long_policy), params, *contexts_of_many)
    assert both.last.lengths.min() < 20 and both.last.lengths.max() > 128
    rows = np.arange(24)
    assert_alike(*both.go_on(rows, said_to(rows, 2), SECOND))


def test_windows_count_positions(long_policy, params, prompts):
    config = dataclasses.replace(long_policy.config, window=5, local_layers=(1,))
    both = Both(sampler(decoder(config), 40), params, *prompts)
    rows = np.arange(12)
    assert_alike(*both.go_on(rows, said_to(rows, 3), SECOND))


def test_rows_and_padding_change_nothing(long_policy, params, prompts):
    """Greedy, so that a row's random numbers do not matter."""
    results = []
    for order in (np.arange(6), np.arange(6)[::-1]):
        both = Both(sampler(long_policy, 40), params, *prompts, temperature=0.0)
        said = said_to(range(6), 4)
        rows, said = 2 * order, [said[i] for i in order]
        kept, again = both.go_on(rows, said, SECOND, width=100 + 50 * int(order[0]))
        assert_alike(kept, again)
        results.append(jax.tree.map(lambda x, o=order: x[np.argsort(o)], kept))
    for name in ("tokens", "mask", "stopped"):
        one, other = (getattr(x, name) for x in results)
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(results[0].logps, results[1].logps, **ROUNDING)


def test_programs_are_few(long_policy, params, prompts):
    """Rows that go on and what they are told may vary: to the next power of two."""
    traces = Counter()

    def counted(params, tokens, *args):
        traces[tokens.shape] += 1
        return long_policy.hidden(params, tokens, *args)

    one = sampler(dataclasses.replace(long_policy, hidden=counted), 20)
    for rows in ([0, 3, 5], [1, 2, 4, 7], [11], [2, 3, 4]):
        talk = Conversation(one)
        talk.begin(params, *prompts, key=KEY, group_size=G)
        for again in (rows, list(range(len(rows)))[::-1]):
            tokens = np.ones((len(rows), 4), int)
            mask = np.arange(4)[None] < 1 + np.array(again)[:, None] % 4
            talk.go_on(params, again, tokens, mask, key=SECOND, width=60)
    decoded = {shape: n for shape, n in traces.items() if shape[1] == 1}
    # Twice: with the prompts as contexts, and with what came after.
    assert decoded == {(12, 1): 1, (4, 1): 1, (1, 1): 1}, decoded
    assert traces - Counter(decoded) == {(3, 6): 1, (4, 4): 1, (1, 4): 1}


def test_refusals(long_policy, params, prompts):
    one = sampler(long_policy, 20, slots=5)
    talk = Conversation(one)
    talk.begin(params, *prompts, key=KEY, group_size=G)
    assert not talk.goes_on  # five side by side, and others after them
    tokens = np.ones((1, 2), int)
    with pytest.raises(ValueError, match="nothing to go on with"):
        talk.go_on(params, [0], tokens, tokens, key=KEY)
    talk = Conversation(sampler(long_policy, 20))
    talk.begin(params, *prompts, key=KEY, group_size=G)
    with pytest.raises(ValueError, match="needs a token to go on from"):
        talk.go_on(params, [0], tokens, 0 * tokens, key=KEY)
    with pytest.raises(ValueError, match="width=3: .* tokens before and 2 columns"):
        talk.go_on(params, [0], tokens, tokens, key=KEY, width=3)
