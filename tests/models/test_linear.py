"""The linear map's product, against plain matrices in float64."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.models.linear import linear


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("outputs", [(4,), (2, 3)])
def test_gradients_are_those_of_tensordot(axes, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 6))
    kernel = rng.normal(size=(*x.shape[4 - axes :], *outputs))
    g = rng.normal(size=(*x.shape[: 4 - axes], *outputs))
    inputs = x.reshape(-1, kernel.size // math.prod(outputs))
    flat = g.reshape(len(inputs), -1)
    with jax.enable_x64():
        out, pullback = jax.vjp(partial(linear, axes=axes), x, kernel)
        to_x, to_kernel = pullback(jnp.asarray(g))
    close = partial(np.testing.assert_allclose, rtol=1e-12)
    weights = kernel.reshape(inputs.shape[1], -1)
    close(out.reshape(flat.shape), inputs @ weights)
    close(to_x.reshape(inputs.shape), flat @ weights.T)
    close(to_kernel.reshape(weights.shape), inputs.T @ flat)
