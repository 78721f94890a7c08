"""PGPO's information signal and the step multiplier made of it."""

from __future__ import annotations

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
    student, teacher = promote(student_entropy, teacher_entropy)
    chex.assert_equal_shape([student, teacher])
    gap = jax.lax.stop_gradient(student - teacher)
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
