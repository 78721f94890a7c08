"""Distilling a teacher's token distribution: divergences, supports, surrogates."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.numerics import (
    Scalar,
    bounded,
    check_choice,
    check_number,
    clamp,
    promote,
)


def divergence(
    student_logps: ArrayLike, teacher_logps: ArrayLike, *, alpha: float
) -> jax.Array:
    """Divergence of student S and teacher T, summed over the last axis.

    - `alpha = 0`: forward KL, `sum T (log T - log S)`.
    - `alpha = 1`: reverse KL, `sum S (log S - log T)`.
    - between: `(1 - alpha) KL(S || M) + alpha KL(T || M)` with the mixture
      `M = (1 - alpha) S + alpha T`; `alpha = 0.5` is the Jensen-Shannon divergence,
      at most log 2.

    It is *not* continuous at the ends: as alpha goes to 0 or 1 the mixture form goes
    to 0, where exactly 0 and 1 give a KL.

    Args:
      student_logps: [..., K] normalised log-probs (nats).
      teacher_logps: [..., K] normalised log-probs on the same support; no gradient.
      alpha: static, in [0, 1].

    Returns:
      [...] divergence. Entries of -inf have probability 0 and are legal on both
      sides; a KL is infinite where the first distribution has an entry that the
      second lacks, a mixture never is.

    Raises:
      ValueError: alpha outside [0, 1].
      TypeError: alpha is traced.

    Source: arXiv 2601.20802 and its code; the mixture form is the generalised JSD of
    arXiv 2306.13649.

    >>> student, teacher = (
    ...     jnp.log(jnp.array([0.5, 0.5])),
    ...     jnp.log(jnp.array([0.9, 0.1])),
    ... )
    >>> for alpha in (0.0, 0.5, 1.0):
    ...     print(alpha, round(float(divergence(student, teacher, alpha=alpha)), 4))
    0.0 0.3681
    0.5 0.1017
    1.0 0.5108
    """
    check_number("alpha", alpha, 0, 1, static=True)
    student, teacher = promote(student_logps, teacher_logps)
    chex.assert_equal_shape([student, teacher])
    teacher = jax.lax.stop_gradient(teacher)
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    # logaddexp has no gradient at (-inf, -inf). Such entries weigh nothing, so one of
    # the two may be anything.
    absent = jnp.isneginf(student) & jnp.isneginf(teacher)
    mixture = jnp.logaddexp(
        student + jnp.log1p(-alpha),
        jnp.where(absent, 0, teacher) + jnp.log(alpha),
    )
    return (1 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """`sum p (log p - log q)`, with `0 log 0 = 0` in value and gradient."""
    p = jnp.exp(logp)
    gap = jnp.where(p > 0, logp, 0) - jnp.where(p > 0, logq, 0)
    return (p * gap).sum(-1)


def append_tail(logps: ArrayLike) -> jax.Array:
    """Log-probs of a partial support, plus one bucket with the remaining mass.

    `tail = log(1 - exp(L))` with `L = min(logsumexp(logps), -1e-7)`; the gradient
    flows through the bucket except where that bound is active.

    Args:
      logps: [..., K] log-probs (nats) that sum to at most 1 in probability.

    Returns:
      [..., K + 1] normalised log-probs.

    Source: arXiv 2601.20802 and its code, from which the bound is.

    >>> print(jnp.exp(append_tail(jnp.log(jnp.array([0.5, 0.2])))).round(3))
    [0.5 0.2 0.3]
    """
    (logps,) = promote(logps)
    mass = clamp(jax.nn.logsumexp(logps, axis=-1, keepdims=True), high=-1e-7)
    return jnp.concatenate([logps, jnp.log(-jnp.expm1(mass))], axis=-1)


def renormalize(logps: ArrayLike) -> jax.Array:
    """Log-probs of a partial support, rescaled to sum to 1 in probability.

    Args:
      logps: [..., K] log-probs (nats).

    Returns:
      [..., K] normalised log-probs, `logps - logsumexp(logps)`.

    >>> print(jnp.exp(renormalize(jnp.log(jnp.array([0.5, 0.3])))).round(3))
    [0.625 0.375]
    """
    (logps,) = promote(logps)
    return jax.nn.log_softmax(logps, axis=-1)


def self_distillation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
    support: str = "student",
) -> jax.Array:
    """SDPO's distillation loss on whole logits; for tests and small vocabularies.

    Takes the `top_k` most likely tokens of one side, with each side's own
    normaliser, closes the support by a tail bucket or by renormalising, and returns
    the `divergence`. In training the same comes out of the chunked vocabulary pass.

    Args:
      student_logits: [..., V] at the rollout temperature.
      teacher_logits: [..., V] same tokens behind the teacher's context; no gradient.
      alpha: as in `divergence`.
      top_k: size of the support, at most V (larger values mean V); None: all of V.
      tail: append the tail bucket; else renormalise. Without `top_k` neither is
        needed.
      support: whose most likely tokens: "student" or "teacher".

    Returns:
      [...] loss per token.

    Raises:
      ValueError: alpha outside [0, 1], `top_k` below 1, unknown support.

    Source: arXiv 2601.20802; the support is the student's in its code.

    >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
    >>> for top_k in (None, 2):
    ...     print(round(float(self_distillation(student, teacher, top_k=top_k)), 4))
    0.2476
    0.2476
    """
    check_choice("support", support, ("student", "teacher"))
    check_number("top_k", top_k, 1, static=True)
    student_logits, teacher_logits = promote(student_logits, teacher_logits)
    chex.assert_equal_shape([student_logits, teacher_logits])
    student = jax.nn.log_softmax(student_logits)
    teacher = jax.nn.log_softmax(teacher_logits)
    if top_k is not None:
        chosen = student if support == "student" else teacher
        width = min(top_k, chosen.shape[-1])
        _, ids = jax.lax.top_k(chosen, width)
        close = append_tail if tail else renormalize
        student = close(jnp.take_along_axis(student, ids, axis=-1))
        teacher = close(jnp.take_along_axis(teacher, ids, axis=-1))
    return divergence(student, teacher, alpha=alpha)


def sampled_token_distillation(logps: ArrayLike, teacher_logps: ArrayLike) -> jax.Array:
    """A surrogate for the reverse KL that needs the sampled tokens only.

    `l = sg(logps - teacher_logps) * logps`. Over tokens sampled from the student its
    *gradient* is, in expectation, that of `divergence(..., alpha=1)`; its value is
    not a divergence.

    Args:
      logps: [B, T] student log-probs (nats) of the sampled tokens.
      teacher_logps: [B, T] the teacher's; no gradient.

    Returns:
      [B, T] surrogate loss.

    Source: arXiv 2601.20802, the sampled-token form of its code.

    >>> sampled_token_distillation(jnp.array([[-2.0]]), jnp.array([[-0.5]])).tolist()
    [[3.0]]
    """
    logps, teacher_logps = promote(logps, teacher_logps)
    chex.assert_equal_shape([logps, teacher_logps])
    gap = jax.lax.stop_gradient(logps - teacher_logps)
    return bounded(gap) * bounded(logps)


def importance_clip(
    logps: ArrayLike, old_logps: ArrayLike, *, clip: Scalar = 2.0
) -> jax.Array:
    """SDPO's factor for batches used for more than one update; one-sided, detached.

    `min(exp(clamp(logps - old_logps, +-20)), clip)`; multiply the loss per token.

    Args:
      logps: [B, T] log-probs (nats) of the sampled tokens.
      old_logps: [B, T] the same under the policy at rollout.
      clip: upper bound; there is no lower one. May be traced.

    Returns:
      [B, T] factor without gradient; 1 on policy.

    Raises:
      ValueError: clip not above 0.

    Source: arXiv 2601.20802 and its code (`is_clip`).

    >>> factor = importance_clip(jnp.array([[0.0, -1.0]]), jnp.array([[-3.0, -1.0]]))
    >>> factor.tolist()
    [[2.0, 1.0]]
    """
    check_number("clip", clip, 0, open_low=True)
    logps, old_logps = promote(logps, old_logps)
    chex.assert_equal_shape([logps, old_logps])
    ratio = jnp.exp(clamp(jax.lax.stop_gradient(logps - old_logps), -20.0, 20.0))
    return clamp(ratio, high=clip)
