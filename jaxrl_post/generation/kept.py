"""Keys and values of sequences that have ended, for those of them that go on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_post.generation.slots import Contexts
from jaxrl_post.models.cache import Cache


class Kept(struct.PyTreeNode):
    """B sequences and the C contexts that B / C adjacent ones share.

    Attributes:
      contexts: of all.
      cache: of all tokens but each sequence's last, in the order in which they came: a
        ring that has not come round.
    """

    contexts: Contexts
    cache: Cache

    def gather(
        self, rows: jax.Array, *, width: int, room: int
    ) -> tuple[Cache, jax.Array]:
        """Some of the sequences behind their contexts, in a cache of their own.

        Args:
          rows: ``[n]``, which.
          width: columns for them; whoever asks knows that they are enough.
          room: columns behind these, for tokens that are still to be read.

        Returns:
          A cache that is full up to `width`, each row's tokens side by side before it,
          and their numbers ``[n]``.
        """
        prefix, own = self.contexts.prefix, self.cache
        of = rows // (own.segment_ids.shape[0] // prefix.mask.shape[0])

        def joined(before, after, axis):
            both = jnp.concatenate([before[of], after[rows]], axis=axis)
            missing = [(0, 0)] * both.ndim
            missing[axis] = (max(0, width - both.shape[axis]), 0)
            return jnp.pad(both, missing)

        seen = joined(prefix.mask, own.segment_ids > 0, 1)
        # Padding first, then the tokens, each in their order.
        columns = jnp.argsort(seen, axis=1, stable=True)[:, -width:]

        def packed(before, after, axis):
            others = {1, 2, 3} - {axis}
            at = jnp.expand_dims(columns, tuple(others))
            found = jnp.take_along_axis(joined(before, after, axis), at, axis)
            found = jnp.swapaxes(found, 2, axis)  # keys of a ring have columns last
            return jnp.pad(found, ((0, 0), (0, 0), (0, room), (0, 0)))

        layers = range(len(own.keys))
        lengths = seen.sum(axis=1, dtype=jnp.int32)
        segments = jnp.take_along_axis(seen, columns, axis=1).astype(jnp.int32)
        cache = Cache(
            keys=jnp.stack([packed(prefix.keys[i], own.keys[i], 3) for i in layers]),
            values=jnp.stack(
                [packed(prefix.values[i], own.values[i], 2) for i in layers]
            ),
            segment_ids=jnp.pad(segments, ((0, 0), (0, room))),
            length=jnp.array(width, jnp.int32),
        )
        return cache, lengths
