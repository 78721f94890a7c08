"""Random numbers by their place: a sequence and a token of it, not a moment in time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

Words = tuple[jax.Array, jax.Array]


def threefry(key: Words, x: jax.Array, y: jax.Array) -> Words:
    """Threefry-2x32 with 20 rounds: two words for every counter ``(x, y)``.

    jax's own generator is the same function, but on CPU a loop over rounds, which in a
    decoding step costs as much as a layer; written out it is one fused operation.

    Args:
      key: two uint32 words, or arrays of them.
      x, y: uint32 counters; all shapes are equal or ``[]``.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    >>> zero = jnp.zeros((), jnp.uint32)
    >>> [hex(int(word)) for word in threefry((zero, zero), zero, zero)]
    ['0x6b200159', '0x99ba4efe']
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = x + words[0], y + words[1]
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn)))
        x = x + words[(block + 1) % 3]
        y = y + words[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def key_words(key: jax.Array) -> Words:
    """A random key as the two words that `uniforms` takes; keys of another generator
    than jax's first are drawn from."""
    data = jax.random.key_data(key)
    if data.shape != (2,):
        data = jax.random.bits(key, (2,), jnp.uint32)
    return data[0], data[1]


def uniforms(key: Words, sequence: jax.Array, index: jax.Array) -> jax.Array:
    """Two numbers in [0, 1) for each token, independent for unlike tokens.

    They are row `index` of ``jax.random.uniform(fold_in(key, sequence), (T, 2))``, of
    which jax would have to compute all rows.

    Args:
      key: `key_words`.
      sequence, index: ``[B]`` int32, which token.

    Returns:
      ``[B, 2]`` float32.
    """
    zero = jnp.zeros((), jnp.uint32)
    own = threefry(key, zero, sequence.astype(jnp.uint32))

    def uniform(place: jax.Array) -> jax.Array:
        first, second = threefry(own, zero, place)
        # The upper 23 bits, as the mantissa of a number in [1, 2).
        bits = ((first ^ second) >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1

    place = 2 * index.astype(jnp.uint32)
    return jnp.stack([uniform(place), uniform(place + jnp.uint32(1))], axis=-1)
