"""Routed experts: against every expert computed for every token, in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.models.experts import routed
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
    return routed(
        x,
        router,
        kernels,
        chosen=CHOSEN,
        normalise=normalise,
        activation=jax.nn.silu,
    )


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
    out = routed(x, router, kernels, chosen=1, normalise=True, activation=jax.nn.silu)
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
