"""Terms that hold a policy back: divergence from a reference, entropy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.numerics import (
    bounded,
    bounded_exp,
    check_choice,
    check_number,
    clamp,
    promote,
)


def reference_kl(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    *,
    estimator: str = "k3",
    clamp: float | tuple[float | None, float | None] | None = None,
) -> jax.Array:
    """An estimate of `KL(policy || reference)` from sampled tokens.

    With `d = logps - ref_logps`, for tokens sampled from the policy:

    - `k1 = d`: unbiased value, but a gradient whose expectation is *zero*: it belongs
      in the reward, not in a loss.
    - `k2 = d^2 / 2`: biased value, and the unbiased gradient `d * grad logps`.
    - `k3 = exp(-d) + d - 1`: unbiased, never negative value; gradient
      `(1 - exp(-d)) * grad logps`, whose expectation is that of the *forward* KL.

    Args:
      logps: [B, T] log-probs (nats) of the sampled tokens.
      ref_logps: [B, T] the same under the reference policy; no gradient.
      estimator: "k1", "k2" or "k3".
      clamp: bound of the result, or a pair `(bound of d, bound of the result)`, None
        for no bound; both symmetric, and the gradient is 0 beyond them. verl's and
        NeMo's is `(20.0, 10.0)`, OpenRLHF's `10.0`, TRL has none. Without a bound
        only a guard against overflow remains.

    Returns:
      [B, T] estimate.

    Raises:
      ValueError: unknown estimator, a bound not above 0.

    Source: Schulman, "Approximating KL divergence" (2020); arXiv 2402.03300, Eq. 4.

    >>> d = jnp.log(jnp.array([[0.5, 1.0, 2.0]]))
    >>> print(reference_kl(d, jnp.zeros((1, 3))).round(4))
    [[0.3069 0.     0.1931]]
    """
    check_choice("estimator", estimator, ("k1", "k2", "k3"))
    bound_in, bound_out = clamp if isinstance(clamp, tuple) else (None, clamp)
    check_number("clamp", bound_in, 0, open_low=True)
    check_number("clamp", bound_out, 0, open_low=True)
    logps, ref_logps = promote(logps, ref_logps)
    chex.assert_equal_shape([logps, ref_logps])
    gap = _symmetric(logps - jax.lax.stop_gradient(ref_logps), bound_in)
    if estimator == "k1":
        value = gap
    elif estimator == "k2":
        value = jnp.square(bounded(gap)) / 2
    else:
        value = bounded_exp(-gap) + gap - 1
    return _symmetric(value, bound_out)


def _symmetric(x: jax.Array, bound: float | None) -> jax.Array:
    return x if bound is None else clamp(x, -bound, bound)


def entropy(logits: ArrayLike) -> jax.Array:
    """Shannon entropy of `softmax(logits)` in nats.

    `H = -sum_v p_v log p_v`, over the last axis. Subtract a multiple of it from a
    loss as an exploration bonus.

    Args:
      logits: [..., V]; -inf marks impossible entries (padding of the vocabulary) and
        is as if they were absent.

    Returns:
      [...] entropy, between 0 and log V.

    >>> logits = jnp.array([[0.0, 0.0, -jnp.inf], [0.0, 1e9, 0.0]])
    >>> print(entropy(logits).round(4))
    [0.6931 0.    ]
    """
    (logits,) = promote(logits)
    logps = jax.nn.log_softmax(logits)
    # Impossible entries: 0 * -inf is NaN, so they leave before the product.
    possible = jnp.exp(logps) > 0
    logps = jnp.where(possible, logps, 0)
    return jnp.where(possible, -jnp.exp(logps) * logps, 0).sum(-1)
