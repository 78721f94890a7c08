"""What rematerialisation keeps, and what it does not change."""

from __future__ import annotations

import typing
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.models.attention import IMPLEMENTATIONS
from jaxrl_post.models.memory import POLICIES, on_device
from jaxrl_post.training import configrun

CONFIG = models.DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
TOKENS = np.random.default_rng(0).integers(50, size=(2, 64))


def program(remat, attention="chunked"):
    policy = models.decoder(CONFIG, remat=remat, attention=attention)

    def loss(params):
        positions = jnp.broadcast_to(jnp.arange(64), TOKENS.shape)
        out, _ = policy.hidden(params, TOKENS, positions, jnp.ones_like(positions))
        return jnp.sum(jnp.sin(out))

    params = policy.init(jax.random.key(0))
    return params, jax.jit(jax.value_and_grad(loss)).lower(params).compile()


@pytest.fixture(scope="module")
def compiled():
    return {remat: program(remat) for remat in POLICIES}


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_gradients_are_those_without(compiled, remat):
    params, run = compiled[remat]
    chex.assert_trees_all_close(run(params), compiled["none"][1](params), rtol=1e-5)


def test_memory_falls_as_less_is_kept(compiled):
    """XLA's account of the temporary arrays."""
    kept = [
        "none",
        "products",
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
        "full",
    ]
    stats = [compiled[remat][1].memory_analysis() for remat in kept]
    sizes = [s.temp_size_in_bytes for s in stats]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]


def test_what_attention_put_out_is_kept():
    """Between `full` and `attention_saveable` are the output ``[B, H, T, d]`` and the
    normaliser ``[B, H, T]`` of every layer, in float32, and no more."""

    def kept(remat):
        policy = models.decoder(CONFIG, remat=remat, attention="chunked")
        params = jax.eval_shape(policy.init, jax.random.key(0))
        ids = jnp.ones((2, 64), jnp.int32)

        def residuals(params):
            return jax.vjp(lambda p: policy.hidden(p, ids, ids, ids)[0], params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    out = CONFIG.num_layers * 2 * CONFIG.num_heads * 64 * (CONFIG.head_dim + 1) * 4
    assert kept("attention_saveable") - kept("full") == out
    assert kept("attention_offloaded") - kept("full") == out


def in_gradient(operation, remat):
    """How often the traced gradient has an operation."""
    policy = models.decoder(CONFIG, remat=remat, attention="chunked")
    params = jax.eval_shape(policy.init, jax.random.key(0))
    ids = jnp.ones((1, 64), jnp.int32)

    def loss(params):
        return jnp.sum(policy.hidden(params, ids, ids, ids)[0])

    return str(jax.make_jaxpr(jax.grad(loss))(params)).count(f"{operation}[")


def test_saved_attention_is_not_computed_again():
    """The loops over blocks: forward, backward, and forward again unless saved."""
    loops = partial(in_gradient, "while")
    assert [loops(r) for r in ("none", "products", "attention_saveable")] == [2] * 3
    assert loops("full") == 3


def test_saved_products_are_not_computed_again():
    """Three for each of a layer's matrices: one forward, two backward."""
    products = partial(in_gradient, "dot_general")
    assert products("products") == products("none") < products("full")


def test_arrays_of_the_host_are_moved_where_they_are_used():
    x = jnp.arange(6.0).reshape(2, 3)
    host = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    @jax.jit
    def double(tree):
        assert jax.typeof(tree["a"]).memory_space == jax.memory.Space.Host
        return jax.tree.map(lambda x: 2 * x, on_device(tree))

    out = double({"a": host, "b": x})
    assert out["a"].sharding.memory_kind == x.sharding.memory_kind
    np.testing.assert_array_equal(out["a"], 2 * x)


def test_the_config_knows_the_same_names():
    """It is read before jax is, so that it cannot ask."""
    assert typing.get_args(configrun.Remat) == tuple(POLICIES)
    assert typing.get_args(configrun.Attention) == IMPLEMENTATIONS
