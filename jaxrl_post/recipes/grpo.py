"""GRPO and the family around it: DAPO, Dr. GRPO, GSPO, CISPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_post import losses
from jaxrl_post.advantages import group_relative
from jaxrl_post.losses import presets
from jaxrl_post.numerics import check_choice, check_number
from jaxrl_post.recipes.batch import Batch, own_tokens
from jaxrl_post.recipes.recipe import Recipe, Scores, Term, Views, weighted
from jaxrl_post.recipes.transforms import DynamicSampling, OverlongPenalty

PRESETS: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {**presets.ADVANTAGES.get(name, {}), **presets.POLICY_GRADIENT[name]}
        for name in presets.POLICY_GRADIENT
    },
    "dapo": {"clip_high": 0.28, "dynamic_sampling": True, "reduction": "token_mean"},
    "dr_grpo": {**presets.ADVANTAGES["dr_grpo"], "reduction": "constant"},
    "gspo": {
        "importance": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "reduction": "sequence_mean",
    },
    "cispo": {"importance": "clipped"},
}
"""Arguments of `grpo` that make it a named relative, or a library's reading of it."""


def grpo(
    *,
    importance: Literal["token", "sequence", "clipped"] = "token",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    reduction: str = "token_mean",
    max_length: int | None = None,
    scale: Literal["std", "none", "batch"] = "std",
    ddof: int = 0,
    eps: float = 1e-6,
    leave_one_out: bool = False,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = None,
    entropy_weight: float = 0.0,
    truncated_importance: float | None = None,
    truncated_importance_level: Literal["token", "sequence"] = "token",
    overlong_buffer: int | None = None,
    overlong_penalty: float = 1.0,
    mask_truncated: bool = False,
    dynamic_sampling: bool = False,
    max_sampling_rounds: int = 10,
    log_entropy: bool = True,
) -> Recipe:
    """Group relative policy optimization (arXiv 2402.03300).

    ``loss = policy gradient + kl_weight * KL(student, reference) - entropy_weight * H``

    Args:
      importance: "token", the clipped surrogate; "sequence", GSPO; "clipped", CISPO.
      clip_low, clip_high: widths of the clip; None for none on that side.
      dual_clip: bound on the loss of negative advantages, for "token".
      log_ratio_clamp: bound on log-ratios before they are exponentiated, for "token".
      reduction: mode of `losses.reduce`.
      max_length: response length that "constant" divides by, and at which the length
        penalty is whole.
      scale, ddof, eps, leave_one_out: of `advantages.group_relative`.
      kl_weight, kl_estimator, kl_clamp: of the KL to the initial policy; with weight 0
        there is no reference model.
      entropy_weight: of the entropy bonus.
      truncated_importance: cap of the weights that correct for the sampler's
        distribution; None for none.
      truncated_importance_level: "token" or "sequence".
      overlong_buffer: tokens before `max_length` over which the length penalty grows;
        None for no penalty.
      overlong_penalty: its size.
      mask_truncated: leave truncated completions out of the loss.
      dynamic_sampling: drop groups without variance and draw others.
      max_sampling_rounds: bound on that; 0 for none.
      log_entropy: log the policy's entropy.

    Raises:
      ValueError: for arguments that contradict each other.

    >>> print(grpo(kl_weight=0.01))
    grpo
      1 x policy_gradient (token_mean)
      0.01 x kl (token_mean, reads reference)
    """
    check_number("clip_low", clip_low, 0)
    check_number("clip_high", clip_high, 0)
    check_choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    if importance not in ("token", "sequence", "clipped"):
        raise ValueError(
            f"importance is {importance!r}; it is one of token, sequence, clipped."
        )
    if importance != "token" and dual_clip is not None:
        raise ValueError(f"dual_clip={dual_clip} belongs to importance='token'.")
    if max_length is None and (reduction == "constant" or overlong_buffer is not None):
        raise ValueError(
            "reduction='constant' and overlong_buffer need max_length, the response "
            "length that they measure against."
        )
    denominator = None
    if reduction == "constant" and max_length is not None:
        denominator = partial(_rows_times_length, length=max_length)
    shared: dict[str, Any] = {"reduction": reduction, "denominator": denominator}

    clips = {"clip_low": clip_low, "clip_high": clip_high}
    if importance == "token":
        clips |= {"dual_clip": dual_clip, "log_ratio_clamp": log_ratio_clamp}
    correction = None
    if truncated_importance is not None:
        correction = partial(
            losses.truncated_importance_weights,
            threshold=truncated_importance,
            level=truncated_importance_level,
        )
    tokenwise = importance != "sequence" and (
        correction is None or truncated_importance_level == "token"
    )
    terms = weighted(
        Term(
            "policy_gradient",
            scores=sampled_logps,
            loss=partial(
                _policy_gradient, kind=importance, clips=clips, correction=correction
            ),
            metrics=partial(
                partial(clip_metrics, clip_low=clip_low, clip_high=clip_high)
                if importance == "token"
                else ratio_metrics,
                correction=correction,
            ),
            tokenwise=tokenwise,
            off_policy=correction is not None,
            **shared,
        ),
        Term(
            "kl",
            scores=reference_logps,
            loss=partial(_reference_kl, estimator=kl_estimator, clamp=kl_clamp),
            metrics=lambda scores, batch: {
                "kl": losses.reference_kl(scores["logps"], scores["ref_logps"])
            },
            weight=kl_weight,
            needs=frozenset({"reference"}),
            tokenwise=True,
            off_policy=True,
            **shared,
        ),
        Term(
            "entropy_bonus",
            scores=entropy,
            loss=lambda scores, batch: -scores["entropy"],
            weight=entropy_weight,
            tokenwise=True,
            off_policy=True,
            **shared,
        ),
    )
    transforms: tuple = (DynamicSampling(),) if dynamic_sampling else ()
    if overlong_buffer is not None and max_length is not None:
        transforms += (OverlongPenalty(max_length, overlong_buffer, overlong_penalty),)
    return Recipe(
        "grpo",
        terms,
        advantages=partial(
            group_relative, scale=scale, ddof=ddof, eps=eps, leave_one_out=leave_one_out
        ),
        group_transforms=transforms,
        mask_truncated=mask_truncated,
        max_sampling_rounds=max_sampling_rounds,
        min_group_size=2,
        log_entropy=log_entropy,
    )


def sampled_logps(views: Views) -> Scores:
    """The student's log-probs of the sampled tokens, ``logps``."""
    return {"logps": views.student.log_probs(views.tokens)}


def reference_logps(views: Views) -> Scores:
    """``logps`` and the reference policy's, ``ref_logps``."""
    assert views.reference is not None
    ref_logps = views.reference.log_probs(views.tokens)
    return {**sampled_logps(views), "ref_logps": ref_logps}


def entropy(views: Views) -> Scores:
    """The student's entropy in nats, ``entropy``."""
    return {"entropy": views.student.entropy()}


def old_logps(scores: Scores, batch: Batch) -> jax.Array:
    """The batch's old log-probs; where it has none, the current ones, detached."""
    old = scores["logps"] if batch.old_logps is None else jnp.asarray(batch.old_logps)
    return jax.lax.stop_gradient(old)


def ratio_metrics(
    scores: Scores, batch: Batch, correction: Callable[..., jax.Array] | None = None
) -> Scores:
    """How far the policy has moved from the batch, and the sampler from the policy.

    ``sampler/ratio`` is the mean of the importance weights before they are truncated, 1
    in expectation; ``sampler/ratio_squared`` that of their squares, of which the update
    makes the effective sample size ``sampler/ess``; ``sampler/truncated`` the share of
    those above the cap. ``policy/ratio`` and its square are the same of the policy
    against that before the first update on the batch.

    Args:
      scores, batch: as for every term.
      correction: `losses.truncated_importance_weights` with a threshold and a level, if
        the term has one.
    """
    old = old_logps(scores, batch)
    metrics = {"policy/kl_to_old": losses.reference_kl(scores["logps"], old)}
    if batch.old_logps is not None:
        ratio = losses.truncated_importance_weights(
            scores["logps"], old, batch.loss_mask, threshold=_NO_THRESHOLD
        )
        metrics |= {"policy/ratio": ratio, "policy/ratio_squared": jnp.square(ratio)}
    if batch.sampler_logps is not None:
        metrics["sampler/logp_gap"] = jnp.abs(old - batch.sampler_logps)
    if correction is not None:
        seen = (old, batch.sampler_logps, own_tokens(batch))
        ratio = correction(*seen, threshold=_NO_THRESHOLD)
        metrics["sampler/ratio"] = ratio
        metrics["sampler/ratio_squared"] = jnp.square(ratio)
        metrics["sampler/truncated"] = (correction(*seen) < ratio).astype(ratio.dtype)
    return metrics


_NO_THRESHOLD = 1e9
"""Above all weights, whose logarithms are at most 20."""


def clip_metrics(
    scores: Scores,
    batch: Batch,
    *,
    clip_low: float | None,
    clip_high: float | None,
    correction: Callable[..., jax.Array] | None = None,
) -> Scores:
    """`ratio_metrics`, and the tokens whose gradient the clip takes away.

    ``policy/clipped_low``: the ratio is too low, the advantage negative;
    ``policy/clipped_high``: too high, and positive. Only of batches with old log-probs;
    without them every ratio is 1.
    """
    metrics = dict(ratio_metrics(scores, batch, correction))
    if batch.old_logps is None:
        return metrics
    log_ratio = scores["logps"] - old_logps(scores, batch)
    advantages = jnp.asarray(batch.advantages)
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    low = -jnp.inf if clip_low is None or clip_low >= 1 else jnp.log1p(-clip_low)
    high = jnp.inf if clip_high is None else jnp.log1p(clip_high)
    too_low = (log_ratio < low) & (advantages < 0)
    too_high = (log_ratio > high) & (advantages > 0)
    metrics["policy/clipped_low"] = too_low.astype(jnp.float32)
    metrics["policy/clipped_high"] = too_high.astype(jnp.float32)
    return metrics


def _policy_gradient(scores, batch, *, kind, clips, correction):
    logps, old = scores["logps"], old_logps(scores, batch)
    if kind == "sequence":
        loss = losses.sequence_policy_gradient(
            logps, old, batch.advantages, batch.loss_mask, **clips
        )
    elif kind == "clipped":
        loss = losses.clipped_importance_policy_gradient(
            logps, old, batch.advantages, **clips
        )
    else:
        loss = losses.clipped_policy_gradient(logps, old, batch.advantages, **clips)
    if correction is not None:
        loss = loss * correction(old, batch.sampler_logps, batch.loss_mask)
    return loss


def _reference_kl(scores, batch, *, estimator, clamp):
    del batch
    return losses.reference_kl(
        scores["logps"], scores["ref_logps"], estimator=estimator, clamp=clamp
    )


def _rows_times_length(batch: Batch, *, length: int) -> jax.Array:
    return length * jnp.sum(batch.sequence_mask).astype(jnp.float32)
