"""Keeping garbage at masked tokens out of values and gradients."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def mask_inputs(mask: ArrayLike, *arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """The arrays with zeros where `mask` is 0, so that any loss of them is finite.

    A `where` on the loss hides a NaN from the value but not from the gradient
    (0 * NaN = NaN); the inputs themselves have to be harmless. Zero is: it is a
    log-prob, and a row of zero logits is a uniform distribution.

    Args:
      mask: [B, T] bool or number, zero where the arrays may hold anything.
      *arrays: each [B, T] or [B, T, ...] (log-probs, logits, advantages).

    Returns:
      A tuple with one array per argument, also for a single one.

    >>> (logps,) = mask_inputs(jnp.array([[1, 0]]), jnp.array([[-2.0, jnp.nan]]))
    >>> logps.tolist()
    [[-2.0, 0.0]]
    """
    mask = jnp.asarray(mask) != 0
    cleaned = []
    for array in map(jnp.asarray, arrays):
        chex.assert_shape(array, (*mask.shape, ...))
        tail = (1,) * (array.ndim - mask.ndim)
        cleaned.append(jnp.where(mask.reshape(mask.shape + tail), array, 0))
    return tuple(cleaned)
