"""The jitted programs of a step: scoring a batch, and one optimizer update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxrl_post.errors import InputError
from jaxrl_post.information import information_gain, local_multipliers
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.batch import Batch, own_tokens, split_batch
from jaxrl_post.recipes.grpo import sampled_logps
from jaxrl_post.recipes.recipe import Recipe, Scores, Term
from jaxrl_post.reduction import Reduction, token_weights
from jaxrl_post.sharding import BATCH_AXES, shard_batch
from jaxrl_post.training.forward import compute_scores
from jaxrl_post.training.state import TrainState, merge_params

Metrics = dict[str, jax.Array]
UpdateStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_update_step(
    policy: Policy,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: Any = None,
    micro_batch_tokens: int | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
) -> UpdateStep:
    """One optimizer update as a jitted function of state and batch.

    ``update(state, batch) -> (state, metrics)``. The state is donated. Gradients are
    accumulated over micro-batches with the denominators of the whole batch, so that
    cutting a batch changes memory and not the mathematics. An update whose gradient is
    not finite changes nothing but the counters.

    Args:
      policy: the model.
      recipe: what is minimised.
      optimizer: an optax transformation; `init_state` must get the same.
      mesh: devices to run on; the state must lie on it. None: the default device.
      rules: sharding rules of the parameters, where they are not the default ones.
      micro_batch_tokens: bound on context and response tokens, padding included, of
        one forward and backward pass; None: the whole batch at once.
      chunk_size: tokens per chunk of the vocabulary pass.
      temperature: at which the batch was sampled.

    Returns:
      The function. Its metrics are device scalars: ``loss``, ``loss/<term>`` where
      there are several, ``grad_norm`` (before clipping), ``entropy`` and the terms'
      own.

    Raises:
      InputError: when first called, if one sequence exceeds `micro_batch_tokens`.
    """
    del rules  # the state brings its shardings along
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_fn(trainable, state, part):
        params = merge_params(trainable, state.frozen)
        models = {"student": params, "teacher": params}
        for view in ("teacher", "reference"):
            if (own := getattr(state, view)) is not None:
                models[view] = merge_params(own, state.frozen)
        scores = compute_scores(
            policy,
            recipe,
            models,
            part,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        return _weighted_loss(recipe, scores, part)

    def grads_of(state, part):
        losses, pullback, aux = jax.vjp(
            lambda trainable: loss_fn(trainable, state, part),
            state.trainable,
            has_aux=True,
        )
        # One backward pass, unless some terms are weighted by information and some not.
        return [
            pullback([jnp.ones(()) * (i == j) for j in range(len(losses))])[0]
            for i in range(len(losses))
        ], aux

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = _with_weights(recipe, _sanitise(batch))
        grads, (shares, sums, spread) = _accumulate(
            lambda part: grads_of(state, part), batch, micro_batch_tokens, mesh
        )
        # The weights of mean 1 are rho / mean(rho), and the mean is the whole batch's.
        factors = [1.0 if rho is None else 1 / _mean_or_one(rho) for rho in spread]
        grads = jax.tree.map(
            lambda *parts: sum(f * g for f, g in zip(factors, parts, strict=True)),
            *grads,
        )
        shares = _loss_metrics(recipe, shares, factors)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        extra = {}
        if recipe.information is not None:
            extra["information"] = sums["information/gain"]
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.trainable, **extra
        )
        trainable = optax.apply_updates(state.trainable, updates)
        teacher = _teach(recipe, state, trainable)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = state.replace(
            update=state.update + 1,
            skipped=jnp.where(finite, 0, state.skipped + 1),
            trainable=keep(trainable, state.trainable),
            opt_state=keep(opt_state, state.opt_state),
            teacher=keep(teacher, state.teacher),
        )
        metrics = {
            **shares,
            **{name: value.mean() for name, value in sums.items()},
            "grad_norm": norm,
            "update/skipped": 1.0 - finite.astype(jnp.float32),
            **_modulation(recipe, sums, opt_state),
        }
        return new_state, metrics

    return _on_mesh(jax.jit(update, donate_argnums=0), mesh)


def make_score_step(
    policy: Policy,
    *,
    mesh: jax.sharding.Mesh | None = None,
    micro_batch_tokens: int | None = None,
    chunk_size: int | None = None,
    temperature: float = 1.0,
) -> Callable[[chex.ArrayTree, Batch], jax.Array]:
    """The policy's log-probs of a batch's responses, ``score(params, batch)``.

    They are the `Batch.old_logps` of a batch that is used for several updates.

    Args: as in `make_update_step`.

    Returns:
      A jitted function that returns ``[B, T]`` float32, 0 at masked tokens.
    """
    only_logps = Recipe(
        "score",
        (Term("score", scores=sampled_logps, loss=lambda s, b: s["logps"]),),
        log_entropy=False,
    )

    def score(params, batch):
        batch = batch.replace(old_logps=None, sampler_logps=None)
        parts = _parts(batch, micro_batch_tokens, mesh)

        def score_part(part):
            return compute_scores(
                policy,
                only_logps,
                {"student": params},
                part,
                temperature=temperature,
                chunk_size=chunk_size,
            )["logps"]

        if parts == 1:
            return score_part(batch)
        rows = jnp.arange(batch.size)
        cut = split_batch(batch.replace(extras={"row": rows}), parts)
        logps = jax.lax.map(score_part, cut)
        order = cut.extras["row"].reshape(-1)
        return (
            jnp.zeros(batch.responses.shape)
            .at[order]
            .set(logps.reshape(batch.responses.shape))
        )

    return _on_mesh(jax.jit(score), mesh)


def _weighted_loss(recipe: Recipe, scores: Scores, part: Batch):
    """The part's shares of the loss, and what metrics need of it.

    Returns:
      One share for the terms that information does not weight and one for those that
      it does, each only where there are such terms; the terms' own shares; sums behind
      metrics; and for each share None, or the mean of its weights.
    """
    shares, sums, spread = {}, {}, Reduction(jnp.zeros(()), jnp.zeros(()))
    rho = _local_multipliers(recipe, scores, part)
    for term in recipe.terms:
        weights = part.extras[_weights_of(term)]
        counted = weights != 0
        values = jnp.where(counted, term.loss(scores, part), 0.0)
        if recipe.is_weighted(term):
            size = abs(term.weight) * weights
            spread += Reduction(jnp.sum(size * rho), jnp.sum(size))
            values = values * rho
        shares[term.name] = term.weight * jnp.sum(values * weights)
        if term.metrics is not None:
            for name, metric in term.metrics(scores, part).items():
                sums[name] = _token_sum(metric, counted)
    if recipe.log_entropy:
        own = own_tokens(part) & part.sequence_mask[:, None]
        sums["entropy"] = _token_sum(scores["entropy"], own)
    if recipe.information is not None:
        sums |= _information(recipe, scores, part)
    by_kind = [
        [shares[t.name] for t in recipe.terms if recipe.is_weighted(t) == weighted]
        for weighted in (False, True)
    ]
    losses = [jnp.sum(jnp.stack(kind)) for kind in by_kind if kind]
    means = [m for m, kind in zip((None, spread), by_kind, strict=True) if kind]
    return losses, jax.lax.stop_gradient((shares, sums, means))


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


def _mean_or_one(rho: Reduction) -> jax.Array:
    """The mean of weights, 1 where nothing is weighted."""
    return jnp.where(rho.total > 0, rho.mean(), 1.0)


def _loss_metrics(recipe: Recipe, shares: Metrics, factors: list[Any]) -> Metrics:
    """The loss, and its terms where there are several, with weights of mean 1."""
    weighted = factors[-1]  # the last kind's; the same for all where there is one
    own = {
        f"loss/{term.name}": shares[term.name]
        * (weighted if recipe.is_weighted(term) else 1.0)
        for term in recipe.terms
    }
    loss = jnp.sum(jnp.stack(list(own.values())))
    return {"loss": loss, **(own if len(own) > 1 else {})}


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


def _modulation(recipe: Recipe, sums, opt_state) -> Metrics:
    """What the gain made of the step, read from the transformation's own state."""
    if recipe.information is None:
        return {}
    metrics = {
        "information/negative": (sums["information/gain"].mean() < 0).astype(float)
    }
    multiplier = optax.tree.get(opt_state, "multiplier")
    if multiplier is not None:  # else the caller's optimizer does not modulate
        metrics["information/nonfinite"] = optax.tree.get(opt_state, "nonfinite")
        metrics["information/multiplier"] = multiplier
        if (alpha := optax.tree.get(opt_state, "sensitivity")) is not None:
            metrics["information/sensitivity"] = alpha
        metrics["information/capped"] = (
            multiplier >= recipe.information.max_multiplier
        ).astype(float)
    return metrics


def _token_sum(values: jax.Array, mask: ArrayLike) -> Reduction:
    return Reduction(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=float))


def _accumulate(
    fn: Callable[[Batch], Any],
    batch: Batch,
    micro_batch_tokens: int | None,
    mesh: jax.sharding.Mesh | None,
) -> Any:
    """The sum of `fn` over the batch's parts, in at least float32."""
    parts = _parts(batch, micro_batch_tokens, mesh)
    if parts == 1:
        return fn(batch)

    def wide(part):
        return jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), fn(part)
        )

    def body(total, part):
        return jax.tree.map(jnp.add, total, wide(part)), None

    cut = split_batch(batch, parts)
    shapes = jax.eval_shape(wide, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, cut)[0]


def _parts(batch: Batch, bound: int | None, mesh: jax.sharding.Mesh | None) -> int:
    """The fewest equal parts whose tokens stay within the bound.

    Whole groups share their contexts; parts that cut groups carry one context for each
    sequence, which counts.
    """
    if bound is None:
        return 1
    size, groups = batch.size, batch.contexts.shape[0]
    shards = 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH_AXES)
    responses = batch.responses.size
    shared = batch.contexts.size
    spread = size * batch.contexts.shape[1]
    if batch.teacher_contexts is not None:
        responses += batch.responses.size
        shared += batch.teacher_contexts.size
        spread += size * batch.teacher_contexts.shape[1]
    for parts in range(1, size + 1):
        if size % parts or (size // parts) % shards:
            continue
        whole = batch.context_index is None and groups % parts == 0
        if (responses + (shared if whole else spread)) / parts <= bound:
            return parts
    least = (responses + spread) * shards // size
    raise InputError(
        f"training.micro_batch_tokens={bound} is below the {least} tokens of the "
        f"smallest part ({shards} sequence(s), context and padding included); raise it."
    )


def _sanitise(batch: Batch) -> Batch:
    """Zeros for all garbage that a mask excludes: `where` afterwards keeps its NaN."""
    token_mask = jnp.asarray(batch.token_mask) & batch.sequence_mask[:, None]
    loss_mask = jnp.asarray(batch.loss_mask) & token_mask

    def clean(x):
        if x is None:
            return None
        mask = loss_mask if x.ndim == 2 else jnp.asarray(batch.sequence_mask)
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    names = ("advantages", "old_logps", "sampler_logps", "is_teacher")
    return batch.replace(
        responses=jnp.where(token_mask, batch.responses, 0),
        token_mask=token_mask,
        loss_mask=loss_mask,
        **{name: clean(getattr(batch, name)) for name in names},
    )


def _weights_of(term: Term) -> str:
    return f"weights of {term.name}"


def _with_weights(recipe: Recipe, batch: Batch) -> Batch:
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


_SMALLEST = 1e-12
"""Keeps an empty batch's 0 / 0 at 0."""


def _teach(recipe: Recipe, state: TrainState, student: chex.ArrayTree):
    """The teacher after this update."""
    if recipe.teacher.kind != "ema":
        return state.teacher
    due = (state.update + 1) % recipe.teacher.every == 0
    rate = jnp.where(due, recipe.teacher.rate, 0.0)
    return jax.tree.map(
        lambda t, s: t + rate.astype(t.dtype) * (s.astype(t.dtype) - t),
        state.teacher,
        student,
    )


def _on_mesh(program: Callable, mesh: jax.sharding.Mesh | None) -> Callable:
    """The program under `jax.set_mesh`, its batches spread over the mesh."""
    if mesh is None:
        return program

    @functools.wraps(program)
    def run(state, batch):
        with jax.set_mesh(mesh):
            return program(state, shard_batch(batch, mesh))

    return run
