"""Long calls: slots refilled and shrunk, caches that grow, contexts that make room."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.generation import Sampler
from jaxrl_post.generation.plan import capacity_for
from jaxrl_post.generation.slots import Queue

KEY = jax.random.key(3)
T, P, G = 160, 12, 2


@pytest.fixture(scope="module")
def long_policy(policy):
    config = dataclasses.replace(policy.config, max_positions=1000)
    return dataclasses.replace(policy, config=config)


@pytest.fixture(scope="module")
def contexts():
    rng = np.random.default_rng(1)
    mask = np.arange(5)[None] >= rng.integers(0, 5, (P, 1))
    return rng.integers(0, 29, (P, 5)).astype(np.int32), mask


def sampler(policy, **settings):
    return Sampler(policy, max_new_tokens=T, stop_tokens=(5,), **settings)


@pytest.fixture(scope="module")
def whole(long_policy, params, contexts):
    """All sequences side by side, without any of what is tested."""
    one = sampler(long_policy, continuous=False)
    return one.generate(params, *contexts, key=KEY, group_size=G)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # 24 slots, then 6
        {"slots": 16, "steps_per_dispatch": 7},  # refilled, then 4
        {"slots": 3, "prefill_tokens": 11},  # 4 contexts at a time, in twos
    ],
    ids=str,
)
def test_the_schedule_changes_nothing(long_policy, params, contexts, whole, settings):
    assert whole.lengths.min() < 10 and whole.lengths.max() > 128, whole.lengths
    seen = []
    for rows, part in sampler(long_policy, **settings).stream(
        params, *contexts, key=KEY, group_size=G
    ):
        seen.append(rows)
        for name in ("tokens", "mask", "stopped"):
            np.testing.assert_array_equal(
                getattr(part, name), getattr(whole, name)[rows]
            )
        apart = np.abs(part.logps - whole.logps[rows])[part.mask]
        # Programs of other shapes round otherwise: most tokens by 1e-6, the worst by
        # 1.1e-4 on a CPU with AVX2.
        assert np.median(apart) < 1e-5 and apart.max() < 3e-4, apart
    assert sorted(np.concatenate(seen)) == list(range(P * G))
    assert len(seen) > 2


def test_slots_shrink_and_caches_grow(long_policy, params, contexts):
    shapes = set()

    def recorded(params, tokens, positions, segments, cache):
        if tokens.shape[1] == 1:
            shapes.add((len(tokens), cache.segment_ids.shape[1]))
        return long_policy.hidden(params, tokens, positions, segments, cache)

    watched = dataclasses.replace(long_policy, hidden=recorded)
    sampler(watched).generate(params, *contexts, key=KEY, group_size=G)
    assert {(24, 128), (6, T - 1)} <= shapes
    assert len(shapes) <= 4


def test_a_context_is_stored_once_for_its_group(long_policy, params):
    rows, width, group = 2, 37, 8
    tokens = np.ones((rows, width), np.int32)
    stream = sampler(long_policy, steps_per_dispatch=1).stream(
        params, tokens, tokens, key=KEY, group_size=group
    )
    next(stream)
    c = long_policy.config
    own = [x for x in jax.live_arrays() if x.ndim == 4 and width in x.shape[2:]]
    each = c.num_kv_heads * width * c.head_dim * 4
    assert sum(x.nbytes for x in own) == c.num_layers * 2 * rows * each
    stream.close()


def test_decoding_copies_no_cache(long_policy, params):
    """A step writes its column in place: nothing as large as a layer's cache is copied
    inside of the loop."""
    programs = sampler(long_policy).programs
    tokens = np.ones((4, 8), np.int32)
    contexts = jax.eval_shape(
        lambda p: programs.prefill(p, tokens, tokens != 0, columns=8), params
    )
    prepared = jax.eval_shape(programs.prepare, params)
    numbers = jax.ShapeDtypeStruct((8,), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    choice = {"key": KEY, "temperature": np.float32(1), "greedy": False}
    slots, _, _ = jax.eval_shape(
        lambda *args: programs.start(
            *args, **choice, grouped=True, capacity=capacity_for(1, T)
        ),
        *(prepared, contexts, numbers, numbers, number),
    )
    queue = Queue(jax.ShapeDtypeStruct((4,), jnp.int32), number, number)
    for grouped in (True, False):
        compiled = programs.decode.lower(
            prepared, contexts, slots, queue, **choice, grouped=grouped
        ).compile()
        text = compiled.as_text()
        bodies = [c for c in text.split("\n\n") if "dynamic-update-slice" in c]
        assert bodies
        for body in bodies:
            assert not re.search(r"= f32\[8,2,(128,4|4,128)\][^=]* copy\(", body)
        aliased = compiled.memory_analysis().alias_size_in_bytes
        assert aliased >= sum(x.nbytes for x in _shapes(slots.cache.keys)) * 2


def _shapes(tree):
    return [np.empty(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("count", [1, 4])
def test_prefill_is_at_most_so_many_tokens_at_a_time(
    long_policy, params, contexts, count
):
    sizes = []

    def recorded(params, tokens, *args):
        sizes.append(tokens.size if tokens.shape[1] > 1 else 0)
        return long_policy.hidden(params, tokens, *args)

    watched = dataclasses.replace(long_policy, hidden=recorded)
    one = Sampler(watched, max_new_tokens=2, prefill_tokens=3)
    got = one.generate(
        params, contexts[0][:count], contexts[1][:count], key=KEY, temperature=0
    )
    plain = Sampler(long_policy, max_new_tokens=2, temperature=0)
    expected = plain.generate(params, contexts[0][:count], contexts[1][:count], key=KEY)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert max(sizes) <= 3
