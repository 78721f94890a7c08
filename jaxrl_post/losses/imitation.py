"""Learning from given trajectories: plain and shaped log-likelihood."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.numerics import Scalar, check_number, promote


def negative_log_likelihood(logps: ArrayLike) -> jax.Array:
    """The supervised loss `-log p` of each token.

    Args:
      logps: [B, T] log-probs (nats) of the given tokens.

    Returns:
      [B, T] loss.

    >>> negative_log_likelihood(jnp.array([[-2.0]])).tolist()
    [[2.0]]
    """
    (logps,) = promote(logps)
    return -logps


def shaped_imitation(logps: ArrayLike, *, gamma: Scalar = 0.1) -> jax.Array:
    """LUFFY's policy shaping, the imitation term of HAPO: `-p / (p + gamma)`.

    Its gradient, `-gamma p / (p + gamma)^2 * grad logps`, is largest at `p = gamma`:
    tokens the policy finds unlikely, but not impossible, teach most. Multiply by the
    trajectory's advantage for LUFFY's off-policy term (`l = -A f(p)`, no clip).

    Args:
      logps: [B, T] log-probs (nats) of the teacher's tokens.
      gamma: positive; where the weight peaks. May be traced.

    Returns:
      [B, T] loss, in (-1, 0].

    Raises:
      ValueError: gamma not above 0.

    Source: arXiv 2504.14945 and its code (`p_div_p_0.1`). HAPO (arXiv 2603.11321) says
    that it uses the same operator and gives neither its formula nor gamma.

    >>> print(shaped_imitation(jnp.log(jnp.array([[0.1, 0.9]]))).round(4))
    [[-0.5 -0.9]]
    """
    check_number("gamma", gamma, 0, open_low=True)
    (logps,) = promote(logps)
    # p / (p + gamma) = sigmoid(log p - log gamma), without overflow anywhere.
    return -jax.nn.sigmoid(logps - jnp.log(gamma).astype(logps.dtype))
