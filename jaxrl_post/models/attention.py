"""Attention: which tokens see which, and by which program it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.models import kernels
from jaxrl_post.models.chunked import SAVED_NAME, chunked_attention, join
from jaxrl_post.models.plain_attention import plain_attention
from jaxrl_post.sharding.mesh import BATCH_AXES, auto_axes
from jaxrl_post.sharding.rules import RULES

IMPLEMENTATIONS = ("auto", "plain", "chunked", "splash", "cudnn")
"""`plain` holds all scores at once; `chunked` a block of them, on any device; `splash`
is the Pallas kernel for TPU, `cudnn` the kernel for NVIDIA GPUs; `auto` chooses by
platform, shapes and dtype."""

BLOCKS_FROM = 512
"""Keys from which on `auto` leaves `plain`: see docs/memory.md for the measurement."""


class LayerCache(struct.PyTreeNode):
    """One layer's part of a `models.cache.Cache`; shapes as there, less the L."""

    keys: jax.Array
    values: jax.Array
    prefix_keys: jax.Array | None = None
    prefix_values: jax.Array | None = None


class Visibility(struct.PyTreeNode):
    """Which slots each query sees; the same for all layers.

    Attributes:
      queries: ``[B, T]`` int32, segments of the queries, 0 for padding.
      slots: ``[B, N]`` int32, segments of the cache's slots (or of the tokens
        themselves).
      own: ``[B, T, N]`` bool over those slots, where `how` is plain; else None.
      prefix: ``[B, S]`` bool over the prefix, or None.
      index: the prefix row of each sequence, see `models.cache.Prefix`.
      length: slot at which these tokens are written, or None without a cache.
      how: the program, one of `IMPLEMENTATIONS` but ``auto``.
      window: number of slots that a query sees, its own included; None: all.
      distance: ``[1, T, N]``, slots from each query back to each slot, where there are
        windows and `how` is plain.
      positions: ``[B, T]`` of the queries, and
      prefix_positions: ``[B, S]``, which windows count by across the prefix.
      softcap: ``c`` where scores are ``c * tanh(scores / c)``.
      ring: see `models.cache.Cache`; then T is 1 and `how` plain.
    """

    queries: jax.Array
    slots: jax.Array
    own: jax.Array | None = None
    prefix: jax.Array | None = None
    index: jax.Array | None = None
    length: jax.Array | None = None
    how: str = struct.field(pytree_node=False, default="plain")
    window: Any = None
    distance: jax.Array | None = None
    positions: jax.Array | None = None
    prefix_positions: jax.Array | None = None
    softcap: float | None = struct.field(pytree_node=False, default=None)
    ring: bool = struct.field(pytree_node=False, default=False)


def check_implementation(name: str) -> None:
    """Raises ValueError for a name that is not one of `IMPLEMENTATIONS`."""
    if name not in IMPLEMENTATIONS:
        hint = nearest(str(name), IMPLEMENTATIONS)
        raise ValueError(f"attention={name!r}: there is no such attention; {hint}")


def choose(
    asked: str,
    *,
    time: int,
    slots: int,
    prefix: int,
    head_dim: int,
    dtype: Any,
    special: str | None = None,
) -> str:
    """The program for these shapes: `asked`, or what `auto` stands for.

    Kernels want a cache that these tokens fill from its beginning, as contexts and
    responses do in training; behind another part of a cache, chunks take their place.
    A single query is always plain: its scores are a row.

    Args:
      asked: one of `IMPLEMENTATIONS`.
      time: T, queries.
      slots: N, slots of the cache.
      prefix: S, tokens of the prefix; 0 without one.
      head_dim: d.
      dtype: of queries, keys and values.
      special: what the kernels do not know, such as windows; None: nothing.

    Raises:
      InputError: a kernel that was asked for does not run here.
    """
    check_platform(asked)
    if asked == "plain" or time == 1:
        return "plain"
    if asked == "auto" and slots + prefix < BLOCKS_FROM:
        return "plain"
    on_platform = [k for k, v in kernels.PLATFORMS.items() if v == _platform()]
    for name in on_platform if asked == "auto" else [asked]:
        if name == "chunked" or time != slots:
            continue
        problem = kernels.problem(name, time, prefix, head_dim, dtype)
        problem = f"it knows no {special}" if special else problem
        if problem is None:
            return name
        if asked == name:
            raise InputError(f"attention={name}: {problem}; use auto or chunked.")
    return "chunked"


def check_platform(asked: str) -> None:
    """Raises InputError for a kernel of another platform."""
    wanted, platform = kernels.PLATFORMS.get(asked), _platform()
    if wanted not in (None, platform):
        raise InputError(
            f"attention={asked}: runs on {wanted}, and this is {platform}; use auto or "
            "chunked."
        )


def attend(queries: jax.Array, cache: LayerCache, visibility: Visibility) -> jax.Array:
    """Softmax attention over the prefix's and the own slots together.

    Args:
      queries: ``[B, T, H, d]``.
      cache: keys and values, own ``[B, Hkv, N, d]``, prefix ``[C, Hkv, S, d]``; keys
        of a ring as `models.cache.Cache` says.
      visibility: what each query sees, and how it is computed.

    Returns:
      ``[B, T, H, d]``. What padding gets is finite and means nothing.
    """
    if visibility.how == "plain":
        return checkpoint_name(_plain(queries, cache, visibility), SAVED_NAME)
    if (index := visibility.index) is not None:
        cache = _map_prefix(lambda x: x[index], cache)
        visibility = visibility.replace(index=None)
    attention = _chunked if visibility.how == "chunked" else _kernel
    return _on_shards(attention, queries, cache, visibility)


def _plain(queries, cache: LayerCache, visibility: Visibility) -> jax.Array:
    """All scores at once."""
    own, before = _seen(visibility)
    prefix, index = None, visibility.index
    keys, values = cache.prefix_keys, cache.prefix_values
    if keys is not None and values is not None and visibility.prefix is not None:
        if index is not None:
            keys, values = keys[index], values[index]
        prefix = (keys, values, before)
    return plain_attention(
        queries,
        cache.keys,
        cache.values,
        own,
        prefix,
        softcap=visibility.softcap,
        ring=visibility.ring,
    )


def _seen(visibility: Visibility) -> tuple[jax.Array, jax.Array]:
    """What queries see in this layer: own slots ``[B, T, N]``, and of the prefix
    ``[B, 1 or T, S]``, S being 0 without one.
    """
    own, before, window = visibility.own, visibility.prefix, visibility.window
    assert own is not None
    before = own[:, :1, :0] if before is None else before[:, None]
    if window is None:
        return own, before
    own = own & (visibility.distance < window)
    if visibility.prefix_positions is not None:
        assert visibility.positions is not None
        back = visibility.positions[:, :, None] - visibility.prefix_positions[:, None]
        before = before & (back < window)
    return own, before


def _chunked(queries, cache: LayerCache, visibility: Visibility) -> jax.Array:
    """A block of scores at a time, of the prefix and of the own slots, then joined."""
    own = chunked_attention(
        queries,
        cache.keys,
        cache.values,
        visibility.queries,
        visibility.slots,
        offset=0 if visibility.length is None else visibility.length,
        window=visibility.window,
        softcap=visibility.softcap,
    )
    keys, values = cache.prefix_keys, cache.prefix_values
    if keys is None or values is None or visibility.prefix is None:
        return own[0]
    # As in `_plain`: a group is one long query to the prefix that it shares.
    batch, time, heads, dim = queries.shape
    rows, members = keys.shape[0], batch // keys.shape[0]
    places = None
    if visibility.window is not None:
        assert visibility.positions is not None
        assert visibility.prefix_positions is not None
        places = (
            visibility.positions.reshape(rows, members * time),
            visibility.prefix_positions[::members],
        )
    out, norm = chunked_attention(
        queries.reshape(rows, members * time, heads, dim),
        keys,
        values,
        jnp.ones((rows, members * time), jnp.int32),
        visibility.prefix[::members].astype(jnp.int32),
        window=visibility.window,
        positions=places,
        softcap=visibility.softcap,
    )
    before = (out.reshape(queries.shape), norm.reshape(batch, time, heads))
    return join([before, own])


def _kernel(queries, cache: LayerCache, visibility: Visibility) -> jax.Array:
    """By a kernel of the platform, the prefix in front of the own slots."""
    keys, values, seen = cache.keys, cache.values, visibility.slots
    segments, offset = visibility.queries, 0
    if cache.prefix_keys is not None and visibility.prefix is not None:
        offset = cache.prefix_keys.shape[2]
        members = queries.shape[0] // cache.prefix_keys.shape[0]

        def before(prefix, own):
            prefix = jnp.repeat(prefix, members, axis=0)
            return jnp.concatenate([prefix.astype(own.dtype), own], axis=2)

        keys = before(cache.prefix_keys, keys)
        values = before(cache.prefix_values, values)
        # A kernel compares segments, so that all behind a prefix must be of segment 1.
        prefix = jnp.where(visibility.prefix, 1, -1)
        seen = jnp.concatenate([prefix, seen], axis=1)
    out = kernels.KERNELS[visibility.how](
        queries, keys, values, segments, seen, offset=offset
    )
    if offset:
        return jnp.where(jnp.any(segments > 1), jnp.nan, out)
    return out


def _on_shards(attention, queries, cache: LayerCache, visibility: Visibility):
    """Each device its own sequences and heads: the compiler cannot split a kernel, and
    need not guess how to split the loops over chunks."""
    sizes = {axis: size for axis, size in auto_axes().items() if size > 1}
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
    head_axis = RULES["heads"] if RULES["heads"] in sizes else None
    if not batch_axes and head_axis is None:
        return attention(queries, cache, visibility)
    batch, _, heads, _ = queries.shape
    if batch % math.prod(sizes[axis] for axis in batch_axes):
        batch_axes = ()  # too few for all: each device does the whole of them
    if head_axis is not None and heads % sizes[head_axis]:
        head_axis = None
    elif head_axis is not None and cache.keys.shape[1] % sizes[head_axis]:
        copies = heads // cache.keys.shape[1]
        cache = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), cache)
    shards = math.prod(sizes[axis] for axis in batch_axes)
    if cache.prefix_keys is not None and (rows := cache.prefix_keys.shape[0]) % shards:
        cache = _map_prefix(lambda x: jnp.repeat(x, batch // rows, axis=0), cache)
    cached = jax.tree.map(lambda x: P(batch_axes, head_axis), cache)
    seen = jax.tree.map(lambda x: P(batch_axes) if x.ndim else P(), visibility)
    split = P(batch_axes, None, head_axis)
    return jax.shard_map(
        attention,
        axis_names=frozenset(auto_axes()),
        in_specs=(split, cached, seen),
        out_specs=split,
        check_vma=False,  # Pallas kernels do not say over which axes they vary
    )(queries, cache, visibility)


def _map_prefix(fn: Callable, cache: LayerCache) -> LayerCache:
    """`fn` of the prefix's keys and values, where there is one."""
    if cache.prefix_keys is None:
        return cache
    return cache.replace(
        prefix_keys=fn(cache.prefix_keys), prefix_values=fn(cache.prefix_values)
    )


def _platform() -> str:
    """Of the mesh that is set, such as one of devices that are not here; else jax's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
