"""Embedding, layers and final norm: a `Policy` from a `DecoderConfig`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.models.attention import (
    LayerCache,
    Visibility,
    check_implementation,
    choose,
)
from jaxrl_post.models.cache import Cache, init_cache, split_heads
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.kinds import LayerKind, layer_kinds, rotations
from jaxrl_post.models.layers import DecoderLayer, RMSNorm, cos_sin_of
from jaxrl_post.models.memory import on_device, rematerialise
from jaxrl_post.models.policy import Policy

_NORM = {"scale": ("norm",)}


def decoder(
    config: DecoderConfig,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "products",
    attention: str = "auto",
) -> Policy:
    """A decoder-only language model as pure functions.

    Parameters are a plain dict: ``embed`` ``[V, D]``, ``layers`` (each leaf with a
    leading layer axis, or a tuple with one dict per layer), ``final_norm`` and,
    unless tied, ``unembed`` ``[V, D]``.

    Args:
      config: the architecture.
      compute_dtype: dtype of activations and of the weights inside the layers; the
        parameters keep their own, softmax and norms are at least float32.
      remat: what of each layer is kept for the backward pass, by name; see
        `memory.POLICIES`.
      attention: the program that computes it; see `attention.IMPLEMENTATIONS`.

    Returns:
      The `Policy`.

    Raises:
      ValueError: there is no such `remat` or `attention`.

    >>> policy = decoder(
    ...     DecoderConfig(
    ...         vocab_size=11,
    ...         hidden_size=8,
    ...         intermediate_size=16,
    ...         num_layers=2,
    ...         num_heads=2,
    ...         num_kv_heads=1,
    ...         head_dim=4,
    ...     )
    ... )
    >>> params = policy.init(jax.random.key(0))
    >>> tokens = jnp.arange(6)[None]
    >>> hidden, _ = policy.hidden(params, tokens, tokens, jnp.ones_like(tokens))
    >>> hidden.shape, policy.unembedding(params).shape
    ((1, 6, 8), (11, 8))
    """
    check_implementation(attention)
    layer = DecoderLayer(config)
    final_norm = RMSNorm(config.rms_norm_eps, config.norm_offset)
    kinds, ways = layer_kinds(config), rotations(config)
    special = "windows" if config.local_layers else None
    if config.attention_softcap is not None:
        special = "soft-caps"

    def applied(layer):
        def apply(params, x, cos_sin, visibility, cache, kind):
            params = {"params": on_device(params)}
            return layer.apply(params, x, cos_sin, visibility, kind, cache)

        return rematerialise(apply, remat)

    plain, measured = applied(layer), applied(DecoderLayer(config, measured=True))

    def hidden(params, tokens, positions, segment_ids, cache=None):
        return forward(plain, params, tokens, positions, segment_ids, cache)[:2]

    def routing(params, tokens, positions, segment_ids, cache=None):
        return forward(measured, params, tokens, positions, segment_ids, cache)

    def forward(apply_layer, params, tokens, positions, segment_ids, cache):
        layers = {
            "layers": params["layers"]
        }  # moved one at a time, where they are used
        params = on_device({k: v for k, v in params.items() if k != "layers"}) | layers
        x = params["embed"][tokens].astype(compute_dtype)
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.hidden_size), compute_dtype)
        how = choose(
            attention,
            time=tokens.shape[1],
            slots=tokens.shape[1] if cache is None else cache.segment_ids.shape[1],
            prefix=_prefix_size(cache),
            head_dim=config.head_dim,
            dtype=compute_dtype,
            special=special,
        )
        visibility, cache = _visibility(segment_ids, cache, how)
        visibility = visibility.replace(softcap=config.attention_softcap)
        if config.local_layers:
            visibility = _distances(visibility, positions)
        cos_sin = cos_sin_of(ways, positions)
        x, cache, load = _run_layers(
            apply_layer, params, x, cos_sin, visibility, cache, kinds
        )
        norm = on_device(params["final_norm"])
        return final_norm.apply({"params": norm}, x), cache, load

    def unembedding(params):
        return on_device(params["embed" if config.tie_embeddings else "unembed"])

    def init(key):
        embed_key, layer_key, head_key = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, config.hidden_size))
        ids = jnp.zeros((1, 1), jnp.int32)
        visibility = Visibility(ids, ids, own=jnp.ones((1, 1, 1), bool))
        visibility = _distances(visibility, ids)

        def init_layer(key):
            kind = jax.tree.map(lambda x: x[0], kinds)
            return layer.init(key, x, cos_sin_of(ways, ids), visibility, kind)["params"]

        shape = (config.rows, config.hidden_size)
        scale = config.hidden_size**-0.5
        params = {
            "embed": scale * jax.random.normal(embed_key, shape),
            "layers": jax.vmap(init_layer)(
                jax.random.split(layer_key, config.num_layers)
            ),
            "final_norm": {
                "scale": jnp.full(
                    (config.hidden_size,), 1 - config.norm_offset, jnp.float32
                )
            },
        }
        if not config.tie_embeddings:
            params["unembed"] = scale * jax.random.normal(head_key, shape)
        return params

    def empty_cache(batch, capacity):
        cache = init_cache(
            config.num_layers,
            batch,
            capacity,
            config.num_kv_heads,
            config.head_dim,
            compute_dtype,
        )
        return split_heads(cache)

    return Policy(
        config=config,
        hidden=hidden,
        unembedding=unembedding,
        logical_axes=logical_axes(config),
        init=jax.jit(init),  # one program instead of one for each random array
        init_cache=empty_cache,
        vocab_size=config.vocab_size,
        logit_softcap=config.logit_softcap,
        routing=routing if config.num_experts else None,
    )


def unstack_params(params: chex.ArrayTree) -> chex.ArrayTree:
    """The same parameters with ``layers`` as a tuple of one dict per layer.

    A decoding loop wants this: a scan over stacked weights copies each layer's
    weights out of the stack at every token.
    """
    layers = params.get("layers", ())  # () where the model is another, `policy_of`
    if isinstance(layers, tuple):
        return params
    count = jax.tree.leaves(layers)[0].shape[0]
    split = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count))
    return {**params, "layers": split}


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """Axis names of every parameter; see `Policy.logical_axes`."""

    def projection(*axes, bias=False):
        named = {"kernel": ("layers", *axes)}
        return {**named, "bias": ("layers", *axes[1:])} if bias else named

    norm = {"scale": ("layers", "norm")}
    attention = {
        "q": projection("embed", "heads", "head_dim", bias=config.qkv_bias),
        "k": projection("embed", "kv_heads", "head_dim", bias=config.qkv_bias),
        "v": projection("embed", "kv_heads", "head_dim", bias=config.qkv_bias),
        "o": projection("heads", "head_dim", "embed"),
    }
    for part, heads in (("q", "heads"), ("k", "kv_heads")) if config.qk_norm else ():
        joint = {"scale": ("layers", heads, "head_dim")}
        attention[f"{part}_norm"] = joint if config.joint_qk_norm else norm
    mlp: dict[str, Any] = {
        "gate": projection("embed", "mlp"),
        "up": projection("embed", "mlp"),
        "down": projection("mlp", "embed"),
    }
    if config.num_experts:
        mlp = {
            "router": ("layers", "embed", None),
            "gate": projection("experts", "embed", None),
            "up": projection("experts", "embed", None),
            "down": projection("experts", None, "embed"),
        }
    pre = ("attention", "mlp") * config.pre_norm
    post = ("attention_post", "mlp_post") * config.post_norm
    norms = {f"{name}_norm": norm for name in (*pre, *post)}
    axes = {
        "embed": ("vocab", "embed"),
        "layers": {"attention": attention, "mlp": mlp, **norms},
        "final_norm": _NORM,
    }
    if not config.tie_embeddings:
        axes["unembed"] = ("vocab", "embed")
    return axes


def _prefix_size(cache: Cache | None) -> int:
    """S, or 0 where there is no prefix."""
    if cache is None or cache.prefix is None:
        return 0
    return cache.prefix.mask.shape[1]


def _visibility(
    segment_ids: jax.Array, cache: Cache | None, how: str
) -> tuple[Visibility, Cache | None]:
    """What the new tokens see, and the cache with their segment ids written."""
    batch, time = segment_ids.shape
    segment_ids = segment_ids.astype(jnp.int32)
    if cache is None:
        length, seen = jnp.zeros((), jnp.int32), segment_ids
    else:
        length = cache.length
        seen = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, length))
        cache = replace(cache, segment_ids=seen, length=length + time)
    own, ring = None, cache is not None and cache.ring
    if how == "plain":
        own = segment_ids[:, :, None] == seen[:, None, :]
        own &= (segment_ids > 0)[:, :, None]
        if not ring:
            slots, query_slots = jnp.arange(seen.shape[1]), length + jnp.arange(time)
            own &= slots[None, None, :] <= query_slots[None, :, None]
    visibility = Visibility(segment_ids, seen, own, how=how, ring=ring)
    if cache is None:
        return visibility, None
    visibility = visibility.replace(length=length)
    if cache.prefix is None:
        return visibility, cache
    prefix = cache.prefix
    if prefix.index is not None:
        mask = prefix.mask[prefix.index]
    else:
        mask = jnp.repeat(prefix.mask, batch // prefix.mask.shape[0], axis=0)
    return visibility.replace(prefix=mask, index=prefix.index), cache


def _distances(visibility: Visibility, positions: jax.Array) -> Visibility:
    """With what the windows of layers count by."""
    visibility = visibility.replace(positions=positions)
    if visibility.own is not None:
        time, slots = visibility.own.shape[1:]
        first = 0 if visibility.length is None else visibility.length
        back = first + jnp.arange(time)[None, :, None] - jnp.arange(slots)[None, None]
        if visibility.ring:  # what lies behind the writing slot is the oldest
            back = back % slots
        visibility = visibility.replace(distance=back)
    if visibility.prefix is None:
        return visibility
    # A context's tokens stand at 0, 1, ..., wherever its padding is.
    ranks = jnp.cumsum(visibility.prefix, axis=1, dtype=jnp.int32) - 1
    return visibility.replace(prefix_positions=ranks)


def _run_layers(apply_layer, params, x, cos_sin, visibility, cache, kinds: LayerKind):
    """Scans over stacked layers, or loops over a tuple of them.

    Returns what they put out, the cache, and the loads of their experts ``[L, B, ...]``
    where they are measured.
    """
    layers, prefix = params["layers"], None if cache is None else cache.prefix
    layer_caches: Any = None
    if cache is not None:
        shared = (None, None) if prefix is None else (prefix.keys, prefix.values)
        layer_caches = LayerCache(cache.keys, cache.values, *shared)

    if not isinstance(layers, tuple):

        def body(x, layer):
            x, *out = apply_layer(layer[0], x, cos_sin, visibility, *layer[1:])
            return x, out

        x, (layer_caches, load) = jax.lax.scan(body, x, (layers, layer_caches, kinds))
    else:
        written, loads = [], []
        for i, layer in enumerate(layers):
            here = None
            if layer_caches is not None:
                # tuples with one array per layer, or stacked arrays
                fields = vars(layer_caches).values()
                parts: list[Any] = [None if v is None else v[i] for v in fields]
                here = LayerCache(*parts)
            kind = jax.tree.map(lambda x, i=i: x[i], kinds)
            x, here, load = apply_layer(layer, x, cos_sin, visibility, here, kind)
            written.append(here)
            loads.append(load)
        load = jax.tree.map(lambda *of: jnp.stack(of), *loads)
        if cache is not None:
            keys = tuple(layer.keys for layer in written)
            values = tuple(layer.values for layer in written)
            return x, replace(cache, keys=keys, values=values), load
    if cache is None:
        return x, None, load
    cache = replace(cache, keys=layer_caches.keys, values=layer_caches.values)
    return x, cache, load
