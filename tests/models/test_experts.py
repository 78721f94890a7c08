"""Routed experts: against every expert computed for every token, in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import GOLDENS

from jaxrl_post import models
from jaxrl_post.models.experts import balance_loss, choose_experts, routed
from jaxrl_post.sharding import make_mesh

WIDTH, INNER, EXPERTS, CHOSEN = 6, 5, 4, 2


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = [(4, 3, WIDTH), (WIDTH, EXPERTS)]
    kernels = [(EXPERTS, WIDTH, INNER)] * 2 + [(EXPERTS, INNER, WIDTH)]
    x, router = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, router, tuple(rng.normal(size=k).astype(np.float32) for k in kernels)


def dense(x, router, kernels, normalise, xp=jnp):
    """All experts for all tokens, weighted by 0 where they were not chosen."""
    gate, up, down = kernels
    scores = x @ router
    share = xp.exp(scores - scores.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    least = xp.sort(share, axis=-1)[..., -CHOSEN, None]
    weights = xp.where(share >= least, share, 0)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    inner = xp.einsum("btd,edf->btef", x, gate)
    inner = inner / (1 + xp.exp(-inner)) * xp.einsum("btd,edf->btef", x, up)
    return xp.einsum("btef,efd,bte->btd", inner, down, weights)


def ours(x, router, kernels, normalise=True):
    routes = choose_experts(x, router, chosen=CHOSEN, normalise=normalise)
    return routed(x, routes, weights(kernels), jax.nn.silu)


def weights(kernels):
    return tuple({"kernel": kernel} for kernel in kernels)


@pytest.mark.parametrize("normalise", [False, True])
def test_values(inputs, normalise):
    wide = jax.tree.map(lambda x: x.astype(np.float64), inputs)
    expected = dense(*wide, normalise, xp=np)
    np.testing.assert_allclose(ours(*inputs, normalise), expected, atol=2e-5)


def test_gradients(inputs):
    def loss(fn, inputs):
        return jnp.sum(jnp.sin(fn(*inputs, True)))

    found = jax.jit(jax.grad(lambda i: loss(ours, i)))(inputs)
    expected = jax.jit(jax.grad(lambda i: loss(dense, i)))(inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected
    )


def test_all_tokens_to_one_expert(inputs):
    """None is dropped, and experts without tokens add nothing."""
    x, _, kernels = inputs
    router = np.zeros((WIDTH, EXPERTS), np.float32)
    router[:, 2] = 50.0
    x = np.abs(x)
    routes = choose_experts(x, router, chosen=1, normalise=True)
    out = routed(x, routes, weights(kernels), jax.nn.silu)
    gate, up, down = (kernel[2] for kernel in kernels)
    np.testing.assert_allclose(out, jax.nn.silu(x @ gate) * (x @ up) @ down, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"tensor": 2, "data": 2}, {"tensor": 4, "fsdp": 2}])
def test_over_a_mesh(inputs, sizes):
    """Experts over `tensor`, rows over the rest: values and gradients as on one."""

    def loss(inputs):
        out = ours(*inputs)
        return jnp.sum(jnp.sin(out)), out

    def run(inputs):
        return jax.jit(jax.grad(loss, has_aux=True))(inputs)

    expected = run(inputs)
    mesh = make_mesh(
        **{"data": 1, **sizes}, devices=jax.devices()[: math.prod(sizes.values())]
    )
    with jax.set_mesh(mesh):
        found = run(inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected
    )


def test_the_balance_loss_is_that_of_transformers():
    """Padding on either side does not count; gradients are torch's, in float64."""
    policy, params, _ = models.load(GOLDENS / "qwen3_moe")
    with np.load(GOLDENS / "qwen3_moe" / "router.npz") as file:
        golden = dict(file)
    rows = golden["tokens"], golden["mask"].astype(np.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens, mask):
        positions = jnp.maximum(mask.cumsum(1) - 1, 0)
        load = policy.routing(params, tokens, positions, mask)[2]
        whole = jax.tree.map(lambda x: x.sum((0, 1)), load)
        return balance_loss(whole, whole)

    lengths = rows[1].sum(1)
    assert len({*lengths}) == len(lengths) == 3
    value, found = loss(params, *rows)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    left = [np.stack([*map(np.roll, x, -lengths)]) for x in rows]
    np.testing.assert_allclose(loss(params, *left)[0], golden["loss"], rtol=1e-5)
    mlp, attention = found["layers"]["mlp"], found["layers"]["attention"]
    for own, name in (
        (mlp["router"].swapaxes(1, 2), "router"),
        (attention["o"]["kernel"].reshape(golden["output"].shape), "output"),
        (found["embed"], "embedding"),
    ):
        largest = np.abs(golden[name]).max()
        assert largest > 1e-3
        np.testing.assert_allclose(own, golden[name], atol=1e-4 * largest)


def test_layers_apart_have_the_same_load():
    policy, params, _ = models.load(GOLDENS / "qwen3_moe")
    tokens = jnp.arange(12).reshape(2, 6)
    mask = jnp.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    args = tokens, jnp.maximum(mask.cumsum(1) - 1, 0), mask
    load = policy.routing(params, *args)[2]
    np.testing.assert_array_equal(load.tokens, [[6, 4]] * policy.config.num_layers)
    chosen = policy.config.experts_per_token * np.array([6.0, 4.0])
    np.testing.assert_array_equal(load.chosen.sum(-1), [chosen] * len(load.chosen))
    np.testing.assert_allclose(load.shares.sum(-1), load.tokens, rtol=1e-6)
    apart = policy.routing(models.unstack_params(params), *args)[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), apart, load)
