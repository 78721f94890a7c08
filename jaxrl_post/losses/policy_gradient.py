"""Policy-gradient surrogates: PPO, GRPO and DAPO, GSPO, CISPO; rollout correction.

All return a loss to *minimise*, one number per token.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.losses.masking import mask_inputs
from jaxrl_post.numerics import (
    Scalar,
    bounded_exp,
    check_choice,
    check_number,
    clamp,
    promote,
)

# Detached ratios are clamped to exp(+-20) as in verl: past that they only overflow.
_LOG_RATIO_CLAMP = 20.0


def clipped_policy_gradient(
    logps: ArrayLike,
    old_logps: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: Scalar | None = 0.2,
    clip_high: Scalar | None = 0.2,
    dual_clip: Scalar | None = None,
    log_ratio_clamp: Scalar | None = 20.0,
) -> jax.Array:
    """PPO's clipped surrogate, with DAPO's clip-higher and the dual clip.

    With `r = exp(clamp(logps - old_logps, +-log_ratio_clamp))`:
    `l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, and where `A < 0` and a
    dual clip `c` is given, `l = min(l, -c A)`. The gradient is 0 wherever a clip or
    the clamp is what decides; `clip_low = clip_high = None` is the plain
    importance-weighted policy gradient, as LUFFY trains it.

    Args:
      logps: [B, T] log-probs (nats) of the sampled tokens under the policy.
      old_logps: [B, T] the same under the policy that is being improved; no gradient.
      advantages: [B] or [B, T]; no gradient.
      clip_low, clip_high: widths of the trust interval around 1; None: no clip on
        that side. May be traced.
      dual_clip: bound `c > 1` on the ratio of tokens with a negative advantage, or
        None. May be traced.
      log_ratio_clamp: bound on the log-ratio (nats), or None; then only a guard
        against overflow remains, at 44 nats in float32. May be traced.

    Returns:
      [B, T] loss.

    Raises:
      ValueError: a width below 0, `dual_clip` not above 1, a clamp not above 0.

    Source: arXiv 1707.06347 (Eq. 7), 2503.14476 (clip-higher), 1912.09729 (dual
    clip). Libraries disagree on defaults: see `losses.presets`.

    >>> loss = clipped_policy_gradient(
    ...     jnp.log(jnp.array([[1.5, 0.9, 0.5]])), jnp.zeros((1, 3)), jnp.array([2.0])
    ... )
    >>> print(loss.round(4))
    [[-2.4 -1.8 -1. ]]
    """
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    check_number("dual_clip", dual_clip, 1, open_low=True)
    check_number("log_ratio_clamp", log_ratio_clamp, 0, open_low=True)
    logps, old_logps, advantages = _prepare(logps, old_logps, advantages)
    log_ratio = logps - old_logps
    if log_ratio_clamp is not None:
        log_ratio = clamp(log_ratio, -log_ratio_clamp, log_ratio_clamp)
    ratio = bounded_exp(log_ratio)
    loss = _pessimistic(ratio, advantages, clip_low, clip_high)
    if dual_clip is not None:
        floor = -dual_clip * advantages
        loss = jnp.where((advantages < 0) & (loss > floor), floor, loss)
    return loss.astype(logps.dtype)


def sequence_policy_gradient(
    logps: ArrayLike,
    old_logps: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: Scalar | None = 3e-4,
    clip_high: Scalar | None = 4e-4,
) -> jax.Array:
    """GSPO in its token form: one importance ratio per sequence.

    `s_b = exp(mean_t(logps - old_logps))` over the tokens of the mask, and per token
    `log s_bt = sg(log s_b) + logps - sg(logps)`, at most 10;
    `l = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))`. Reduced by
    `sequence_mean`, value and gradient are those of the sequence form.

    Args:
      logps, old_logps, advantages: as in `clipped_policy_gradient`; garbage at masked
        tokens is ignored.
      mask: [B, T] tokens that count.
      clip_low, clip_high: widths around 1, None for no clip; the defaults are the
        paper's, far narrower than a token ratio's. May be traced.

    Returns:
      [B, T] loss; at masked tokens it has the sequence's value and no gradient.

    Raises:
      ValueError: a width below 0.

    Source: arXiv 2507.18071 (GSPO-token); the bound of 10 is verl's.

    >>> loss = sequence_policy_gradient(
    ...     jnp.array([[0.3, 0.1]]),
    ...     jnp.zeros((1, 2)),
    ...     jnp.array([1.0]),
    ...     jnp.ones((1, 2)),
    ...     clip_low=0.3,
    ...     clip_high=0.4,
    ... )
    >>> print(loss.round(3))  # exp(0.2) = 1.221
    [[-1.221 -1.221]]
    """
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    logps, old_logps, advantages = _prepare(logps, old_logps, advantages)
    chex.assert_equal_shape([logps, jnp.asarray(mask)])
    logps, old_logps, advantages = mask_inputs(mask, logps, old_logps, advantages)
    mask = jnp.asarray(mask) != 0
    tokens = jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(logps.dtype)
    frozen = jax.lax.stop_gradient(logps)
    sequence = ((frozen - old_logps) / tokens).sum(-1, keepdims=True)
    ratio = jnp.exp(clamp(sequence + (logps - frozen), high=10.0))
    return _pessimistic(ratio, advantages, clip_low, clip_high).astype(logps.dtype)


def clipped_importance_policy_gradient(
    logps: ArrayLike,
    old_logps: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low: Scalar | None = 0.2,
    clip_high: Scalar | None = 0.2,
    absolute_cap: Scalar | None = None,
) -> jax.Array:
    """CISPO: REINFORCE under a clipped, detached importance weight.

    `l = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logps`, with
    `r = exp(clamp(logps - old_logps, +-20))`. No token loses its gradient to the clip.

    Args:
      logps, old_logps, advantages: as in `clipped_policy_gradient`.
      clip_low, clip_high: widths around 1, None for no clip on that side. May be
        traced.
      absolute_cap: replaces both by `min(r, absolute_cap)`, TRL's one-sided form, in
        which its `epsilon_high` (5.0, say) is the cap itself. May be traced.

    Returns:
      [B, T] loss. Its value is a surrogate; its gradient is what is meant.

    Raises:
      ValueError: a width below 0, a cap not above 0.

    Source: arXiv 2506.13585 (MiniMax-M1), with the two-sided clip of verl.

    >>> loss = clipped_importance_policy_gradient(
    ...     jnp.array([[-1.0]]), jnp.array([[-2.0]]), jnp.array([1.0]), clip_high=0.5
    ... )
    >>> loss.tolist()
    [[1.5]]
    """
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    check_number("absolute_cap", absolute_cap, 0, open_low=True)
    logps, old_logps, advantages = _prepare(logps, old_logps, advantages)
    log_ratio = jax.lax.stop_gradient(logps) - old_logps
    weight = jnp.exp(clamp(log_ratio, -_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP))
    if absolute_cap is None:
        weight = _clip_ratio(weight, clip_low, clip_high)
    else:
        weight = clamp(weight, high=absolute_cap)
    return -weight * advantages * logps


def truncated_importance_weights(
    old_logps: ArrayLike,
    sampler_logps: ArrayLike,
    mask: ArrayLike,
    *,
    threshold: Scalar = 2.0,
    level: str = "token",
) -> jax.Array:
    """Weights that correct for a sampler whose log-probs differ from the trainer's.

    `w = min(exp(clamp(d, +-20)), threshold)` with `d = old_logps - sampler_logps` per
    token, or summed over the sequence's tokens. Multiply the per-token loss with it.

    Args:
      old_logps: [B, T] log-probs of the sampled tokens, computed by the trainer.
      sampler_logps: [B, T] the same as the sampler reported them.
      mask: [B, T] tokens that count; elsewhere garbage is ignored.
      threshold: upper bound of the weights. May be traced.
      level: "token", or "sequence" for one weight per sequence.

    Returns:
      [B, T] weights without gradient, 0 at masked tokens.

    Raises:
      ValueError: unknown level, threshold not above 0.

    Source: Ionides, "Truncated importance sampling" (2008), as verl and TRL apply it
    to rollouts of a separate inference engine.

    >>> weights = truncated_importance_weights(
    ...     jnp.zeros((1, 3)),
    ...     jnp.log(jnp.array([[0.25, 0.8, 1.0]])),
    ...     jnp.array([[1, 1, 0]]),
    ... )
    >>> print(weights.round(2))
    [[2.   1.25 0.  ]]
    """
    check_choice("level", level, ("token", "sequence"))
    check_number("threshold", threshold, 0, open_low=True)
    old_logps, sampler_logps = promote(old_logps, sampler_logps)
    chex.assert_rank(old_logps, 2)
    chex.assert_equal_shape([old_logps, sampler_logps, jnp.asarray(mask)])
    old_logps, sampler_logps = mask_inputs(mask, old_logps, sampler_logps)
    gap = jax.lax.stop_gradient(old_logps - sampler_logps)
    if level == "sequence":
        gap = jnp.broadcast_to(gap.sum(-1, keepdims=True), gap.shape)
    weight = jnp.exp(clamp(gap, -_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP))
    return jnp.where(jnp.asarray(mask) != 0, clamp(weight, high=threshold), 0)


def _prepare(
    logps: ArrayLike, old_logps: ArrayLike, advantages: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checked, promoted, detached where needed; advantages brought to [B, T]."""
    logps, old_logps, advantages = promote(logps, old_logps, advantages)
    chex.assert_rank(logps, 2)
    chex.assert_equal_shape([logps, old_logps])
    if advantages.ndim == 1:
        chex.assert_shape(advantages, logps.shape[:1])
        advantages = advantages[:, None]
    else:
        chex.assert_equal_shape([logps, advantages])
    advantages = jnp.broadcast_to(advantages, logps.shape)
    old_logps, advantages = jax.lax.stop_gradient((old_logps, advantages))
    return logps, old_logps, advantages


def _clip_ratio(
    ratio: jax.Array, clip_low: Scalar | None, clip_high: Scalar | None
) -> jax.Array:
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    return clamp(ratio, low, high)


def _pessimistic(
    ratio: jax.Array,
    advantages: jax.Array,
    clip_low: Scalar | None,
    clip_high: Scalar | None,
) -> jax.Array:
    """The larger loss of the plain and the clipped ratio; on a tie the plain one's
    gradient, which inside the interval is also the sum of `max`'s two halves."""
    plain = -advantages * ratio
    clipped = -advantages * _clip_ratio(ratio, clip_low, clip_high)
    return jnp.where(clipped > plain, clipped, plain)
