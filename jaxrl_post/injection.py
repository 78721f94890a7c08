"""HAPO: when a group needs a teacher's trajectory, and putting it there.

The posteriors of the gate live on the host, in float64, where checkpoints keep them.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_post.numerics import check_choice, check_number

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


def update_posterior(
    posterior: ArrayLike,
    successes: ArrayLike,
    group_size: int,
    *,
    discount: float = 1.0,
) -> np.ndarray:
    """What a visit teaches about a prompt, on top of what earlier visits taught.

    `a <- 1 + discount (a - 1) + S`, `b <- 1 + discount (b - 1) + N - S`: the posterior
    Beta(a, b) of the success rate, with past visits faded towards the uniform prior
    Beta(1, 1). Discount 0 forgets them, which is the paper's gate; 1 keeps them all,
    as if the policy did not change. Not in the paper.

    Args:
      posterior: [P, 2] a and b before the visit; ones for a prompt never seen.
      successes: [P] whole numbers of successful rollouts, S, before any injection.
      group_size: N, rollouts per group.
      discount: weight of the past, in [0, 1].

    Returns:
      [P, 2] float64, a and b.

    Raises:
      ValueError: group size below 1, a discount outside [0, 1], successes that are
        not within the group.

    >>> update_posterior([[3.0, 7.0], [1.0, 1.0]], [4, 8], 8, discount=0.5)
    array([[6., 8.], [9., 1.]])
    """
    _check_group_size(group_size)
    check_number("discount", discount, 0, 1)
    wins = np.asarray(successes, np.float64)
    if not np.all((wins >= 0) & (wins <= group_size)):
        raise ValueError(f"successes={successes} are not all in [0, {group_size}].")
    past = np.asarray(posterior, np.float64) - 1
    return 1 + discount * past + np.stack([wins, group_size - wins], -1)


def posterior_mean(posterior: ArrayLike) -> np.ndarray:
    """The confidence that a posterior Beta(a, b) gives: `c = a / (a + b)`.

    For a prompt seen once, `confidence`. The gate opens where it is below the
    threshold; both are the float64 nearest to their exact value, so an equality of
    decimals, 8 / 10 and 0.8, is one here as well.

    Args:
      posterior: [P, 2] a and b.

    Returns:
      [P] float64 in (0, 1).

    Source: HAPO, arXiv 2603.11321, Eq. 6, for any posterior.

    >>> posterior_mean(update_posterior(np.ones((3, 2)), [0, 4, 7], 8))
    array([0.1, 0.5, 0.8])
    """
    a, b = np.moveaxis(np.asarray(posterior, np.float64), -1, 0)
    return a / (a + b)


def sample_confidence(posterior: ArrayLike, rng: np.random.Generator) -> np.ndarray:
    """Thompson sampling: one success rate drawn from each posterior, `p ~ Beta(a, b)`.

    The gate opens where p is below the threshold. After one visit that does not
    vanish even for a prompt that is always solved (probability gamma^(N + 1)). Not in
    the paper, which names Thompson sampling but takes the mean.

    Args:
      posterior: [P, 2] a and b, after the visit: Beta(1 + S, 1 + N - S) if it is the
        first.
      rng: NumPy's generator; the draw is made on the host.

    Returns:
      [P] float64 in [0, 1].

    >>> rng = np.random.default_rng(0)
    >>> sample_confidence([[1.0, 9.0], [9.0, 1.0]], rng).round(2)
    array([0.08, 0.85])
    """
    a, b = np.moveaxis(np.asarray(posterior, np.float64), -1, 0)
    return rng.beta(a, b)


def injection_probability(
    success_rate: ArrayLike,
    group_size: int,
    *,
    threshold: float,
    sampled: bool = False,
) -> np.ndarray:
    """The chance that the gate opens for a prompt of known success rate.

    `P(S < k)` with `S ~ Binomial(N, success_rate)` and `k` the smallest number of
    successes that keeps the gate closed. With a fixed N it vanishes only as the
    success rate goes to 1; by Thompson sampling, not even then.

    Args:
      success_rate: [...] chance that one rollout succeeds.
      group_size: N, rollouts per group.
      threshold: gamma, a Python number; in [0, 1] if sampled.
      sampled: Thompson sampling from Beta(1 + S, 1 + N - S), instead of its mean.

    Returns:
      [...] float64, computed on the host.

    Raises:
      ValueError: a rate outside [0, 1], group size below 1.

    Source: HAPO, arXiv 2603.11321, Sec. 4; exact, where its Eq. 11 is a bound (one
    that fails where the threshold exceeds (N + 1) / (N + 2)).

    >>> print(injection_probability([0.5, 0.9, 1.0], 8, threshold=0.8).round(4))
    [0.9648 0.1869 0.    ]
    >>> print(injection_probability(1.0, 8, threshold=0.8, sampled=True).round(4))
    0.1342
    """
    rate = np.asarray(success_rate, np.float64)
    if not np.all((rate >= 0) & (rate <= 1)):
        raise ValueError(f"success_rate={success_rate} is not in [0, 1].")
    if sampled:
        check_number("threshold", threshold, 0, 1)
        # P(Beta(1 + S, 1 + N - S) < gamma) = P(Binomial(N + 1, gamma) > S).
        draws = _binomial(group_size + 1, np.asarray(threshold, np.float64))
        opens = 1 - draws.cumsum()[:-1]
    else:
        opens = np.arange(group_size + 1) < _fewest_closed(group_size, threshold)
    chances = np.tensordot(opens.astype(np.float64), _binomial(group_size, rate), 1)
    return np.minimum(chances, 1.0)


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


def _binomial(trials: int, rate: np.ndarray) -> np.ndarray:
    """[trials + 1, ...] the chance of each number of successes."""
    return np.stack(
        [
            math.comb(trials, s) * rate**s * (1 - rate) ** (trials - s)
            for s in range(trials + 1)
        ]
    )


def _fewest_closed(group_size: int, threshold: ArrayLike) -> int:
    """The smallest S with `(1 + S) / (2 + N) >= threshold`, in exact arithmetic."""
    _check_group_size(group_size)
    return max(0, math.ceil(Fraction(str(threshold)) * (2 + group_size) - 1))
