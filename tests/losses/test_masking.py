from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses

MASK = jnp.array([[1, 1, 0], [1, 0, 0]])


def test_zeros_where_masked_for_any_trailing_shape():
    logps, logits = jnp.full((2, 3), -2.0), jnp.ones((2, 3, 4))
    cleaned = losses.mask_inputs(MASK, logps, logits)
    np.testing.assert_array_equal(cleaned[0], -2.0 * MASK)
    np.testing.assert_array_equal(cleaned[1], np.ones((2, 3, 4)) * MASK[..., None])
    assert isinstance(losses.mask_inputs(MASK, logps), tuple)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf])
def test_garbage_reaches_neither_value_nor_gradient(garbage):
    def loss(logps, old, mask):
        logps, old = losses.mask_inputs(mask, logps, old)
        value = losses.clipped_policy_gradient(logps, old, jnp.array([1.0, -1.0]))
        value += losses.reference_kl(logps, old) + losses.shaped_imitation(logps)
        return losses.reduce(value, mask).mean()

    clean = -jnp.arange(6.0).reshape(2, 3) / 5, -jnp.ones((2, 3))
    dirty = [jnp.where(MASK != 0, x, garbage) for x in clean]
    evaluate = jax.jit(jax.value_and_grad(loss))
    value, gradient = evaluate(*clean, MASK)
    value_dirty, gradient_dirty = evaluate(*dirty, MASK)
    assert float(value) == float(value_dirty)
    np.testing.assert_array_equal(gradient, gradient_dirty)
    assert np.all(gradient[MASK == 0] == 0)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        losses.mask_inputs(MASK, jnp.ones((2, 4)))
