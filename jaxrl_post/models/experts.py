"""Mixtures of experts: each token's MLP is chosen among several by a router."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxrl_post.sharding.mesh import BATCH_AXES, auto_axes
from jaxrl_post.sharding.rules import RULES

Kernels = tuple[jax.Array, jax.Array, jax.Array]

PRODUCT_NAME = "experts"
"""What the experts' products put out, for policies of what is kept."""


def routed(
    x: jax.Array,
    router: jax.Array,
    kernels: Kernels,
    *,
    chosen: int,
    normalise: bool,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """``sum_e w_e down_e(activation(gate_e(x)) * up_e(x))`` over the chosen experts.

    ``w`` are the largest of the router's softmax. No token is dropped: the rows of each
    expert are brought together and multiplied by its matrices, however many they are.
    Over a mesh's `tensor` each device has some of the experts, where that divides them.

    Args:
      x: ``[B, T, D]``.
      router: ``[D, E]``.
      kernels: gate, up ``[E, D, F]`` and down ``[E, F, D]``.
      chosen: experts per token.
      normalise: their weights are divided by their sum.
      activation: of the gate.

    Returns:
      ``[B, T, D]``.

    Source: arXiv 2101.03961, without capacities; the weights as in Qwen3-MoE.

    >>> ones = jnp.ones((2, 3, 4))
    >>> kernels = (ones, ones, jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))]))
    >>> router = jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    >>> x = jnp.array([[[1.0, 1, 1], [-1.0, 1, 1]]])
    >>> out = routed(x, router, kernels, chosen=1, normalise=True, activation=jnp.abs)
    >>> out.tolist()
    [[[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]]
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scores = jnp.einsum("btd,de->bte", x, router.astype(x.dtype))
    weights, ids = jax.lax.top_k(jax.nn.softmax(scores.astype(wide), -1), chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    inputs = x, ids, weights.astype(x.dtype), *(k.astype(x.dtype) for k in kernels)
    compute = partial(_computed, activation=activation)

    sizes = {axis: size for axis, size in auto_axes().items() if size > 1}
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
    if x.shape[0] % math.prod(sizes[axis] for axis in batch_axes):
        batch_axes = ()  # too few for all: each device does the whole of them
    axis = RULES["experts"] if RULES["experts"] in sizes else None
    if axis is not None and router.shape[1] % sizes[axis]:
        axis = None
    if not batch_axes and axis is None:
        return compute(*inputs)
    rows, split = P(batch_axes), P(axis)
    return jax.shard_map(
        partial(compute, axis=axis),
        axis_names=frozenset(auto_axes()),
        in_specs=(rows, rows, rows, split, split, split),
        out_specs=rows,
        check_vma=False,  # the sum over `axis` is the same on all its devices
    )(*inputs)


def _computed(x, ids, weights, gate, up, down, *, activation, axis=None):
    """What the experts that are here add to each token, summed over `axis`."""
    here = len(gate)
    if axis is not None:
        first = jax.lax.axis_index(axis) * here
        ids = jnp.where((ids >= first) & (ids < first + here), ids - first, here)
    tokens = x.reshape(-1, x.shape[-1])
    ids, weights = ids.reshape(-1), weights.reshape(-1)
    order = jnp.argsort(ids, stable=True)  # by expert, those of other devices last
    owner = order // (len(ids) // len(tokens))
    sizes = jnp.bincount(ids, length=here).astype(jnp.int32)

    def ragged(rows, kernels):
        return checkpoint_name(jax.lax.ragged_dot(rows, kernels, sizes), PRODUCT_NAME)

    rows = tokens[owner]
    out = ragged(activation(ragged(rows, gate)) * ragged(rows, up), down)
    # Rows behind the last group are of no expert here: whatever they hold is dropped.
    out = jnp.where((ids[order] < here)[:, None], out, 0) * weights[order][:, None]
    out = jnp.zeros_like(tokens).at[owner].add(out).reshape(x.shape)
    return out if axis is None else jax.lax.psum(out, axis)
