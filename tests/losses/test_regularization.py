from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses


def expected_gradient(estimator):
    """sum_v p_v * grad_z of the estimate at token v, with p held fixed: what sampling
    from the policy and differentiating the estimate averages to."""
    z = jnp.array([0.3, -1.0, 0.8])
    ref = jax.nn.log_softmax(jnp.array([-0.5, 0.1, 0.9]))
    p = jax.nn.softmax(z)

    def mean(z):
        logps = jax.nn.log_softmax(z)[None]
        return (p * losses.reference_kl(logps, ref[None], estimator=estimator)[0]).sum()

    return mean(z), jax.grad(mean)(z), z, ref


def reverse_kl(z, ref):
    logps = jax.nn.log_softmax(z)
    return (jnp.exp(logps) * (logps - ref)).sum()


def forward_kl(z, ref):
    return (jnp.exp(ref) * (ref - jax.nn.log_softmax(z))).sum()


def test_k1_has_the_right_mean_and_no_gradient_on_average():
    value, gradient, z, ref = expected_gradient("k1")
    np.testing.assert_allclose(value, reverse_kl(z, ref), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.zeros(3), atol=1e-6)


def test_k2_has_the_reverse_kl_gradient():
    _, gradient, z, ref = expected_gradient("k2")
    np.testing.assert_allclose(gradient, jax.grad(reverse_kl)(z, ref), atol=1e-6)


def test_k3_has_the_right_mean_and_the_forward_kl_gradient():
    value, gradient, z, ref = expected_gradient("k3")
    np.testing.assert_allclose(value, reverse_kl(z, ref), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(forward_kl)(z, ref), atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_value_gradient_and_zero_at_the_reference(estimator):
    d = 0.7
    value = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) + d - 1}[estimator]
    slope = {"k1": 1.0, "k2": d, "k3": 1 - np.exp(-d)}[estimator]

    def estimate(x, reference):
        return losses.reference_kl(x, reference, estimator=estimator)[0, 0]

    at, ref = jnp.array([[-1.0 + d]]), jnp.array([[-1.0]])
    found, gradients = jax.value_and_grad(estimate, (0, 1))(at, ref)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], [[slope]], rtol=1e-5)
    assert float(gradients[1][0, 0]) == 0.0
    assert float(estimate(ref, ref)) == 0.0


def test_clamps_bound_the_log_ratio_and_the_result():
    logps, ref = jnp.array([[-25.0, -3.0, 30.0]]), jnp.zeros((1, 3))
    kl = losses.reference_kl

    def k3(d):
        return np.exp(-d) + d - 1

    only_out = kl(logps, ref, clamp=10.0)
    np.testing.assert_allclose(only_out, [[10.0, 10.0, 10.0]])
    both = kl(logps, ref, clamp=(2.0, 10.0))
    np.testing.assert_allclose(both, [[k3(-2), k3(-2), k3(2)]], rtol=1e-5)
    k1 = kl(logps, ref, estimator="k1", clamp=10.0)
    np.testing.assert_allclose(k1, [[-10.0, -3.0, 10.0]])
    gradient = jax.grad(lambda x: kl(x, ref, clamp=(20.0, 10.0)).sum())(logps)
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))


def test_bad_arguments():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="estimator='k4' is not one of k1, k2, k3"):
        losses.reference_kl(x, x, estimator="k4")
    with pytest.raises(ValueError, match="clamp=-1.0 is not in"):
        losses.reference_kl(x, x, clamp=(20.0, -1.0))


def test_entropy_value_gradient_and_impossible_entries():
    z = jnp.array([[0.5, -1.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(losses.entropy(z), h, rtol=1e-5)
    gradient = jax.grad(lambda z: losses.entropy(z).sum())(z)
    np.testing.assert_allclose(
        gradient, -p * (np.log(p) + h[:, None]), rtol=1e-4, atol=1e-6
    )

    padded = jnp.concatenate([z, jnp.full((2, 2), -jnp.inf)], -1)
    value, gradient_padded = jax.value_and_grad(lambda z: losses.entropy(z).sum())(
        padded
    )
    np.testing.assert_allclose(value, h.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient_padded[:, :4], gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient_padded[:, 4:], np.zeros((2, 2)))
