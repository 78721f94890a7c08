"""Demonstrations beside rollouts: HAPO, LUFFY, SRFT, replaced rollouts, and SFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_post import losses
from jaxrl_post.numerics import check_number
from jaxrl_post.recipes.batch import Batch, demonstrated_tokens, own_tokens
from jaxrl_post.recipes.grpo import entropy, grpo, sampled_logps
from jaxrl_post.recipes.injection import Injection
from jaxrl_post.recipes.prefix import PrefixSchedule
from jaxrl_post.recipes.recipe import Recipe, Scores, Term, Views, weighted

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "luffy": {
        # The released script, with which the reported numbers were made: advantages
        # are centred only, the sum is divided by the padded response length.
        "released": {"scale": "none", "reduction": "padded_length"},
        "paper": {"scale": "std", "entropy_weight": 0.01},
    },
    "srft": {"released": {"entropy_sign": 1.0}, "paper": {"entropy_sign": -1.0}},
    "hapo": {
        # LUFFY's script under HAPO's gate; it contradicts HAPO's Eqs. 2, 3 and 8.
        "luffy_script": {
            "scale": "none",
            "clip_low": None,
            "clip_high": None,
            "reduction": "padded_length",
            "teacher_weight": "advantage",
            "entropy_weight": 0.001,
        },
        "paper": {},
    },
}
"""Arguments by recipe, where what was released and what was written differ."""

Weight = Literal["unit", "advantage", "doubt"]
_WEIGHTS = ("unit", "advantage", "doubt")


def hapo(
    *,
    threshold: float | Mapping[str, Any] = 0.8,
    gate: Literal["mean", "thompson"] = "mean",
    teacher_weight: Weight = "unit",
    gamma: float = 0.1,
    tie: Literal["first", "random"] = "first",
    success_threshold: float = 1.0,
    replace_successes: bool = False,
    posterior_discount: float | None = None,
    prefix: Mapping[str, Any] | PrefixSchedule | None = None,
    **arguments: Any,
) -> Recipe:
    """GRPO that puts a demonstration where confidence is low (HAPO, arXiv 2603.11321).

    In a group whose confidence is below the threshold the worst rollout gives way to
    the prompt's verified demonstration (Synthetic Success Injection, see `Injection`).
    Over all tokens of the batch, demonstrations included (Eqs. 8 and 9)::

        loss = mean of  CLIP(r, A, eps) on own tokens,  w F(p) on the demonstrations'

    with ``F(p) = -p / (p + gamma)``, LUFFY's shaping: the paper says that it uses the
    same operator, and that it is based on the confidence c, but gives neither its
    formula nor gamma. No KL term.

    Args:
      threshold: gamma of the gate: a number, or the fields of a
        `thresholds.ThresholdSchedule`.
      gate: "mean", the paper's; "thompson", a draw from the posterior, is not in it.
      teacher_weight: w: "unit", 1, which is Eq. 9 as written; "advantage", A of the
        demonstration, as LUFFY's code has it; "doubt", 1 - c.
      gamma: of F; the paper does not say.
      tie, success_threshold, replace_successes: see `Injection`.
      posterior_discount: lets the posterior remember earlier visits of a prompt, see
        `injection.update_posterior`. Not in the paper; None is the paper's gate.
      prefix: the fields of a `PrefixSchedule`, for demonstrations that the policy
        completes. Not in the paper.
      **arguments: of `grpo`, whose defaults are HAPO's: clip 0.2, population std.

    Raises:
      ValueError: for arguments that contradict each other.

    >>> print(hapo(posterior_discount=0.9))
    hapo
      1 x policy_gradient (token_mean)
      1 x imitation (token_mean)
      groups: the demonstration in place of the worst rollout, where c < 0.8
      posteriors: kept, discount 0.9
    """
    injection = Injection(
        threshold=threshold,
        gate=gate,
        tie=tie,
        success_threshold=success_threshold,
        replace_successes=replace_successes,
    )
    terms = (_imitation("imitation", "shaped", teacher_weight, gamma),)
    recipe = _mixed("hapo", terms, injection, prefix, arguments)
    return replace(recipe, posterior_discount=posterior_discount)


def luffy(
    *,
    gamma: float = 0.1,
    shaping: Literal["shaped", "ratio"] = "shaped",
    prefix: Mapping[str, Any] | PrefixSchedule | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    scale: Literal["std", "none", "batch"] = "none",
    entropy_weight: float = 0.001,
    **arguments: Any,
) -> Recipe:
    """Mixed-policy GRPO with one demonstration in every group (arXiv 2504.14945).

    The demonstration takes the place of the last rollout of each group; advantages are
    of the whole group. Its tokens have the loss ``-A p / (p + gamma)``, the policy's
    own ``-A r``, without a clip. Presets: "released", the script that the reported
    results came from; "paper".

    Differs from the released code in that the group's last rollout is sampled and
    dropped, instead of one less being sampled, so that groups without a demonstration
    stay whole.

    Args:
      gamma: of the shaping.
      shaping: "shaped"; "ratio", plain p, the importance ratio to a demonstrator whose
        probability is taken for 1.
      prefix: the fields of a `PrefixSchedule`: a demonstration's beginning is given,
        the policy goes on.
      clip_low, clip_high, scale, entropy_weight: of `grpo`; their defaults are the
        released script's (its entropy is a mean per micro-batch, summed over them).
      **arguments: of `grpo`. Its `reduction` may be "padded_length" here, a sum divided
        by `max_length`.

    >>> print(luffy(entropy_weight=0.0))
    luffy
      1 x policy_gradient (token_mean)
      1 x imitation (token_mean)
      groups: the demonstration in place of the last rollout
    """
    if shaping not in ("shaped", "ratio"):
        raise ValueError(f"shaping={shaping!r}; it is one of shaped, ratio.")
    arguments |= {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "scale": scale,
        "entropy_weight": entropy_weight,
    }
    terms = (_imitation("imitation", shaping, "advantage", gamma),)
    return _mixed("luffy", terms, _ALWAYS, prefix, arguments)


def srft(
    *,
    sft_weight: float = 0.5,
    entropy_sign: float = -1.0,
    positive_weight: float = 0.1,
    gamma: float = 0.1,
    clip_low: float | None = None,
    clip_high: float | None = None,
    scale: Literal["std", "none", "batch"] = "none",
    entropy_weight: float = 0.001,
    **arguments: Any,
) -> Recipe:
    """Supervised and reinforcement learning in one step (SRFT, arXiv 2506.19767).

    On LUFFY's batch, H being the policy's entropy at a token, without gradient::

        demonstration:  -sft_weight exp(entropy_sign H) log p  -  A p / (p + gamma)
        own rollouts:   -positive_weight exp(H) A r where A > 0,  -A r elsewhere

    Args:
      sft_weight: of the supervised term.
      entropy_sign: -1 as in the paper, preset "paper"; +1 as in the released code,
        preset "released".
      positive_weight: of own tokens whose advantage is positive.
      gamma: of LUFFY's shaping.
      clip_low, clip_high, scale, entropy_weight: of `grpo`, LUFFY's defaults.
      **arguments: of `grpo`.

    >>> print(srft(entropy_weight=0.0))
    srft
      1 x policy_gradient (token_mean)
      1 x imitation (token_mean)
      0.5 x sft (token_mean)
      groups: the demonstration in place of the last rollout
    """
    if entropy_sign not in (-1, 1):
        raise ValueError(f"entropy_sign={entropy_sign}; it is -1 (paper) or 1 (code).")
    arguments |= {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "scale": scale,
        "entropy_weight": entropy_weight,
    }
    supervised = replace(
        _imitation("sft", "likelihood", "unit"),
        scores=_logps_and_entropy,
        loss=partial(_sure_likelihood, sign=entropy_sign),
        weight=sft_weight,
    )
    terms = (_imitation("imitation", "shaped", "advantage", gamma), supervised)
    recipe = _mixed("srft", terms, _ALWAYS, None, arguments)
    policy_gradient, *others = recipe.terms
    policy_gradient = replace(
        policy_gradient,
        scores=_logps_and_entropy,
        loss=partial(
            _boosted, loss=policy_gradient.loss, positive_weight=positive_weight
        ),
    )
    return replace(recipe, terms=(policy_gradient, *others))


def replace_sft(*, sft_weight: float = 1.0, **arguments: Any) -> Recipe:
    """GRPO in whose groups one rollout is a demonstration with the plain SFT loss.

    What HAPO (arXiv 2603.11321) describes as its SRFT baseline, without a formula; the
    method of that name is `srft`.

    Args:
      sft_weight: of ``-log p`` on the demonstration; the paper does not say.
      **arguments: of `grpo`.

    >>> print(replace_sft())
    replace_sft
      1 x policy_gradient (token_mean)
      1 x sft (token_mean)
      groups: the demonstration in place of the last rollout
    """
    term = replace(_imitation("sft", "likelihood", "unit"), weight=sft_weight)
    return _mixed("replace_sft", (term,), _ALWAYS, None, arguments)


def sft(*, reduction: str = "token_mean", log_entropy: bool = True) -> Recipe:
    """Supervised fine-tuning on the task's verified demonstrations; nothing is sampled.

    A group is a prompt's demonstration alone, so `training.group_size` is 1.

    Args:
      reduction: mode of `losses.reduce`.
      log_entropy: log the policy's entropy on the demonstrations.

    >>> print(sft())
    sft
      1 x sft (token_mean)
      groups: the demonstration alone, nothing is sampled
    """
    return Recipe(
        "sft",
        (
            Term(
                "sft",
                scores=sampled_logps,
                loss=lambda scores, batch: losses.negative_log_likelihood(
                    scores["logps"]
                ),
                reduction=reduction,
                tokenwise=True,
            ),
        ),
        demonstrations=True,
        rollouts=False,
        max_sampling_rounds=100,  # prompts without a demonstration are passed over
        log_entropy=log_entropy,
    )


_ALWAYS = Injection(gate="always", position="last", replace_successes=True)


def _mixed(
    name: str,
    terms: tuple[Term, ...],
    injection: Injection,
    prefix: Mapping[str, Any] | PrefixSchedule | None,
    arguments: Mapping[str, Any],
) -> Recipe:
    """GRPO on own tokens, `terms` on demonstrations, one mean over both."""
    padded = arguments.get("reduction") == "padded_length"
    base = grpo(**{**arguments, **({"reduction": "constant"} if padded else {})})
    by_name = {term.name: term for term in base.terms}
    # The bonus is a mean over everybody's tokens, in LUFFY's script too.
    bonus = by_name.pop("entropy_bonus", None)
    shared: dict[str, Any] = {"over": _trained_tokens}
    if padded:
        shared["denominator"] = partial(_constant, value=arguments["max_length"])
    own = [replace(term, mask=own_tokens, **shared) for term in by_name.values()]
    shared = {"denominator": own[0].denominator} | shared
    given = [replace(term, reduction=own[0].reduction, **shared) for term in terms]
    if bonus is not None and padded:
        bonus = replace(bonus, reduction="token_mean", denominator=None)
    return replace(
        base,
        name=name,
        terms=weighted(*own[:1], *given, *own[1:], *([bonus] if bonus else [])),
        group_transforms=(injection, *base.group_transforms),
        demonstrations=True,
        prefix=PrefixSchedule(**prefix) if isinstance(prefix, Mapping) else prefix,
    )


def _imitation(name: str, form: str, weight: str, gamma: float = 0.1) -> Term:
    check_number("gamma", gamma, 0, open_low=True)
    if weight not in _WEIGHTS:
        raise ValueError(
            f"teacher_weight={weight!r}; it is one of {', '.join(_WEIGHTS)}."
        )
    return Term(
        name,
        scores=sampled_logps,
        loss=partial(_imitation_loss, form=form, weight=weight, gamma=gamma),
        mask=demonstrated_tokens,
        metrics=lambda scores, batch: {"demonstration/logp": scores["logps"]},
        tokenwise=True,
        off_policy=True,
    )


def _trained_tokens(batch: Batch) -> jax.Array:
    return jnp.asarray(batch.loss_mask)


def _constant(batch: Batch, *, value: float) -> jax.Array:
    del batch
    return jnp.asarray(value, jnp.float32)


def _imitation_loss(scores, batch, *, form, weight, gamma):
    logps = scores["logps"]
    if form == "shaped":
        loss = losses.shaped_imitation(logps, gamma=gamma)
    elif form == "ratio":
        loss = -jnp.exp(logps)
    else:
        loss = losses.negative_log_likelihood(logps)
    if weight == "advantage":
        advantages = jnp.asarray(batch.advantages)
        loss = loss * (advantages[:, None] if advantages.ndim == 1 else advantages)
    elif weight == "doubt":
        loss = loss * (1 - batch.extras["confidence"][:, None])
    return loss


def _logps_and_entropy(views: Views) -> Scores:
    return {**sampled_logps(views), **entropy(views)}


def _sure_likelihood(scores, batch, *, sign):
    del batch
    weight = jnp.exp(sign * jax.lax.stop_gradient(scores["entropy"]))
    return weight * losses.negative_log_likelihood(scores["logps"])


def _boosted(scores, batch, *, loss, positive_weight):
    weight = positive_weight * jnp.exp(jax.lax.stop_gradient(scores["entropy"]))
    positive = jnp.asarray(batch.advantages) > 0
    positive = positive[:, None] if positive.ndim == 1 else positive
    values = loss(scores, batch)
    return jnp.where(positive, weight * values, values)
