"""Random numbers of the sampler against jax's generator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.generation.random import key_words, uniforms


def test_a_tokens_numbers_are_jaxs_own():
    key = jax.random.fold_in(jax.random.key(5), 3)
    for sequence in (0, 7, 2**31 - 1):
        of_sequence = jax.random.fold_in(key, sequence)
        expected = jax.random.uniform(of_sequence, (9, 2), jnp.float32)
        index = jnp.arange(9)
        got = uniforms(key_words(key), jnp.full(9, sequence), index)
        np.testing.assert_array_equal(got, expected)


def test_keys_of_another_generator():
    words = [key_words(jax.random.key(seed, impl="rbg")) for seed in (0, 1)]
    at = jnp.arange(4), jnp.arange(4)
    one, other = (uniforms(w, *at) for w in words)
    assert not (one == other).any()
    assert ((one >= 0) & (one < 1)).all()
