"""Batches cut into parts that fit, and what is summed over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post.errors import InputError
from jaxrl_post.recipes.batch import Batch, keeps_groups, split_batch
from jaxrl_post.sharding import BATCH_AXES


def sanitise(batch: Batch) -> Batch:
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


def accumulate(
    fn: Callable[[Batch], Any],
    batch: Batch,
    micro_batch_tokens: int | None,
    mesh: jax.sharding.Mesh | None,
) -> Any:
    """The sum of `fn` over the batch's parts, in at least float32."""
    parts = count_parts(batch, micro_batch_tokens, mesh)
    if parts == 1:
        return fn(batch)

    def wide(part):
        return jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), fn(part)
        )

    def body(total, part):
        return jax.tree.map(jnp.add, total, wide(part)), None

    cut = split_batch(batch, parts, shards_of(mesh))
    shapes = jax.eval_shape(wide, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, cut)[0]


def count_parts(batch: Batch, bound: int | None, mesh: jax.sharding.Mesh | None) -> int:
    """The fewest equal parts whose tokens stay within the bound.

    Whole groups share their contexts; parts that cut groups carry one context for each
    sequence, which counts.
    """
    if bound is None:
        return 1
    for parts, tokens in _cuts(batch, mesh):
        if tokens <= bound:
            return parts
    least = smallest_part(batch, mesh)
    shards = shards_of(mesh)
    raise InputError(
        f"training.micro_batch_tokens={bound} is below the {least} tokens of the "
        f"smallest part ({shards} sequence(s), context and padding included); raise it"
        f", or training.micro_batch_tokens_per_shard to {math.ceil(least / shards)}."
    )


def smallest_part(batch: Batch, mesh: jax.sharding.Mesh | None) -> int:
    """The least `micro_batch_tokens` that a batch can be cut by."""
    return math.ceil(min(tokens for _, tokens in _cuts(batch, mesh)))


def _cuts(batch: Batch, mesh: jax.sharding.Mesh | None) -> Iterator[tuple[int, float]]:
    """The numbers of equal parts that there can be, and the tokens of each part."""
    size, shards = batch.size, shards_of(mesh)
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
        whole = keeps_groups(batch, parts, shards)
        yield parts, (responses + (shared if whole else spread)) / parts


def shards_of(mesh: jax.sharding.Mesh | None) -> int:
    """Parts of a batch that lie on devices of their own; one without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH_AXES)
