"""The jitted programs of a step: scoring a batch, and one optimizer update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post.errors import InputError
from jaxrl_post.models.experts import balance_loss
from jaxrl_post.models.memory import on_device
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.batch import Batch, split_batch
from jaxrl_post.recipes.grpo import sampled_logps
from jaxrl_post.recipes.recipe import Recipe, Term
from jaxrl_post.sharding import batch_shards, shard_batch
from jaxrl_post.training.accumulation import (
    accumulate,
    count_parts,
    sanitise,
    shards_of,
)
from jaxrl_post.training.forward import (
    compute_loss,
    compute_scores,
    expert_load,
    scores_of,
    see,
)
from jaxrl_post.training.loss import (
    Metrics,
    effective_samples,
    loss_metrics,
    loss_shares,
    mean_or_one,
    token_losses,
    with_share,
    with_weights,
)
from jaxrl_post.training.offload import LayoutKeepingJit, put_back
from jaxrl_post.training.spikes import is_spike, remember
from jaxrl_post.training.state import TrainState, merge_params
from jaxrl_post.transforms import ScaleByInformationState

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
    spike_deviations: float | None = None,
    router_aux_loss_coef: float = 0.0,
) -> UpdateStep:
    """One optimizer update as a jitted function of state and batch.

    ``update(state, batch) -> (state, metrics)``. The state is donated. Gradients are
    accumulated over micro-batches with the denominators of the whole batch, so that
    cutting a batch changes memory and not the mathematics. An update whose loss,
    gradient or information gain is not finite changes nothing but the counters.

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
      spike_deviations: updates with a gradient norm so far above the `TrainState.norms`
        are skipped as well, see `spikes`; the state needs a window of them.
      router_aux_loss_coef: weight of the `experts.balance_loss`, a further summand of
        the loss, over all tokens of contexts and responses. A batch that is cut has its
        experts' choices counted first, in a forward pass more.

    Returns:
      The function. Its metrics are device scalars: ``loss``, ``loss/<term>`` and
      ``loss/router`` where there are several, ``grad_norm`` (before clipping),
      ``entropy`` and the terms' own.

    Raises:
      InputError: there is a `router_aux_loss_coef` and no router; when first called,
        if one sequence exceeds `micro_batch_tokens`.
    """
    del rules  # the state brings its shardings along
    optimizer = optax.with_extra_args_support(optimizer)
    balanced = router_aux_loss_coef > 0
    if balanced and policy.routing is None:
        raise InputError(
            f"model.router_aux_loss_coef={router_aux_loss_coef:g}: the model has no "
            "experts to balance; leave it at 0."
        )

    def loss_fn(trainable, state, part, load):
        params = merge_params(trainable, state.frozen)
        models = {"student": params, "teacher": params}
        for view in ("teacher", "reference"):
            if (own := getattr(state, view)) is not None:
                models[view] = merge_params(own, state.frozen)
        seen = see(policy, recipe, models, part, measured=balanced)
        options: dict[str, Any] = {
            "temperature": temperature,
            "chunk_size": chunk_size,
        }
        if recipe.tokenwise:
            given = policy, recipe, seen, part, total_of_tokens
            total, scores = compute_loss(*given, **options)
            losses, aux = [total], loss_shares(recipe, scores, part)[1]
        else:
            scores = scores_of(policy, recipe, seen, part, **options)
            losses, aux = loss_shares(recipe, scores, part)
        if seen.load is None:
            return losses, aux
        share = balance_loss(seen.load, seen.load if load is None else load)
        return with_share(losses, aux, "router", router_aux_loss_coef * share)

    def total_of_tokens(scores, batch):
        return sum(token_losses(recipe, scores, batch).values())

    def load_of_parts(state, batch):
        """The whole batch's, where no part sees it all."""
        if not balanced or count_parts(batch, micro_batch_tokens, mesh) == 1:
            return None
        params = merge_params(state.trainable, state.frozen)
        return accumulate(
            lambda part: expert_load(policy, params, part),
            batch,
            micro_batch_tokens,
            mesh,
        )

    def grads_of(state, part, load):
        losses, pullback, aux = jax.vjp(
            lambda trainable: loss_fn(trainable, state, part, load),
            state.trainable,
            has_aux=True,
        )
        # One backward pass, unless some terms are weighted by information and some not.
        return [
            pullback([jnp.full_like(x, i == j) for j, x in enumerate(losses)])[0]
            for i in range(len(losses))
        ], aux

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = with_weights(recipe, sanitise(batch))
        load = load_of_parts(state, batch)
        grads, (shares, sums, spread) = accumulate(
            lambda part: grads_of(state, part, load), batch, micro_batch_tokens, mesh
        )
        # The weights of mean 1 are rho / mean(rho), and the mean is the whole batch's.
        factors = [1.0 if rho is None else 1 / mean_or_one(rho) for rho in spread]
        grads = jax.tree.map(
            lambda *parts: sum(f * g for f, g in zip(factors, parts, strict=True)),
            *grads,
        )
        shares = loss_metrics(recipe, shares, factors)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(shares["loss"])
        extra = {}
        if recipe.information is not None:
            extra["information"] = sums["information/gain"]
            good &= jnp.isfinite(sums["information/gain"].mean())
        guard, norms = {}, state.norms
        if spike_deviations is not None and norms is not None:
            spike = is_spike(norms, norm, spike_deviations)
            guard = {"update/spike": spike.astype(jnp.float32)}
            good, norms = good & ~spike, remember(norms, norm)
        before = on_device(state.opt_state)
        updates, opt_state = optimizer.update(grads, before, state.trainable, **extra)
        trainable = optax.apply_updates(state.trainable, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        new_state = state.replace(
            update=state.update + 1,
            skipped=jnp.where(good, 0, state.skipped + 1),
            norms=norms,
            trainable=keep(trainable, state.trainable),
            opt_state=put_back(keep(opt_state, before), state.opt_state),
            teacher=_teach(recipe, state, trainable, keep),
        )
        means = {name: value.mean() for name, value in sums.items()}
        metrics = {
            **shares,
            **means,
            **effective_samples(means),
            "grad_norm": norm,
            "update/skipped": 1.0 - good.astype(jnp.float32),
            **guard,
            **_modulation(recipe, sums, opt_state),
        }
        return new_state, metrics

    return _on_mesh(LayoutKeepingJit(update, mesh), mesh)


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
        parts = count_parts(batch, micro_batch_tokens, mesh)

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
        numbered = batch.replace(extras={"row": rows})
        cut = split_batch(numbered, parts, shards_of(mesh))
        logps = jax.lax.map(score_part, cut)
        order = cut.extras["row"].reshape(-1)
        return (
            jnp.zeros(batch.responses.shape)
            .at[order]
            .set(logps.reshape(batch.responses.shape))
        )

    return _on_mesh(jax.jit(score), mesh)


def _modulation(recipe: Recipe, sums, opt_state) -> Metrics:
    """What the gain made of the step, read from the transformation's own state."""
    if recipe.information is None:
        return {}
    metrics = {
        "information/negative": (sums["information/gain"].mean() < 0).astype(float)
    }
    # By its type: its fields may be names of parameters or of injected numbers too.
    found = optax.tree.get_all_with_path(opt_state, ScaleByInformationState.__name__)
    if found:  # else the caller's optimizer does not modulate
        state: Any = found[0][1]
        metrics["information/nonfinite"] = state.nonfinite
        metrics["information/multiplier"] = state.multiplier
        if state.sensitivity is not None:
            metrics["information/sensitivity"] = state.sensitivity
        metrics["information/capped"] = (
            state.multiplier >= recipe.information.max_multiplier
        ).astype(float)
    return metrics


def _teach(recipe: Recipe, state: TrainState, student: chex.ArrayTree, keep: Callable):
    """The teacher after this update; `keep` drops what a bad update brings."""
    if recipe.teacher.kind != "ema":
        return state.teacher
    due = (state.update + 1) % recipe.teacher.every == 0
    rate = jnp.where(due, recipe.teacher.rate, 0.0)
    before = on_device(state.teacher)
    after = jax.tree.map(
        lambda t, s: t + rate.astype(t.dtype) * (s.astype(t.dtype) - t),
        before,
        student,
    )
    return put_back(keep(after, before), state.teacher)


def _on_mesh(program: Callable, mesh: jax.sharding.Mesh | None) -> Callable:
    """The program under `jax.set_mesh`, its batches spread over the mesh."""
    if mesh is None:
        return program

    @functools.wraps(program)
    def run(state, batch):
        with jax.set_mesh(mesh):
            return program(state, shard_batch(_even(batch, mesh), mesh))

    return run


def _even(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The batch with as many teacher contexts as the mesh can split.

    Sequences name theirs by number, so there may be more than are named.
    """
    if batch.teacher_contexts is None or batch.teacher_index is None:
        return batch
    missing = -batch.teacher_contexts.shape[0] % batch_shards(mesh)
    if not missing:
        return batch
    names = ("teacher_contexts", "teacher_context_mask")
    return batch.replace(
        **{
            name: np.pad(getattr(batch, name), ((0, missing), (0, 0)), mode="edge")
            for name in names
        }
    )
