"""PGPO's information signal and the step multiplier made of it."""

from __future__ import annotations

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.numerics import Scalar, check_choice, check_number, clamp, promote
from jaxrl_post.reduction import Reduction, reduce

_AVERAGES = {
    "sequence": "sequence_mean",
    "token": "token_mean",
    "sum": "sequence_sum_mean",
}
_LEVELS = ("sequence", "token")


def information_gain(
    student_entropy: ArrayLike,
    teacher_entropy: ArrayLike,
    mask: ArrayLike,
    *,
    average: str = "sequence",
) -> Reduction:
    """How much the feedback reduces the uncertainty about the response: `I_k`.

    `I_k = mean_i [H(y_i | x_i) - H(y_i | x_i, f_i)]`: the student's predictive
    entropies minus those of the teacher that sees the feedback, at the student's own
    prefixes. Add the reductions of all micro-batches before taking the mean: there is
    one `I_k` per optimizer step.

    Args:
      student_entropy: [B, T] entropies (nats) of the student's next-token
        distributions; no gradient.
      teacher_entropy: [B, T] the teacher's, at the same tokens; no gradient.
      mask: [B, T] response tokens of samples that have feedback or a demonstration;
        elsewhere garbage is ignored.
      average: over the tokens of a sequence, the paper does not say which:
        "sequence" is their mean, then the mean over sequences; "token" the mean over
        all tokens; "sum" their sum, then the mean over sequences, which grows with
        length.

    Returns:
      The gain (nats) as a `Reduction`; with an empty mask its mean is 0.

    Raises:
      ValueError: unknown average.

    Source: PGPO, arXiv 2606.03620, Eq. 8.

    >>> student, teacher = jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 0.5]])
    >>> float(information_gain(student, teacher, jnp.ones((1, 2))).mean())
    0.75
    """
    check_choice("average", average, tuple(_AVERAGES))
    gap = _gap(student_entropy, teacher_entropy)
    return reduce(gap, mask, mode=_AVERAGES[average])


def step_multiplier(
    gain: ArrayLike,
    *,
    sensitivity: Scalar,
    max_multiplier: Scalar,
    min_multiplier: Scalar = 0.0,
) -> jax.Array:
    """The factor on the optimizer's step: `rho = min(exp(alpha I), rho_max)`.

    A bounded function of the gain with Lipschitz constant
    `sensitivity * max_multiplier`; 1 for a gain that is not finite.

    Args:
      gain: [] or any shape, `I_k` in nats.
      sensitivity: `alpha >= 0`; 0 switches the modulation off.
      max_multiplier: `rho_max >= 1`.
      min_multiplier: floor in [0, 1]. The paper's prose says that rho is at least 1,
        its formula does not ensure that: 0 is the formula, 1 the prose.

    Returns:
      Multipliers of the gain's shape.

    Raises:
      ValueError: a value outside its range (numbers only; traced values pass).

    Source: PGPO, arXiv 2606.03620, Eq. 9.

    >>> gains = jnp.array([-1.0, 0.0, 0.3, 2.0, jnp.nan])
    >>> print(step_multiplier(gains, sensitivity=1.0, max_multiplier=2.0).round(3))
    [0.368 1.    1.35  2.    1.   ]
    """
    check_number("sensitivity", sensitivity, 0)
    check_number("max_multiplier", max_multiplier, 1)
    check_number("min_multiplier", min_multiplier, 0, 1)
    (gain,) = promote(gain)
    multiplier = clamp(jnp.exp(sensitivity * gain), min_multiplier, max_multiplier)
    return jnp.where(jnp.isfinite(gain), multiplier, 1).astype(gain.dtype)


def local_multipliers(
    student_entropy: ArrayLike,
    teacher_entropy: ArrayLike,
    mask: ArrayLike,
    *,
    level: str,
    sensitivity: Scalar,
    max_multiplier: Scalar,
    min_multiplier: Scalar = 0.0,
) -> jax.Array:
    """The multiplier that every sequence, or every token, would get by itself.

    `rho_i = step_multiplier(I_i)` with the mean gain `I_i` of sequence `i`, or `rho_it`
    with the gain of token `t`. Divided by their mean they are weights of the loss that
    only redistribute: a mean other than 1 would scale the loss, which Adam undoes.

    Args:
      student_entropy, teacher_entropy: [B, T] as in `information_gain`; no gradient.
      mask: [B, T] tokens that have a gain; elsewhere garbage is ignored and rho is 1.
      level: "sequence" or "token".
      sensitivity, max_multiplier, min_multiplier: as in `step_multiplier`.

    Returns:
      [B, T] multipliers, without gradient; 1 for a gain that is not finite.

    Raises:
      ValueError: unknown level, or a number outside its range.

    Source: future work of PGPO, arXiv 2606.03620, section 4, which gives no formula.

    >>> student, teacher = jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 0.5]])
    >>> bounds = {"sensitivity": 1.0, "max_multiplier": 2.0}
    >>> for level in ("sequence", "token"):
    ...     rho = local_multipliers(student, teacher, [[1, 1]], level=level, **bounds)
    ...     print(level, rho.round(3))
    sequence [[2. 2.]]
    token [[2.    1.649]]
    """
    check_choice("level", level, _LEVELS)
    mask = jnp.asarray(mask) != 0
    gain = _gap(student_entropy, teacher_entropy)
    gain = jnp.where(mask, gain, 0)
    if level == "sequence":
        tokens = mask.sum(-1, keepdims=True)
        gain = gain.sum(-1, keepdims=True) / jnp.maximum(tokens, 1)
    multipliers = step_multiplier(
        gain,
        sensitivity=sensitivity,
        max_multiplier=max_multiplier,
        min_multiplier=min_multiplier,
    )
    return jnp.where(mask, multipliers, 1)


def _gap(student_entropy: ArrayLike, teacher_entropy: ArrayLike) -> jax.Array:
    student, teacher = promote(student_entropy, teacher_entropy)
    chex.assert_equal_shape([student, teacher])
    return jax.lax.stop_gradient(student - teacher)


@dataclass(frozen=True)
class AdaptiveSensitivity:
    """How alpha follows the multipliers, until a quantile of rho is at a target.

    `log alpha <- log alpha + rate * (1[rho <= target] - quantile)`, a stochastic
    approximation (Robbins and Monro, 1951): where it rests, `P(rho <= target) =
    quantile`. Below the target alpha rises, above it falls; that turns round at a
    target of 1, which no alpha can move.

    Source: future work of PGPO, arXiv 2606.03620, section 4, which gives no formula.

    Attributes:
      target: multiplier above 1 and below `max_multiplier`.
      quantile: share of updates, in (0, 1), whose multiplier is to stay below it.
      rate: of log alpha per update, positive.
      max_sensitivity: bound of alpha: gains that are never positive would raise it for
        ever.

    >>> adapt = AdaptiveSensitivity(target=1.5, quantile=0.9, rate=0.1)
    >>> print(adapt.next(1.0, multiplier=2.0).round(4))  # exp(-0.1 * 0.9)
    0.9139
    >>> print(adapt.next(1.0, multiplier=1.2).round(4))  # exp(0.1 * (1 - 0.9))
    1.0101
    """

    target: float = 1.5
    quantile: float = 0.5
    rate: float = 0.05
    max_sensitivity: float = 10.0

    def __post_init__(self) -> None:
        check_number("target", self.target, 1, open_low=True)
        check_number("quantile", self.quantile, 0, 1, open_low=True, open_high=True)
        check_number("rate", self.rate, 0, open_low=True)
        check_number("max_sensitivity", self.max_sensitivity, 0, open_low=True)

    def next(self, sensitivity: Scalar, multiplier: ArrayLike) -> jax.Array:
        """Alpha after an update whose multiplier under it was `multiplier`."""
        below = jnp.asarray(multiplier) <= self.target
        alpha = sensitivity * jnp.exp(self.rate * (below - self.quantile))
        return jnp.minimum(alpha, self.max_sensitivity)
