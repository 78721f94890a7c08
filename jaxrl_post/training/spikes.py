"""A guard against gradients that are finite and yet far from all before them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_NORMAL = 1.4826
"""Standard deviations in one median absolute deviation of a normal distribution."""

_LEAST_SPREAD = 0.01
"""Share of the median that the spread is at least: a run of near-equal norms must not
make a spike of every small change."""


def empty_window(size: int) -> jax.Array:
    """A window ``[size]`` float32 of gradient norms, none seen yet (NaN)."""
    return jnp.full(size, jnp.nan, jnp.float32)


def is_spike(norms: jax.Array, norm: jax.Array, deviations: float) -> jax.Array:
    """Whether a gradient norm lies far above those of the updates before.

    ``norm > median + k max(1.4826 MAD, 0.01 median)``, with the median and the median
    absolute deviation of the window. False until the window is full.

    Args:
      norms: ``[W]``, of the last updates.
      norm: scalar, of this one.
      deviations: k.

    >>> window = jnp.array([1.0, 1.2, 0.9, 1.1, 1.0])
    >>> [bool(is_spike(window, jnp.array(x), 5.0)) for x in (1.5, 2.0)]
    [False, True]
    >>> bool(is_spike(empty_window(5), jnp.array(2.0), 5.0))
    False
    """
    median = jnp.median(norms)  # NaN while one is, and nothing is greater than NaN
    spread = _NORMAL * jnp.median(jnp.abs(norms - median))
    return norm > median + deviations * jnp.maximum(spread, _LEAST_SPREAD * median)


def remember(norms: jax.Array, norm: jax.Array) -> jax.Array:
    """The window after an update, a skipped one included.

    Spikes enter too: the median bears them, and where norms have risen for good the
    guard has to learn it. What is not finite, or 0 because nothing was learned, does
    not enter.

    >>> remember(jnp.array([3.0, 1.0, 2.0]), jnp.array(5.0)).tolist()
    [1.0, 2.0, 5.0]
    >>> remember(jnp.array([3.0, 1.0, 2.0]), jnp.array(jnp.nan)).tolist()
    [3.0, 1.0, 2.0]
    """
    moved = jnp.roll(norms, -1).at[-1].set(norm.astype(norms.dtype))
    return jnp.where(jnp.isfinite(norm) & (norm > 0), moved, norms)
