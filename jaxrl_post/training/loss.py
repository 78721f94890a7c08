"""A part's shares of the loss, in the denominators of the whole batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl_post.information import information_gain, local_multipliers
from jaxrl_post.recipes.batch import Batch, own_tokens
from jaxrl_post.recipes.recipe import Recipe, Scores, Term
from jaxrl_post.reduction import Reduction, token_weights

Metrics = dict[str, jax.Array]


def with_weights(recipe: Recipe, batch: Batch) -> Batch:
    """The batch with every token's weight in every term, denominators included."""
    weights = {}
    for term in recipe.terms:
        mask = batch.loss_mask if term.mask is None else term.mask(batch)
        over = mask if term.over is None else term.over(batch)
        weight, denominator = token_weights(
            over & batch.loss_mask,
            mode=term.reduction,
            sequence_mask=batch.sequence_mask,
            group_size=batch.size // batch.contexts.shape[0],
            denominator=None if term.denominator is None else term.denominator(batch),
        )
        weight = jnp.where(mask, weight, 0) / jnp.maximum(denominator, _SMALLEST)
        weights[_weights_of(term)] = weight
    return batch.replace(extras={**batch.extras, **weights})


def token_losses(recipe: Recipe, scores: Scores, part: Batch) -> Metrics:
    """What each token adds to the loss, ``[B, T]`` by name of the term."""
    rho = _local_multipliers(recipe, scores, part)
    values = {}
    for term in recipe.terms:
        weights = part.extras[_weights_of(term)]
        counted = weights != 0
        loss = jnp.where(counted, term.loss(scores, _only(part, counted)), 0.0)
        if recipe.is_weighted(term):
            loss = loss * rho
        values[term.name] = term.weight * loss * weights
    return values


def loss_shares(recipe: Recipe, scores: Scores, part: Batch):
    """The part's shares of the loss, and what metrics need of it.

    Returns:
      One share for the terms that information does not weight and one for those that
      it does, each only where there are such terms; the terms' own shares; sums behind
      metrics; and for each share None, or the mean of its weights.
    """
    sums, spread = {}, Reduction(jnp.zeros(()), jnp.zeros(()))
    rho = _local_multipliers(recipe, scores, part)
    values = token_losses(recipe, scores, part)
    shares = {name: jnp.sum(x) for name, x in values.items()}
    for term in recipe.terms:
        weights = part.extras[_weights_of(term)]
        if recipe.is_weighted(term):
            size = abs(term.weight) * weights
            spread += Reduction(jnp.sum(size * rho), jnp.sum(size))
        if term.metrics is not None:
            for name, metric in term.metrics(scores, part).items():
                sums[name] = _token_sum(metric, weights != 0)
    if recipe.log_entropy:
        logged = own_tokens(part) if recipe.rollouts else part.loss_mask
        logged = logged & part.sequence_mask[:, None]
        sums["entropy"] = _token_sum(scores["entropy"], logged)
    if recipe.information is not None:
        sums |= _information(recipe, scores, part)
    by_kind = [
        [shares[t.name] for t in recipe.terms if recipe.is_weighted(t) == weighted]
        for weighted in (False, True)
    ]
    losses = [jnp.sum(jnp.stack(kind)) for kind in by_kind if kind]
    means = [m for m, kind in zip((None, spread), by_kind, strict=True) if kind]
    return losses, jax.lax.stop_gradient((shares, sums, means))


def with_share(losses: list[jax.Array], aux: Any, name: str, share: jax.Array):
    """What `loss_shares` returns, with one more summand, which nothing weights."""
    shares, sums, means = aux
    shares = {**shares, name: jax.lax.stop_gradient(share)}
    if means[0] is None:
        return [losses[0] + share, *losses[1:]], (shares, sums, means)
    return [share, *losses], (shares, sums, [None, *means])


def loss_metrics(recipe: Recipe, shares: Metrics, factors: list[Any]) -> Metrics:
    """The loss, and its terms where there are several, with weights of mean 1."""
    weighted = factors[-1]  # the last kind's; the same for all where there is one
    by_information = {t.name for t in recipe.terms if recipe.is_weighted(t)}
    names = dict.fromkeys((*(term.name for term in recipe.terms), *shares))
    own = {
        f"loss/{name}": shares[name] * (weighted if name in by_information else 1.0)
        for name in names
    }
    loss = jnp.sum(jnp.stack(list(own.values())))
    return {"loss": loss, **(own if len(own) > 1 else {})}


def effective_samples(means: Metrics) -> Metrics:
    """``.../ess``, for importance weights of which ``.../ratio`` and
    ``.../ratio_squared`` are means: the effective share of the samples,
    ``(sum w)^2 / (n sum w^2)``; 1 where there are none.

    Source: Kish, "Survey Sampling" (1965).
    """
    found = {}
    for name, squared in means.items():
        if name.endswith("/ratio_squared"):
            stem = name.removesuffix("ratio_squared")
            share = jnp.square(means[f"{stem}ratio"]) / jnp.maximum(squared, _SMALLEST)
            found[f"{stem}ess"] = jnp.where(squared > 0, share, 1.0)
    return found


def mean_or_one(rho: Reduction) -> jax.Array:
    """The mean of weights, 1 where nothing is weighted."""
    return jnp.where(rho.total > 0, rho.mean(), 1.0)


def _only(part: Batch, counted: jax.Array) -> Batch:
    """The part as a term sees it, its own tokens being all that is trained on.

    What the sampler and the old policy say of the others, such as demonstrations, which
    neither has written, must not reach a weight of the whole sequence.
    """

    def clean(x):
        return None if x is None else jnp.where(counted, x, jnp.zeros((), x.dtype))

    return part.replace(
        loss_mask=counted,
        old_logps=clean(part.old_logps),
        sampler_logps=clean(part.sampler_logps),
    )


def _local_multipliers(recipe: Recipe, scores: Scores, part: Batch) -> ArrayLike:
    """What the losses of the terms that read the teacher are multiplied by."""
    about = recipe.information
    if about is None or about.weights == "none":
        return 1.0
    student, teacher = (scores[name] for name in about.scores)
    return local_multipliers(
        student,
        teacher,
        _information_mask(recipe, part),
        level=about.weights,
        sensitivity=about.sensitivity,
        max_multiplier=about.max_multiplier,
        min_multiplier=about.min_multiplier,
    )


def _information(recipe: Recipe, scores: Scores, part: Batch) -> dict[str, Reduction]:
    """The part's share of the information gain and of the two entropies behind it."""
    about = recipe.information
    assert about is not None
    mask = _information_mask(recipe, part)
    student, teacher = (scores[name] for name in about.scores)
    return {
        "information/gain": information_gain(
            student, teacher, mask, average=about.average
        ),
        "information/student_entropy": _token_sum(student, mask),
        "information/teacher_entropy": _token_sum(teacher, mask),
    }


def _information_mask(recipe: Recipe, part: Batch) -> jax.Array:
    """``[B, T]``, the tokens whose entropies are compared."""
    about = recipe.information
    assert about is not None
    mask = part.loss_mask if about.mask is None else about.mask(part)
    return jnp.asarray(mask & part.sequence_mask[:, None])


def _token_sum(values: jax.Array, mask: ArrayLike) -> Reduction:
    return Reduction(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=float))


def _weights_of(term: Term) -> str:
    return f"weights of {term.name}"


_SMALLEST = 1e-12
"""Keeps an empty batch's 0 / 0 at 0."""
