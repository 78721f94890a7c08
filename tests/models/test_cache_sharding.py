"""The layout of a cache that nothing has been written to."""

from __future__ import annotations

import jax
from tiny_policy import CONFIG, POLICY

from jaxrl_post.sharding import make_mesh


def test_its_heads_are_split_over_tensor():
    mesh = make_mesh(1, 1, 2, jax.devices()[:2])
    with jax.set_mesh(mesh):
        cache = jax.jit(POLICY.init_cache, static_argnums=(0, 1))(4, 8)
    shape = cache.keys.shape
    assert shape[2] == CONFIG.num_kv_heads == 2
    for x in (cache.keys, cache.values):
        assert x.sharding.shard_shape(shape)[2] == 1


def test_heads_that_do_not_divide_stay_whole():
    mesh = make_mesh(1, 1, 4, jax.devices()[:4])
    with jax.set_mesh(mesh):
        cache = jax.jit(POLICY.init_cache, static_argnums=(0, 1))(4, 8)
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == cache.keys.shape
