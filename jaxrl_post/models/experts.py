"""Mixtures of experts: each token's MLP is chosen among several by a router."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxrl_post.sharding.mesh import BATCH_AXES, auto_axes
from jaxrl_post.sharding.rules import RULES

Weights = Mapping[str, jax.Array]
"""A ``kernel`` of all experts, and an adapter beside it: see `adapters.EXTRAS`."""

PRODUCT_NAME = "experts"
"""What the experts' products put out, for policies of what is kept."""


class Routes(NamedTuple):
    """Which experts each token goes to.

    Attributes:
      ids: ``[B, T, K]``, the chosen ones.
      weights: ``[B, T, K]``, what each of them counts.
      shares: ``[B, T, E]``, the router's softmax.
    """

    ids: jax.Array
    weights: jax.Array
    shares: jax.Array


class Load(struct.PyTreeNode):
    """Sums over tokens of what routers did, for the `balance_loss`.

    Attributes:
      tokens: ``[...]``, their number.
      chosen: ``[..., E]``, how many chose each expert.
      shares: ``[..., E]``, sums of the routers' softmax.
    """

    tokens: jax.Array
    chosen: jax.Array
    shares: jax.Array


def choose_experts(
    x: jax.Array, router: jax.Array, *, chosen: int, normalise: bool
) -> Routes:
    """The experts with the largest of the router's softmax, which are their weights.

    Args:
      x: ``[B, T, D]``.
      router: ``[D, E]``.
      chosen: K, experts per token.
      normalise: their weights are divided by their sum.

    Source: Qwen3-MoE.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scores = jnp.einsum("btd,de->bte", x, router.astype(x.dtype))
    shares = jax.nn.softmax(scores.astype(wide), -1)
    weights, ids = jax.lax.top_k(shares, chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routes(ids, weights, shares)


def load_of(routes: Routes, mask: jax.Array) -> Load:
    """The sums over each row's tokens in `mask` ``[B, T]``: ``[B, ...]``."""
    count = routes.shares.shape[-1]
    chosen = jax.nn.one_hot(routes.ids, count, dtype=routes.shares.dtype).sum(2)

    def total(x):
        return jnp.where(mask[..., None], x, 0).sum(1)

    return Load(mask.sum(1, dtype=chosen.dtype), total(chosen), total(routes.shares))


def balance_loss(part: Load, whole: Load) -> jax.Array:
    """``E sum_e f_e P_e``: least where all experts are chosen equally often.

    f_e: choices of expert e per token; P_e: mean of the router's softmax; both over all
    tokens of all layers. f counts, so that only P has a gradient. Parts of a batch add
    up to it if each is told the load of the `whole`.

    Args:
      part: the load whose gradient is wanted, summed: ``chosen``, ``shares`` ``[E]``.
      whole: that of the whole batch, summed likewise.

    Returns:
      The part's share of the loss, ``[]``.

    Source: arXiv 2101.03961, Eq. 4 to 6. Differs in: f counts all K choices, so that
      the least value is K and not 1, and layers are averaged before the product, as in
      transformers.

    >>> half = Load(jnp.array(2.0), jnp.array([2.0, 0.0]), jnp.array([1.5, 0.5]))
    >>> whole = jax.tree.map(lambda x: 2 * x, half)
    >>> [float(balance_loss(half, whole)), float(balance_loss(whole, whole))]
    [0.75, 1.5]
    """
    tokens = jnp.maximum(whole.tokens, 1.0)
    chosen = jax.lax.stop_gradient(whole.chosen / tokens)
    return chosen.shape[-1] * jnp.sum(chosen * part.shares / tokens)


def routed(
    x: jax.Array,
    routes: Routes,
    kernels: tuple[Weights, Weights, Weights],
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """``sum_e w_e down_e(activation(gate_e(x)) * up_e(x))`` over the chosen experts.

    No token is dropped: the rows of each expert are brought together and multiplied by
    its matrices, however many they are. Over a mesh's `tensor` each device has some of
    the experts, where that divides them.

    Args:
      x: ``[B, T, D]``.
      routes: of `choose_experts`.
      kernels: gate, up ``[E, D, F]`` and down ``[E, F, D]``, and what stands beside
        them: ``lora_a`` ``[E, inputs, rank]``, ``lora_b`` ``[E, rank, outputs]``,
        ``lora_scale`` ``[E]``.
      activation: of the gate.

    Returns:
      ``[B, T, D]``.

    Source: arXiv 2101.03961, without capacities.

    >>> ones = {"kernel": jnp.ones((2, 3, 4))}
    >>> down = {"kernel": jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])}
    >>> router = jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    >>> x = jnp.array([[[1.0, 1, 1], [-1.0, 1, 1]]])
    >>> routes = choose_experts(x, router, chosen=1, normalise=True)
    >>> routed(x, routes, (ones, ones, down), jnp.abs).tolist()
    [[[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]]
    """
    kernels = jax.tree.map(lambda k: k.astype(x.dtype), kernels)
    inputs = x, routes.ids, routes.weights.astype(x.dtype), *kernels
    compute = partial(_computed, activation=activation)

    sizes = {axis: size for axis, size in auto_axes().items() if size > 1}
    batch_axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
    if x.shape[0] % math.prod(sizes[axis] for axis in batch_axes):
        batch_axes = ()  # too few for all: each device does the whole of them
    axis = RULES["experts"] if RULES["experts"] in sizes else None
    if axis is not None and routes.shares.shape[-1] % sizes[axis]:
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
    here = len(gate["kernel"])
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

    def product(rows, weights):
        out = ragged(rows, weights["kernel"])
        if (a := weights.get("lora_a")) is not None:
            b = weights["lora_b"] * weights["lora_scale"][:, None, None]
            out = out + ragged(ragged(rows, a), b)
        return out

    rows = tokens[owner]
    out = product(activation(product(rows, gate)) * product(rows, up), down)
    # Rows behind the last group are of no expert here: whatever they hold is dropped.
    out = jnp.where((ids[order] < here)[:, None], out, 0) * weights[order][:, None]
    out = jnp.zeros_like(tokens).at[owner].add(out).reshape(x.shape)
    return out if axis is None else jax.lax.psum(out, axis)
