"""The arrays of one update, with each context stored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


class Batch(struct.PyTreeNode):
    """Sequences to train on: a context, shared by a group, and a response each.

    B sequences of T response tokens, C contexts of S tokens. Contexts may be padded
    on either side, responses on the right. What a mask excludes may hold garbage.

    Attributes:
      contexts: ``[C, S]`` int32 token ids.
      context_mask: ``[C, S]`` bool, True at real tokens; every row has at least one.
      responses: ``[B, T]`` int32 token ids.
      token_mask: ``[B, T]`` bool, tokens that exist, hence are attended to.
      loss_mask: ``[B, T]`` bool, tokens that are trained on: a part of `token_mask`.
      sequence_mask: ``[B]`` bool, False for filler rows that only round B up.
      advantages: ``[B]`` or ``[B, T]`` float.
      context_index: ``[B]`` int32, each sequence's context. None where the sequences
        of a context are adjacent and equally many: ``b // (B // C)``.
      old_logps: ``[B, T]`` log-probs at rollout temperature before the first update
        on this batch. None where there is one update: they are the current ones.
      sampler_logps: ``[B, T]`` log-probs under the distribution that was sampled
        from, or None where no correction for it is wanted.
      teacher_contexts, teacher_context_mask: ``[Ct, St]``, what the self-teacher
        sees instead of the contexts; None without such a teacher.
      teacher_index: ``[B]`` int32 into `teacher_contexts`; None as `context_index`.
      is_teacher: ``[B, T]`` bool, tokens written by a teacher (demonstrations), not
        by the policy; None where there are none.
      extras: further arrays with leading axis B, by name, for terms of one's own.
    """

    contexts: Array
    context_mask: Array
    responses: Array
    token_mask: Array
    loss_mask: Array
    sequence_mask: Array
    advantages: Array
    context_index: Array | None = None
    old_logps: Array | None = None
    sampler_logps: Array | None = None
    teacher_contexts: Array | None = None
    teacher_context_mask: Array | None = None
    teacher_index: Array | None = None
    is_teacher: Array | None = None
    extras: dict[str, Array] = struct.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of sequences B, filler included."""
        return self.responses.shape[0]


def own_tokens(batch: Batch) -> jax.Array:
    """``[B, T]`` bool, tokens that are trained on and that the policy wrote itself."""
    return jnp.asarray(batch.loss_mask) & ~_teacher_mask(batch)


def demonstrated_tokens(batch: Batch) -> jax.Array:
    """``[B, T]`` bool, tokens that are trained on and that a teacher wrote."""
    return jnp.asarray(batch.loss_mask) & _teacher_mask(batch)


def _teacher_mask(batch: Batch) -> jax.Array:
    given = batch.is_teacher
    return jnp.asarray(np.zeros((), bool) if given is None else given)


def each_token(batch: Batch) -> tuple[Batch, Callable[[Batch], Batch]]:
    """The batch token by token, for losses that need no more than that.

    Returns:
      The batch without its contexts, its arrays spread to ``[B, T]``, among the extras
      those of shape ``[B]`` and ``[B, T]``; and a function that makes of n tokens of
      it, arrays ``[n]``, a batch of n sequences of one token.
    """
    shape = batch.responses.shape
    by_shape = (shape, shape[:1])
    extras = {k: x for k, x in batch.extras.items() if jnp.shape(x) in by_shape}
    kept = {f.name: getattr(batch, f.name) for f in fields(batch)}
    kept |= dict.fromkeys(name for name in kept if "context" in name or "index" in name)
    rows: Batch = Batch(**{**kept, "extras": extras})

    def spread(x):
        return jnp.broadcast_to(x[:, None] if jnp.ndim(x) == 1 else x, shape)

    def sequences(tokens: Batch) -> Batch:
        return jax.tree.map(
            lambda x, whole: x if jnp.ndim(whole) == 1 else x[:, None], tokens, rows
        )

    return jax.tree.map(spread, rows), sequences


def keeps_groups(batch: Batch, parts: int, shards: int = 1) -> bool:
    """Whether a batch can be cut into parts that give each shard whole groups."""
    groups = batch.contexts.shape[0]
    return batch.context_index is None and groups % (parts * shards) == 0


def split_batch(batch: Batch, parts: int, shards: int = 1) -> Batch:
    """Cuts a batch into equal parts: every leaf gets a leading axis `parts`.

    Part ``m`` takes every `parts`-th group, so that a batch sharded by rows stays
    where it is. Where there is no whole group of each part for each shard, groups are
    cut, and each sequence carries a context row of its own.

    Args:
      batch: what to cut.
      parts: how many.
      shards: devices, or groups of them, that share each part's rows.

    Raises:
      ValueError: where `parts` does not divide B.
    """
    size, groups = batch.size, batch.contexts.shape[0]
    if size % parts:
        raise ValueError(f"{size} sequences cannot be cut into {parts} equal parts.")
    whole = keeps_groups(batch, parts, shards)
    if not whole:
        batch = _spread(batch, "contexts", "context_mask", "context_index")
    if batch.teacher_contexts is not None and not (
        whole
        and batch.teacher_index is None
        and batch.teacher_contexts.shape[0] == groups
    ):
        batch = _spread(
            batch, "teacher_contexts", "teacher_context_mask", "teacher_index"
        )
    units = groups if whole else size

    def cut(x):
        members = x.shape[0] // units  # rows of a group; 1 for a group's context
        x = jnp.reshape(x, (units // parts, parts, members, *x.shape[1:]))
        return jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(cut, batch)


def _spread(batch: Batch, contexts: str, mask: str, index: str) -> Batch:
    """Gives each sequence a context row of its own."""
    rows = getattr(batch, index)
    if rows is None:
        rows = jnp.arange(batch.size) // (
            batch.size // getattr(batch, contexts).shape[0]
        )
    spread = {
        name: jnp.asarray(getattr(batch, name))[rows] for name in (contexts, mask)
    }
    return batch.replace(**spread, **{index: None})
