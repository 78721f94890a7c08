"""Group-relative advantages: how much better a rollout did than its siblings."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.numerics import check_choice, check_number, clamp, promote


def group_relative(
    rewards: ArrayLike,
    *,
    scale: str = "std",
    ddof: int = 0,
    eps: float = 1e-6,
    where: ArrayLike | None = None,
    leave_one_out: bool = False,
) -> jax.Array:
    """The advantage of each rollout over the rollouts of the same prompt.

    `A = (R - mean) / (std + eps)`, mean and standard deviation over the group. It is
    exactly 0 where all rewards of a group are equal, a group of one included.

    Args:
      rewards: [P, G] one reward per rollout, a row per prompt.
      scale: "std" as above; "batch" divides by the standard deviation of all rewards
        of the batch; "none" does not divide (Dr. GRPO).
      ddof: 0 for the population's standard deviation, 1 for the sample's.
      eps: added to the standard deviation where that is not 0.
      where: [P, G] bool, the rollouts that could be judged; the others count nowhere,
        may hold anything and get advantage 0. None: all.
      leave_one_out: take mean and standard deviation over the *other* rollouts of the
        group (RLOO). Where the others are all equal there is no scale, and the
        difference stays undivided.

    Returns:
      [P, G] advantages without gradient.

    Raises:
      ValueError: unknown scale, negative ddof or eps.

    Source: arXiv 2402.03300 (std), 2503.20783 (none), 2402.14740 (leave one out).
    Libraries disagree on ddof, eps and more: see `losses.presets`.

    >>> print(group_relative([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1]], ddof=1).round(4))
    [[ 0.866 -0.866 -0.866  0.866]
     [ 0.     0.     0.     0.   ]]
    """
    check_choice("scale", scale, ("std", "batch", "none"))
    check_number("ddof", ddof, 0, static=True)
    check_number("eps", eps, 0)
    (rewards,) = promote(rewards)
    chex.assert_rank(rewards, 2)
    where = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where) != 0
    chex.assert_equal_shape([rewards, where])
    rewards = jax.lax.stop_gradient(jnp.where(where, rewards, 0))

    members = where[:, None, :]
    mean, std = _statistics(rewards[:, None, :], members, ddof)
    has_spread = where & (std > 0)
    if leave_one_out:
        others = members & ~jnp.eye(rewards.shape[1], dtype=bool)[None]
        mean, std = _statistics(rewards[:, None, :], others, ddof)
    if scale == "batch":
        _, std = _statistics(rewards.reshape(1, 1, -1), where.reshape(1, 1, -1), ddof)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / jnp.where(std > 0, std + eps, 1)
    return jnp.where(has_spread, advantages, 0)


def _statistics(
    values: jax.Array, members: jax.Array, ddof: int
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the members along the last axis.

    Equal values are found by comparing them: the mean of three times 0.1 is not 0.1
    in floating point, and the deviation it leaves would be scaled up to order 1.
    """
    count = members.sum(-1)
    highest = jnp.where(members, values, -jnp.inf).max(-1)
    lowest = jnp.where(members, values, jnp.inf).min(-1)
    mean = jnp.where(members, values, 0).sum(-1) / jnp.maximum(count, 1)
    deviations = jnp.where(members, values - mean[..., None], 0)
    variance = jnp.square(deviations).sum(-1) / jnp.maximum(count - ddof, 1)
    return mean, jnp.where(highest > lowest, jnp.sqrt(variance), 0)


def overlong_penalty(
    lengths: ArrayLike,
    *,
    max_length: int,
    buffer: int,
    penalty: float = 1.0,
) -> jax.Array:
    """DAPO's soft punishment of long responses, to be added to the reward.

    0 up to `max_length - buffer` tokens, then linear down to `-penalty` at
    `max_length`, and no lower beyond.

    Args:
      lengths: [...] response lengths in tokens.
      max_length: length at which the full penalty is reached.
      buffer: width of the slope in tokens, at most `max_length`.
      penalty: size of the full penalty, in units of reward.

    Returns:
      [...] between `-penalty` and 0.

    Raises:
      ValueError: buffer not in (0, max_length], negative penalty.

    Source: arXiv 2503.14476, Eq. 13.

    >>> lengths = jnp.array([16384, 18432, 20480])
    >>> print(overlong_penalty(lengths, max_length=20480, buffer=4096))
    [ 0.  -0.5 -1. ]
    """
    check_number("buffer", buffer, 0, max_length, open_low=True)
    check_number("penalty", penalty, 0)
    (lengths,) = promote(lengths)
    return penalty * clamp((max_length - buffer - lengths) / buffer, -1.0, 0.0)
