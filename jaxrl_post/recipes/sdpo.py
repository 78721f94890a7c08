"""SDPO, self-distilled policy optimization, and PGPO on top of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax

from jaxrl_post import losses
from jaxrl_post.advantages import group_relative
from jaxrl_post.information import AdaptiveSensitivity
from jaxrl_post.numerics import check_number
from jaxrl_post.recipes.batch import Batch, own_tokens
from jaxrl_post.recipes.grpo import old_logps, ratio_metrics, sampled_logps
from jaxrl_post.recipes.recipe import (
    Information,
    Recipe,
    Scores,
    Teacher,
    Term,
    Views,
    weighted,
)
from jaxrl_post.recipes.reprompt import Reprompt


def sdpo(
    *,
    alpha: float = 0.5,
    top_k: int | None = 100,
    tail: bool = True,
    support: Literal["student", "teacher", "sampled"] = "student",
    importance_clip: float | None = 2.0,
    truncated_importance: float | None = 2.0,
    reduction: str = "sequence_mean_over_all",
    policy_gradient_weight: float = 0.0,
    teacher: Literal["ema", "frozen", "live", "trust_region"] = "ema",
    teacher_rate: float = 0.05,
    teacher_every: int = 1,
    support_entropies: bool = False,
    log_entropy: bool = True,
    **reprompt: Any,
) -> Recipe:
    """Self-distilled policy optimization (arXiv 2601.20802).

    The policy, shown a sibling's solution or feedback, teaches the policy that is not:
    ``l_t = divergence(student_t, teacher_t)`` at the student's own tokens.

    Args:
      alpha: 0 forward KL, 1 reverse KL, between: generalised Jensen-Shannon.
      top_k: tokens of the support; None for the whole vocabulary.
      tail: the rest of the vocabulary counts as one more token; without it both sides
        are renormalised on the support.
      support: whose likeliest tokens are meant; "sampled": the surrogate on the sampled
        token alone, which needs ``alpha=1``.
      importance_clip: one-sided cap of the ratio to the old policy; None for none.
      truncated_importance: cap of the weights that correct for the sampler; None for
        none.
      reduction: "sequence_mean_over_all" is what the published configurations
        effectively optimise, although they say "token_mean": samples that are not
        distilled shrink the step.
      policy_gradient_weight: w of ``(1 - w) distillation + w policy gradient``.
      teacher, teacher_rate, teacher_every: see `Teacher`.
      support_entropies: score the entropies of what the loss compares too, for an
        `Information` that reads `SUPPORT_ENTROPIES`.
      log_entropy: log the policy's entropy.
      **reprompt: arguments of `Reprompt`.

    Raises:
      ValueError: for arguments that contradict each other.

    >>> print(sdpo(alpha=1.0, teacher="live"))
    sdpo
      1 x distillation (sequence_mean_over_all, reads teacher)
      teacher: live
    """
    check_number("alpha", alpha, 0, 1)
    if support not in ("student", "teacher", "sampled"):
        raise ValueError(
            f"support is {support!r}; it is one of student, teacher, sampled."
        )
    if support == "sampled" and alpha != 1:
        raise ValueError(
            f"support='sampled' estimates the reverse KL: alpha must be 1, not {alpha}."
        )
    if support == "sampled" and support_entropies:
        raise ValueError(
            "support='sampled' compares no distributions: it has no support_entropies, "
            "nor an entropy_support='loss'."
        )
    if not 0 <= policy_gradient_weight <= 1:
        raise ValueError(
            f"policy_gradient_weight is {policy_gradient_weight}; it lies in [0, 1]."
        )
    correction = None
    if truncated_importance is not None:
        correction = partial(
            losses.truncated_importance_weights, threshold=truncated_importance
        )
    terms = weighted(
        Term(
            "distillation",
            scores=partial(
                _distillation_scores,
                alpha=alpha,
                top_k=top_k,
                tail=tail,
                side=support,
                entropies=support_entropies,
            ),
            loss=partial(
                _distillation,
                importance_clip=importance_clip,
                correction=correction,
            ),
            weight=1.0 - policy_gradient_weight,
            needs=frozenset({"teacher"}),
            mask=distilled_tokens,
            reduction=reduction,
            metrics=partial(_distillation_metrics, correction=correction),
            tokenwise=True,
            off_policy=correction is not None,
        ),
        Term(
            "policy_gradient",
            scores=sampled_logps,
            loss=_plain_policy_gradient,
            weight=policy_gradient_weight,
            reduction=reduction,
            tokenwise=True,
        ),
    )
    return Recipe(
        "sdpo",
        terms,
        advantages=partial(group_relative, scale="none"),
        teacher=Teacher(teacher, teacher_rate, teacher_every),
        reprompt=Reprompt(**reprompt),
        log_entropy=log_entropy,
    )


def pgpo(
    *,
    sensitivity: float = 1.0,
    max_multiplier: float = 2.0,
    min_multiplier: float = 0.0,
    average: Literal["sequence", "token", "sum"] = "sequence",
    smoothing: float | None = None,
    delay: int = 0,
    scale_decay: bool = True,
    adapt: AdaptiveSensitivity | None = None,
    weights: Literal["none", "sequence", "token"] = "none",
    entropy_support: Literal["full", "loss"] = "full",
    **arguments: Any,
) -> Recipe:
    """SDPO whose steps grow with what the teacher knows (PGPO, arXiv 2606.03620).

    Every update is multiplied by ``rho = min(exp(sensitivity * I), max_multiplier)``, I
    the student's entropy minus the teacher's over the batch (Eqs. 8 and 9). Both come
    out of the vocabulary pass that the loss makes.

    Args:
      sensitivity: alpha of Eq. 9.
      max_multiplier, min_multiplier: bounds of rho. The paper does not say the first.
      average: how I is averaged. The paper does not say; a sum grows with length.
      smoothing, delay: see `transforms.scale_by_information`.
      scale_decay: whether weight decay is multiplied too. The paper does not say.
      adapt: lets alpha follow the multipliers, see `information.AdaptiveSensitivity`;
        from a config, a mapping with some of its fields. Not in the paper.
      weights: weigh the distillation loss of each "sequence" or "token" by its own
        multiplier over the mean of all, which moves gradient from where the teacher
        knows little to where it knows much. Not in the paper. With a policy-gradient
        term, which they leave alone, they cost a second backward pass.
      entropy_support: "full": entropies over the whole vocabulary; "loss": over what
        the loss compares, the top-k with its tail or renormalised. The paper does not
        say.
      **arguments: of `sdpo`.

    Raises:
      ValueError: for arguments that contradict each other.

    >>> print(pgpo(sensitivity=0.5))
    pgpo
      1 x distillation (sequence_mean_over_all, reads teacher)
      teacher: ema, rate 0.05
      steps: times min(exp(0.5 I), 2)
    >>> print(pgpo(weights="token", adapt={"target": 1.5, "quantile": 0.9}))
    pgpo
      1 x distillation (sequence_mean_over_all, reads teacher)
      teacher: ema, rate 0.05
      steps: times min(exp(alpha I), 2), alpha from 1 until P(rho <= 1.5) = 0.9; losses
             weighted by token
    """
    if entropy_support not in ("full", "loss"):
        raise ValueError(f"entropy_support is {entropy_support!r}; it is full or loss.")
    of_loss = entropy_support == "loss"
    information = Information(
        sensitivity=sensitivity,
        max_multiplier=max_multiplier,
        min_multiplier=min_multiplier,
        average=average,
        smoothing=smoothing,
        delay=delay,
        scale_decay=scale_decay,
        mask=distilled_tokens,
        adapt=adapt,
        weights=weights,
        scores=SUPPORT_ENTROPIES if of_loss else Information.scores,
    )
    recipe = sdpo(support_entropies=of_loss, **arguments)
    return replace(recipe, name="pgpo", information=information)


def distilled_tokens(batch: Batch) -> jax.Array:
    """``[B, T]``, the policy's tokens in samples of which the teacher knows something.

    A demonstration is not the policy's own: the teacher has read it before.
    """
    return own_tokens(batch) & batch.extras["distilled"][:, None]


SUPPORT_ENTROPIES = ("support_entropy", "teacher_support_entropy")
"""Scores of a distillation term that is asked for `support_entropies`."""


def _distillation_scores(
    views: Views, *, alpha, top_k, tail, side, entropies
) -> Scores:
    student, teacher = views.student, views.teacher
    assert teacher is not None
    scores = dict(sampled_logps(views))
    if side == "sampled":
        return scores | {"teacher_logps": teacher.log_probs(views.tokens)}
    if top_k is None:
        pair = student.log_softmax(), teacher.log_softmax()
        divergence = student.sum_shards(losses.divergence(*pair, alpha=alpha))
        both = [view.entropy for view in (student, teacher)]
    else:
        ids = (student if side == "student" else teacher).top_k(top_k)[1]
        complete = losses.append_tail if tail else losses.renormalize
        pair = complete(student.log_probs(ids)), complete(teacher.log_probs(ids))
        divergence = losses.divergence(*pair, alpha=alpha)
        both = [partial(losses.entropy, logps) for logps in pair]
    if entropies:
        measured = (jax.lax.stop_gradient(entropy()) for entropy in both)
        scores |= zip(SUPPORT_ENTROPIES, measured, strict=True)
    return scores | {"divergence": divergence}


def _distillation(scores, batch, *, importance_clip, correction):
    old = old_logps(scores, batch)
    if "divergence" in scores:
        loss = scores["divergence"]
    else:
        loss = losses.sampled_token_distillation(
            scores["logps"], scores["teacher_logps"]
        )
    if importance_clip is not None:
        loss = loss * losses.importance_clip(scores["logps"], old, clip=importance_clip)
    if correction is not None:
        loss = loss * correction(old, batch.sampler_logps, batch.loss_mask)
    return loss * batch.extras["distillation_weight"][:, None]


def _distillation_metrics(scores: Scores, batch: Batch, *, correction) -> Scores:
    metrics = dict(ratio_metrics(scores, batch, correction))
    if "divergence" in scores:
        metrics["teacher/kl"] = scores["divergence"]
    return metrics


def _plain_policy_gradient(scores, batch):
    return losses.clipped_policy_gradient(
        scores["logps"], old_logps(scores, batch), batch.advantages
    )
