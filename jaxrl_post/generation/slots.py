"""What lives on the device while sequences are decoded, and how it moves there."""

from __future__ import annotations

from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrl_post.models.cache import Cache, Prefix
from jaxrl_post.sharding.mesh import BATCH_AXES, auto_axes

Array: TypeAlias = jax.Array | np.ndarray


class Contexts(struct.PyTreeNode):
    """R prefilled contexts: what their samples share.

    Attributes:
      prefix: keys and values of the contexts.
      hidden: ``[R, D]`` hidden state of each context's last token.
      lengths: ``[R]`` number of tokens.
    """

    prefix: Prefix
    hidden: jax.Array
    lengths: jax.Array

    def widen(self, rows: int) -> Contexts:
        """As many rows, of which these are the first."""

        def grow(x):
            return jnp.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])

        return jax.tree.map(grow, self)

    def install(self, others: Contexts, rows: jax.Array) -> Contexts:
        """`others` in the place of `rows`; those for rows that don't exist are left."""

        def write(whole, part):
            return whole.at[rows].set(part.astype(whole.dtype), mode="drop")

        return jax.tree.map(write, self, others)


class Slots(struct.PyTreeNode):
    """B places; in each, one sequence after the other is decoded.

    Attributes:
      cache: keys and values of the tokens chosen so far, but the last. A ring: all
        slots write the same column, whenever their sequences have begun.
      sequence: ``[B]`` number of the sequence in the result; -1: none.
      row: ``[B]`` its context.
      start: ``[B]`` length of its context.
      count: ``[B]`` tokens chosen so far.
      token: ``[B]`` the last of them.
      clock: [] columns written.
      next: [] the first sequence that no slot has taken yet.
    """

    cache: Cache
    sequence: jax.Array
    row: jax.Array
    start: jax.Array
    count: jax.Array
    token: jax.Array
    clock: jax.Array
    next: jax.Array

    @property
    def capacity(self) -> int:
        """Columns of the cache."""
        return self.cache.segment_ids.shape[1]

    def status(self) -> jax.Array:
        """``[3]``: sequences under way, `next`, tokens of the longest."""
        alive = self.sequence >= 0
        longest = jnp.where(alive, self.count, 0).max()
        return jnp.stack([alive.sum(dtype=jnp.int32), self.next, longest])

    def refill(self, contexts: Contexts, queue: Queue) -> Slots:
        """Every empty slot takes the next sequence of the queue, as far as it goes."""
        empty = self.sequence < 0
        taken = self.next + jnp.cumsum(empty, dtype=jnp.int32) - 1
        given = empty & (taken < queue.limit)
        prompts = taken // queue.group_size
        row = jnp.where(given, queue.rows[prompts % queue.rows.size], self.row)
        return self.replace(
            sequence=jnp.where(given, taken, self.sequence),
            row=row,
            start=jnp.where(given, contexts.lengths[row], self.start),
            count=jnp.where(given, 0, self.count),
            next=self.next + given.sum(dtype=jnp.int32),
        )

    def resize(self, capacity: int) -> Slots:
        """The same with room for more or fewer tokens."""
        cache = self.cache.resize(capacity, self.clock)
        kept = min(capacity, self.capacity)
        return self.replace(cache=cache, clock=jnp.minimum(self.clock, kept))

    def restore(self, others: Slots) -> Slots:
        """With what `others`, to which these were compacted, have written since.

        Both begin with sequence b in slot b, none was refilled, and no cache has come
        round.
        """
        whole = self.resize(others.capacity)
        segments = others.cache.segment_ids.max(axis=1)
        # A slot that has written nothing may be anyone's.
        rows = jnp.where(segments > 0, segments - 1, len(self.sequence))

        def write(x, part):
            return x.at[rows].set(part, mode="drop") if x.ndim else part

        return jax.tree.map(write, whole, others)

    def compact(self, size: int) -> Slots:
        """The first `size` slots that hold a sequence, and if need be others."""
        kept = jnp.argsort(self.sequence < 0, stable=True)[:size]
        return jax.tree.map(lambda x: x[kept] if x.ndim else x, self)


class Queue(struct.PyTreeNode):
    """The sequences that slots may take: those of prefilled contexts.

    Attributes:
      rows: ``[R]``; context ``rows[p % R]`` is that of prompt p.
      limit: [] sequences up to here may be taken.
      group_size: [] G; sequence ``p * G + g`` is of prompt p.
    """

    rows: Array
    limit: Array
    group_size: Array


class Log(struct.PyTreeNode):
    """The tokens of a dispatch of up to K steps.

    Attributes:
      sequence: ``[B, K]`` whose token it is; -1: no token.
      index: ``[B, K]`` number of the token in its sequence.
      tokens, logps, sampler_logps: ``[B, K]`` as in `Rollouts`.
      ended: ``[B, K]`` bool, it is its sequence's last.
      size: [] steps made.
    """

    sequence: jax.Array
    index: jax.Array
    tokens: jax.Array
    logps: jax.Array
    sampler_logps: jax.Array
    ended: jax.Array
    size: jax.Array

    @classmethod
    def empty(cls, slots: int, steps: int) -> Log:
        whole = jnp.zeros((slots, steps), jnp.int32)
        return cls(
            sequence=whole - 1,
            index=whole,
            tokens=whole,
            logps=whole.astype(jnp.float32),
            sampler_logps=whole.astype(jnp.float32),
            ended=whole.astype(bool),
            size=jnp.zeros((), jnp.int32),
        )

    def append(self, **columns: jax.Array) -> Log:
        """One step more, a ``[B]`` array for each attribute."""

        def write(whole, column):
            column = column.astype(whole.dtype)[:, None]
            return lax.dynamic_update_slice(whole, column, (0, self.size))

        written = {k: write(getattr(self, k), v) for k, v in columns.items()}
        return self.replace(**written, size=self.size + 1)


def shard_rows(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The leading axis of every array split over the mesh's batch axes."""
    axes = tuple(axis for axis in auto_axes() if axis in BATCH_AXES)
    if not axes:
        return tree

    def shard(x):
        if not x.ndim:
            return x
        spec = P(axes, *[P.UNCONSTRAINED] * (x.ndim - 1))
        return lax.with_sharding_constraint(x, spec)

    return jax.tree.map(shard, tree)
