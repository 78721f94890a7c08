"""The decoder layer: RMSNorm, rotary grouped-query attention, gated MLP.

Flax Linen modules, applied functionally: a layer is a pure function of its own
parameters, and the stack (`models.stack`) scans over them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrl_post.models.adapters import EXTRAS, project
from jaxrl_post.models.attention import LayerCache, attend
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.experts import choose_experts, load_of, routed
from jaxrl_post.models.kinds import Rotations

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu}


CosSin = tuple[jax.Array, jax.Array]
"""Cosine and sine of every rotation's angles, ``[K, B, T, 1, half]`` each."""


def cos_sin_of(rotations: Rotations, positions: jax.Array) -> CosSin:
    """What `rotate` multiplies by, at positions ``[B, T]``.

    Made once for all layers: in a layer XLA would compute a cosine for each head, and
    again in every product that reads the result.
    """
    frequencies = jnp.asarray(rotations.frequencies)[:, None, None, None]
    multipliers = jnp.asarray(rotations.multipliers)[:, None, None, None, None]
    angles = positions[None, ..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * multipliers, jnp.sin(angles) * multipliers


def rotate(x: jax.Array, cos_sin: CosSin, which: jax.typing.ArrayLike = 0) -> jax.Array:
    """Rotary embedding, half-split form.

    Args:
      x: ``[B, T, H, d]``; of d the first ``2 half`` are rotated.
      cos_sin: of all rotations, see `cos_sin_of`.
      which: ``[]`` int, the rotation.

    Returns:
      Like x.
    """
    cos, sin = (table[which] for table in cos_sin)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], -1)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * (scale + offset)``, in float32.

    The mean is over the last `axes` of x.
    """

    eps: float
    offset: float = 0.0
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", init, x.shape[x.ndim - self.axes :])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        over = tuple(range(-self.axes, 0))
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, over, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale, range(x.ndim - self.axes)).astype(wide.dtype)
        return (wide * inverse * (scale + self.offset)).astype(x.dtype)


class Projection(nn.Module):
    """A linear map onto trailing axes `features`, contracting the last `axes` of x.

    The kernel keeps heads as an axis of its own, so that it can be sharded by heads.
    What may stand beside it: see `adapters.project`.
    """

    features: tuple[int, ...]
    axes: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        contracted = x.shape[x.ndim - self.axes :]
        fan_in = math.prod(contracted)
        init = nn.initializers.normal(1.0 / math.sqrt(fan_in))
        kernel = self.param("kernel", init, (*contracted, *self.features))
        beside: Any = {name: self.get_variable("params", name) for name in EXTRAS}
        out = project(x, {"kernel": kernel, **beside}, self.axes)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            out = out + jnp.expand_dims(bias, range(x.ndim - self.axes)).astype(x.dtype)
        return out


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, cos_sin, visibility, cache, kind):
        c = self.config
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        queries = Projection(heads, use_bias=c.qkv_bias, name="q")(x)
        keys = Projection(kv_heads, use_bias=c.qkv_bias, name="k")(x)
        values = Projection(kv_heads, use_bias=c.qkv_bias, name="v")(x)
        if c.qk_norm:
            norm = c.rms_norm_eps, c.norm_offset, 1 + c.joint_qk_norm
            queries = RMSNorm(*norm, name="q_norm")(queries)
            keys = RMSNorm(*norm, name="k_norm")(keys)
        which = 0 if kind.rotation is None else kind.rotation
        queries, keys = (rotate(part, cos_sin, which) for part in (queries, keys))
        if c.query_scalar is not None:  # scores are divided by the root of head_dim
            queries = queries * math.sqrt(c.head_dim / c.query_scalar)
        # Heads before slots, as attention's products read them: otherwise every decoded
        # token would transpose the whole cache.
        keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
        if cache is None:
            cache = LayerCache(keys, values)
        else:
            at = value_at = (0, 0, visibility.length, 0)
            if visibility.ring:
                keys, at = jnp.swapaxes(keys, 2, 3), (0, 0, 0, visibility.length)
            write = jax.lax.dynamic_update_slice
            cache = cache.replace(
                keys=write(cache.keys, keys.astype(cache.keys.dtype), at),
                values=write(cache.values, values.astype(cache.values.dtype), value_at),
            )
        out = attend(queries, cache, visibility.replace(window=kind.window))
        return Projection((c.hidden_size,), axes=2, name="o")(out), cache


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, or with another activation."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (self.config.intermediate_size,)
        gate = Projection(width, name="gate")(x)
        up = Projection(width, name="up")(x)
        gate = ACTIVATIONS[self.config.activation](gate)
        return Projection((x.shape[-1],), name="down")(gate * up)


class Experts(nn.Module):
    """A matrix of each expert ``[E, inputs, outputs]``, and what stands beside it."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        beside: Any = {name: self.get_variable("params", name) for name in EXTRAS}
        kernel = self.param("kernel", init, self.shape)
        return {"kernel": kernel, **{k: v for k, v in beside.items() if v is not None}}


class RoutedMLP(nn.Module):
    """Gated MLPs of which a router chooses some for each token.

    Of the tokens in `mask` ``[B, T]``, where there is one, the `experts.Load` too.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None):
        c = self.config
        width, count, inner = x.shape[-1], c.num_experts, c.expert_size
        assert count is not None
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        routes = choose_experts(
            x,
            self.param("router", init, (width, count)),
            chosen=c.experts_per_token,
            normalise=c.normalise_experts,
        )
        gate = Experts((count, width, inner), name="gate")()
        up = Experts((count, width, inner), name="up")()
        down = Experts((count, inner, width), name="down")()
        out = routed(x, routes, (gate, up, down), ACTIVATIONS[c.activation])
        return out, None if mask is None else load_of(routes, mask)


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norms and its residual connection.

    Returns what goes on to the next layer, the cache, and where `measured` the load of
    the experts, else None.
    """

    config: DecoderConfig
    measured: bool = False

    @nn.compact
    def __call__(self, x, cos_sin, visibility, kind, cache=None):
        c = self.config

        def norm(x, name, wanted):
            if not wanted:
                return x
            return RMSNorm(c.rms_norm_eps, c.norm_offset, name=f"{name}_norm")(x)

        normed = norm(x, "attention", c.pre_norm)
        out, cache = Attention(c, name="attention")(
            normed, cos_sin, visibility, cache, kind
        )
        x = x + norm(out, "attention_post", c.post_norm)
        normed, load = norm(x, "mlp", c.pre_norm), None
        if c.num_experts:
            real = visibility.queries > 0 if self.measured else None
            out, load = RoutedMLP(c, name="mlp")(normed, real)
        else:
            out = GatedMLP(c, name="mlp")(normed)
        return x + norm(out, "mlp_post", c.post_norm), cache, load
