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


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, half-split form; x ``[B, T, H, d]``, positions ``[B, T]``."""
    half = x.shape[-1] // 2
    exponents = jnp.arange(half, dtype=jnp.float32)[None, None, None] / half
    angles = positions[..., None, None].astype(jnp.float32) * theta**-exponents
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale``, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        return (wide * inverse * scale.astype(wide.dtype)).astype(x.dtype)


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
    def __call__(self, x, positions, visibility, cache):
        c = self.config
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        queries = Projection(heads, use_bias=c.qkv_bias, name="q")(x)
        keys = Projection(kv_heads, use_bias=c.qkv_bias, name="k")(x)
        values = Projection(kv_heads, use_bias=c.qkv_bias, name="v")(x)
        if c.qk_norm:
            queries = RMSNorm(c.rms_norm_eps, name="q_norm")(queries)
            keys = RMSNorm(c.rms_norm_eps, name="k_norm")(keys)
        queries = rotate(queries, positions, c.rope_theta)
        keys = rotate(keys, positions, c.rope_theta)
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
        out = attend(queries, cache, visibility)
        return Projection((c.hidden_size,), axes=2, name="o")(out), cache


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (self.config.intermediate_size,)
        gate = Projection(width, name="gate")(x)
        up = Projection(width, name="up")(x)
        return Projection((x.shape[-1],), name="down")(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual connection."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, visibility, cache=None):
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="attention_norm")(x)
        out, cache = Attention(self.config, name="attention")(
            normed, positions, visibility, cache
        )
        x = x + out
        normed = RMSNorm(eps, name="mlp_norm")(x)
        return x + GatedMLP(self.config, name="mlp")(normed), cache
