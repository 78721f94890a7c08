"""From a batch to numbers per token: hidden states, then one vocabulary pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_post import vocabulary
from jaxrl_post.models.experts import Load
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.batch import Array, Batch, each_token
from jaxrl_post.recipes.recipe import Recipe, Scores, Views


def predicting_states(
    policy: Policy,
    params: chex.ArrayTree,
    contexts: Array,
    context_mask: Array,
    index: Array | None,
    responses: Array,
    token_mask: Array,
) -> jax.Array:
    """The hidden states whose logits predict each response token.

    Contexts are computed once each, and their keys and values shared by the sequences
    behind them. Token 0 is predicted by its context's last real token.

    Args:
      policy: the model.
      params: its parameters.
      contexts, context_mask: ``[C, S]``; padding on either side.
      index: ``[B]`` context of each sequence, or None: see `Batch.context_index`.
      responses, token_mask: ``[B, T]``.

    Returns:
      ``[B, T, D]``.
    """
    arrays = contexts, context_mask, index, responses, token_mask
    return _run(policy, policy.hidden, params, *arrays)[0]


def expert_load(policy: Policy, params: chex.ArrayTree, batch: Batch) -> Load:
    """What the routers do with a batch, summed over its tokens and the layers.

    A context counts once for each sequence behind it, as if it stood before each of
    them; padding and filler sequences do not count.
    """
    behind = _contexts_of("student", batch)
    arrays = *behind, batch.responses, batch.token_mask
    return _total(batch, *_run(policy, policy.routing, params, *arrays)[1])


def _run(
    policy, run, params, contexts, context_mask, index, responses, token_mask
) -> tuple[jax.Array, tuple[Load, ...]]:
    """`predicting_states`, and what `run` says besides of contexts and responses."""
    contexts, responses = jnp.asarray(contexts), jnp.asarray(responses)
    size, time = responses.shape
    rows, width = contexts.shape
    segments = jnp.asarray(context_mask, jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    states, cache, *of_contexts = run(
        params, contexts, positions, segments, policy.init_cache(rows, width)
    )
    assert cache is not None
    last = width - 1 - jnp.argmax(segments[:, ::-1], axis=1)
    last_state = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    lengths = segments.sum(axis=1)
    if index is None:
        lengths, last_state = (
            jnp.repeat(x, size // rows, axis=0) for x in (lengths, last_state)
        )
    else:
        index = jnp.asarray(index)
        lengths, last_state = lengths[index], last_state[index]

    segments = jnp.asarray(token_mask, jnp.int32)
    positions = lengths[:, None] + jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    own = policy.init_cache(size, time).replace(prefix=cache.as_prefix(index))
    states, _, *of_responses = run(params, responses, positions, segments, own)
    states = jnp.concatenate([last_state[:, None], states[:, :-1]], axis=1)
    return states, (*of_contexts, *of_responses)


def _total(batch: Batch, of_contexts: Load, of_responses: Load) -> Load:
    sequences = jnp.asarray(batch.sequence_mask, of_contexts.tokens.dtype)
    rows = len(batch.contexts)
    if batch.context_index is None:
        behind = sequences.reshape(rows, -1).sum(1)
    else:
        behind = jnp.zeros(rows, sequences.dtype).at[batch.context_index].add(sequences)

    def total(contexts, responses):
        of_rows = jnp.einsum("lb...,b->...", contexts, behind)
        return of_rows + jnp.einsum("lb...,b->...", responses, sequences)

    return jax.tree.map(total, of_contexts, of_responses)


_LIVE_TEACHER = "live teacher"
"""The student in the teacher's place, the other half of a trust region."""


class Seen(NamedTuple):
    """A batch as the models of a recipe see it, before the vocabulary.

    Attributes:
      views: whose they are, the student first.
      states, heads: of each view the predicting states and the unembedding.
      load: of the student's experts, where it was asked for.
    """

    views: Sequence[str]
    states: Sequence[jax.Array]
    heads: Sequence[jax.Array]
    load: Load | None = None


def compute_scores(
    policy: Policy,
    recipe: Recipe,
    models: Mapping[str, chex.ArrayTree],
    batch: Batch,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_size: int | None = None,
) -> Scores:
    """What the recipe's terms ask for, ``[B, T]`` each, in one vocabulary pass.

    Args:
      policy: the model.
      recipe: its terms say which numbers, and whose logits they come from.
      models: parameters by view: "student" and what `Recipe.needs` names. Only the
        student's carry a gradient.
      batch: what to score.
      temperature: of the rollouts; divides all logits.
      chunk_size: tokens per chunk of the vocabulary pass.
    """
    seen = see(policy, recipe, models, batch)
    return scores_of(
        policy, recipe, seen, batch, temperature=temperature, chunk_size=chunk_size
    )


def scores_of(
    policy: Policy, recipe: Recipe, seen: Seen, batch: Batch, **options: Any
) -> Scores:
    """`compute_scores` of what was `seen`; `options` are its keyword arguments."""
    return vocabulary.map_logits(
        partial(_score_chunk, recipe, seen.views),
        seen.states,
        seen.heads,
        batch.responses,
        mask=jnp.asarray(batch.token_mask),
        softcap=policy.logit_softcap,
        vocab_size=policy.vocab_size,
        **options,
    )


def compute_loss(
    policy: Policy,
    recipe: Recipe,
    seen: Seen,
    batch: Batch,
    loss: Callable[[Scores, Batch], jax.Array],
    **options: Any,
) -> tuple[jax.Array, Scores]:
    """The sum of a loss of single tokens, whose gradient no logits are computed for
    twice.

    Args:
      policy, recipe, seen, batch, options: as in `scores_of`.
      loss: ``loss(scores, batch)``, ``[n, 1]`` for n sequences of one token; it gets
        the batch as `each_token` makes it.

    Returns:
      The sum, and the scores of `compute_scores`, which carry no gradient.
    """
    tokens, sequences = each_token(batch)

    def loss_of_chunk(*args):
        *logits, tokens = args
        rows = sequences(tokens)
        scores = _score_chunk(recipe, seen.views, *logits, tokens.responses)
        of_rows = {name: score[:, None] for name, score in scores.items()}
        return loss(of_rows, rows)[:, 0], scores

    return vocabulary.sum_logits(
        loss_of_chunk,
        seen.states,
        seen.heads,
        tokens,
        mask=jnp.asarray(batch.token_mask),
        softcap=policy.logit_softcap,
        vocab_size=policy.vocab_size,
        **options,
    )


def see(
    policy: Policy,
    recipe: Recipe,
    models: Mapping[str, chex.ArrayTree],
    batch: Batch,
    *,
    measured: bool = False,
) -> Seen:
    """The hidden states of all views that a recipe needs.

    Args:
      policy, recipe, models, batch: as in `compute_scores`.
      measured: with the load of the student's experts.
    """
    views = ("student", *sorted(recipe.needs))
    if "teacher" in views and recipe.teacher.kind == "trust_region":
        views = (*views, _LIVE_TEACHER)
    states, heads = [], []
    load = None
    for view in views:
        params = models["student" if view == _LIVE_TEACHER else view]
        if view != "student":
            params = jax.lax.stop_gradient(params)
        run = policy.routing if measured and view == "student" else policy.hidden
        arrays = *_contexts_of(view, batch), batch.responses, batch.token_mask
        own, loads = _run(policy, run, params, *arrays)
        if loads:
            load = _total(batch, *loads)
        states.append(own)
        heads.append(policy.unembedding(params))
    return Seen(views, states, heads, load)


def _score_chunk(recipe: Recipe, views: Sequence[str], *args) -> Scores:
    """What a recipe asks for of a chunk: the logits of each view, then the tokens."""
    *logits, tokens = args
    by_view = dict(zip(views, logits, strict=True))
    if _LIVE_TEACHER in views:
        live = by_view.pop(_LIVE_TEACHER)
        by_view["teacher"] = by_view["teacher"].mix(live, recipe.teacher.rate)
    seen = Views(tokens=tokens, **by_view)
    scores: dict[str, jax.Array] = {}
    for term in recipe.terms:
        scores |= term.scores(seen)
    of_view = {"entropy": seen.student, "teacher_entropy": seen.teacher}
    for name in sorted(recipe.entropies - scores.keys()):
        if (of := of_view.get(name)) is None:
            raise ValueError(
                f"Recipe {recipe.name!r}: the information reads {name!r}, a score "
                f"that no term computes; there are {sorted(scores)}."
            )
        # Measured, not trained on.
        scores[name] = jax.lax.stop_gradient(of.entropy())
    return scores


def _contexts_of(view: str, batch: Batch) -> tuple[Array, Array, Array | None]:
    """What a view sees before the responses: contexts, their mask and the index."""
    if view not in ("teacher", _LIVE_TEACHER):
        return batch.contexts, batch.context_mask, batch.context_index
    contexts, mask = batch.teacher_contexts, batch.teacher_context_mask
    if contexts is None or mask is None:
        raise ValueError(
            "The recipe needs the teacher, but the batch has no teacher_contexts or no "
            "teacher_context_mask; a teacher that sees what the student sees gets the "
            "batch's contexts and context_mask."
        )
    return contexts, mask, batch.teacher_index
