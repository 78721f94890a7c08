"""HAPO: when a group needs a teacher's trajectory, and putting it there."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_post.numerics import check_choice

Tree = TypeVar("Tree")


def confidence(successes: ArrayLike, group_size: int) -> jax.Array:
    """How sure a group's outcome makes one that the policy solves the prompt.

    `c = (1 + S) / (2 + N)`: the mean of the posterior Beta(1 + S, 1 + N - S) under a
    uniform prior. Nothing is sampled.

    Args:
      successes: [P] whole numbers of successful rollouts, S, before any injection.
      group_size: N, rollouts per group.

    Returns:
      [P] in (0, 1).

    Raises:
      ValueError: group size below 1.

    Source: HAPO, arXiv 2603.11321, Eq. 6.

    >>> print(confidence(jnp.array([0, 4, 8]), 8))
    [0.1 0.5 0.9]
    """
    _check_group_size(group_size)
    # A table, because a compiler may turn the division into a product with the
    # rounded reciprocal, and the gate compares to the last bit.
    dtype = np.dtype(jnp.result_type(float)).type
    table = (1 + np.arange(group_size + 1, dtype=dtype)) / dtype(2 + group_size)
    return jnp.asarray(table)[jnp.asarray(successes).astype(jnp.int32)]


def should_inject(
    successes: ArrayLike, group_size: int, *, threshold: ArrayLike
) -> jax.Array:
    """HAPO's gate: open where the confidence is strictly below the threshold.

    `(1 + S) / (2 + N) < threshold`. A Python threshold is read as the decimal number
    it prints as, and the comparison is exact: 0.8 with 7 of 8 successes, equal, stays
    closed. A traced one is compared in floating point.

    Args:
      successes: [P] whole numbers of successful rollouts, S.
      group_size: N, rollouts per group.
      threshold: gamma. At most 1 / (N + 2) it never opens; above (N + 1) / (N + 2) it
        opens even for a group in which every rollout succeeded.

    Returns:
      [P] bool.

    Raises:
      ValueError: group size below 1, a threshold that is not a number.

    Source: HAPO, arXiv 2603.11321, Algorithm 1.

    >>> should_inject(jnp.array([0, 6, 7, 8]), 8, threshold=0.8).tolist()
    [True, True, False, False]
    """
    if isinstance(threshold, jax.Array):
        return confidence(successes, group_size) < threshold
    return jnp.asarray(successes) < _fewest_closed(group_size, threshold)


def injection_probability(
    success_rate: ArrayLike, group_size: int, *, threshold: float
) -> np.ndarray:
    """The chance that the gate opens for a prompt of known success rate.

    `P(S < k)` with `S ~ Binomial(N, success_rate)` and `k` the smallest number of
    successes that keeps the gate closed. With a fixed N it vanishes only as the
    success rate goes to 1.

    Args:
      success_rate: [...] chance that one rollout succeeds.
      group_size: N, rollouts per group.
      threshold: gamma, a Python number.

    Returns:
      [...] float64, computed on the host.

    Raises:
      ValueError: a rate outside [0, 1], group size below 1.

    Source: HAPO, arXiv 2603.11321, Sec. 4; exact, where its Eq. 11 is a bound (one
    that fails where the threshold exceeds (N + 1) / (N + 2)).

    >>> print(injection_probability([0.5, 0.9, 1.0], 8, threshold=0.8).round(4))
    [0.9648 0.1869 0.    ]
    """
    rate = np.asarray(success_rate, np.float64)
    if not np.all((rate >= 0) & (rate <= 1)):
        raise ValueError(f"success_rate={success_rate} is not in [0, 1].")
    closed = _fewest_closed(group_size, threshold)
    chances = [
        math.comb(group_size, s) * rate**s * (1 - rate) ** (group_size - s)
        for s in range(min(closed, group_size + 1))
    ]
    return np.minimum(sum(chances, np.zeros_like(rate)), 1.0)


def inject(
    group: Tree,
    teacher: Any,
    *,
    gate: ArrayLike,
    available: ArrayLike,
    scores: ArrayLike,
    tie: str = "first",
    key: jax.Array | None = None,
) -> tuple[Tree, jax.Array]:
    """Replaces the worst rollout of a group by the teacher's trajectory.

    `j* = argmin_j scores[j]`, where the gate is open and a trajectory is available;
    the group keeps its size, other groups stay as they are. This is the equation to
    the letter: that a group without a failure keeps its gate closed is the recipe's
    affair.

    Args:
      group: pytree of arrays [P, G, ...]: tokens, masks, rewards, ...
      teacher: the same pytree of [P, ...], one trajectory per prompt; rows without
        one may hold anything.
      gate: [P] bool, from `should_inject`.
      available: [P] bool, whether the prompt has a (verified) trajectory.
      scores: [P, G] finite, or -inf for a rollout to be replaced first, such as one
        that could not be judged.
      tie: among equal scores the "first" rollout, or a "random" one.
      key: PRNG key, for `tie="random"`.

    Returns:
      The new group, and the [P, G] bool mask of the rollouts that are the teacher's.

    Raises:
      ValueError: pytrees that do not match, unknown tie, no key for a random one.

    Source: HAPO, arXiv 2603.11321, Eq. 7.

    >>> group = {"rewards": jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])}
    >>> teacher = {"rewards": jnp.array([1.0, 1.0])}
    >>> new, is_teacher = inject(
    ...     group,
    ...     teacher,
    ...     gate=jnp.array([True, True]),
    ...     available=jnp.array([True, False]),
    ...     scores=group["rewards"],
    ... )
    >>> new["rewards"].tolist(), is_teacher[0].tolist()
    ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [False, True, False])
    """
    check_choice("tie", tie, ("first", "random"))
    scores = jnp.asarray(scores)
    chex.assert_rank(scores, 2)
    prompts, group_size = scores.shape
    replace = (jnp.asarray(gate) != 0) & (jnp.asarray(available) != 0)
    chex.assert_shape(replace, (prompts,))
    worst = scores == scores.min(-1, keepdims=True)
    if tie == "random":
        if key is None:
            raise ValueError("tie='random' needs a PRNG key: inject(..., key=key).")
        order = jnp.where(worst, jax.random.uniform(key, scores.shape), -1.0)
        chosen = order.argmax(-1)
    else:
        chosen = worst.argmax(-1)
    is_teacher = replace[:, None] & (jnp.arange(group_size)[None] == chosen[:, None])

    def put(path: Any, own: ArrayLike, given: ArrayLike) -> jax.Array:
        own, given = jnp.asarray(own), jnp.asarray(given)
        expected = (prompts, *own.shape[2:])
        if own.shape[:2] != scores.shape or given.shape != expected:
            raise ValueError(
                f"inject: leaf {jax.tree_util.keystr(path)} has shape {own.shape} in "
                f"the group and {given.shape} in the teacher; with scores "
                f"{scores.shape} they must be [P, G, ...] and [P, ...]."
            )
        where = is_teacher.reshape(scores.shape + (1,) * (own.ndim - 2))
        return jnp.where(where, given[:, None].astype(own.dtype), own)

    return jax.tree_util.tree_map_with_path(put, group, teacher), is_teacher


def _check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"group_size={group_size}: a group has at least one rollout.")


def _fewest_closed(group_size: int, threshold: ArrayLike) -> int:
    """The smallest S with `(1 + S) / (2 + N) >= threshold`, in exact arithmetic."""
    _check_group_size(group_size)
    return max(0, math.ceil(Fraction(str(threshold)) * (2 + group_size) - 1))
