"""Keys and values that later tokens attend to: a growing part and a shared prefix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxrl_post.sharding.mesh import auto_axes
from jaxrl_post.sharding.rules import RULES

PerLayer = jax.Array | tuple[jax.Array, ...]
"""One array with a leading layer axis, or a tuple with one array per layer."""


def unstack_layers(stacked: PerLayer) -> tuple[jax.Array, ...]:
    """Splits off the leading layer axis; a tuple is returned as it is."""
    if isinstance(stacked, tuple):
        return stacked
    return tuple(stacked[i] for i in range(stacked.shape[0]))


class Prefix(struct.PyTreeNode):
    """A context's keys and values, stored once and attended to by many sequences.

    Attributes:
      keys, values: ``[L, C, Hkv, S, d]``, or a tuple of L arrays ``[C, Hkv, S, d]``.
      mask: ``[C, S]`` bool, False at padding.
      index: ``[B]`` int32, the context of each sequence; None where sequence ``b``
        belongs to context ``b // (B // C)``, which needs no gather.
    """

    keys: PerLayer
    values: PerLayer
    mask: jax.Array
    index: jax.Array | None = None


class Cache(struct.PyTreeNode):
    """What has been written so far, and the prefix before it.

    The slots before `length` are written, for all rows alike; rows that have ended
    write padding (segment 0).

    A ring is for decoding, one token per row at a time, and is written over again from
    its beginning. A token sees all slots of its segment, wherever they are: a row's
    segments are numbered afresh with every sequence, and none is longer than the ring.
    It keeps keys, and those of its prefix, as ``[B, Hkv, d, N]``: with few queries
    XLA's product with keys in the other order takes up to three times as long on CPU.

    Attributes:
      keys, values: ``[L, B, Hkv, N, d]``, or a tuple of L arrays ``[B, Hkv, N, d]``.
        The tuple lets a decoding loop update each layer in place.
      segment_ids: ``[B, N]`` int32; 0 where nothing, or padding, is written.
      length: number of slots written, int32 scalar.
      prefix: what every token attends to besides, or None.
      ring: whether slots after `length` may hold earlier tokens.
    """

    keys: PerLayer
    values: PerLayer
    segment_ids: jax.Array
    length: jax.Array
    prefix: Prefix | None = None
    ring: bool = struct.field(pytree_node=False, default=False)

    def as_ring(self) -> Cache:
        """This cache for decoding, or to be the prefix of a cache for decoding."""
        keys = jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), self.keys)
        return self.replace(keys=keys, ring=True)

    def resize(self, capacity: int, clock: jax.Array) -> Cache:
        """A ring of another size, after `clock` tokens were written to this one.

        The last of them, as many as both have room for, oldest first.
        """
        size = self.segment_ids.shape[-1]
        kept = min(size, capacity)
        oldest = jnp.maximum(clock - kept, 0) % size

        def move(x, axis):
            x = jax.lax.slice_in_dim(jnp.roll(x, -oldest, axis), 0, kept, axis=axis)
            grown = [(0, 0)] * x.ndim
            grown[axis] = (0, capacity - kept)
            return jnp.pad(x, grown)

        return self.replace(
            keys=jax.tree.map(lambda x: move(x, x.ndim - 1), self.keys),
            values=jax.tree.map(lambda x: move(x, x.ndim - 2), self.values),
            segment_ids=move(self.segment_ids, 1),
        )

    def as_prefix(self, index: jax.Array | None = None) -> Prefix:
        """This cache, filled by a context, as the prefix of other sequences."""
        return Prefix(self.keys, self.values, self.segment_ids > 0, index)

    def unstack(self) -> Cache:
        """The same cache with one array per layer."""
        prefix = self.prefix
        if prefix is not None:
            prefix = prefix.replace(
                keys=unstack_layers(prefix.keys),
                values=unstack_layers(prefix.values),
            )
        return self.replace(
            keys=unstack_layers(self.keys),
            values=unstack_layers(self.values),
            prefix=prefix,
        )


def init_cache(
    layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype
) -> Cache:
    """An empty cache of `capacity` slots for `batch` rows."""
    shape = (layers, batch, kv_heads, capacity, head_dim)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def split_heads(cache: Cache) -> Cache:
    """The cache with its heads split over the mesh's `tensor`, where that divides them.

    Left to itself the compiler gives each device of `tensor` all heads of a cache that
    nothing has been written to.
    """
    axis: Any = RULES["kv_heads"]
    keys: Any = cache.keys  # stacked, as it is new
    size = auto_axes().get(axis, 1)
    if size == 1 or keys.shape[2] % size:
        return cache
    free = P.UNCONSTRAINED
    spec = P(free, free, axis, free, free)
    keys, values = jax.lax.with_sharding_constraint((cache.keys, cache.values), spec)
    return cache.replace(keys=keys, values=values)
