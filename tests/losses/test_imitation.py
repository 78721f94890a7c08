from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses


def test_negative_log_likelihood():
    logps = jnp.array([[-0.5, -3.0]])
    np.testing.assert_array_equal(losses.negative_log_likelihood(logps), -logps)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_shaped_imitation_value_and_gradient(gamma):
    p = np.array([[1e-6, 0.05, gamma, 0.5, 1.0]])
    logps = jnp.log(jnp.asarray(p, jnp.float32))
    loss = losses.shaped_imitation(logps, gamma=gamma)
    np.testing.assert_allclose(loss, -p / (p + gamma), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.shaped_imitation(x, gamma=gamma).sum())(logps)
    np.testing.assert_allclose(gradient, -gamma * p / (p + gamma) ** 2, rtol=1e-5)
    assert int(jnp.abs(gradient).argmax()) == 2  # the weight peaks at p = gamma


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma=0.0 is not in"):
        losses.shaped_imitation(jnp.zeros((1, 1)), gamma=0.0)
