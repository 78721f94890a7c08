"""The field's attention kernels, given what this package's masks mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_post.models.chunked import SAVED_NAME, fill_up

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
"""Where each kernel runs."""

_LANES = 128
_LARGEST_BLOCK = 512


def problem(name: str, time: int, prefix: int, head_dim: int, dtype: Any) -> str | None:
    """Why a kernel cannot take these shapes, or is not worth it; None where it can."""
    if name == "splash":
        if head_dim % 64:
            return f"head_dim={head_dim} is not a multiple of 64"
        return None
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim={head_dim} is not a multiple of 8 up to 128"
    if prefix > time:
        return f"{prefix} tokens of prefix outweigh {time} queries"
    return None


def splash(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    offset: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments by jax's splash kernel (Pallas, TPU).

    Args:
      queries: ``[B, T, H, d]``.
      keys, values: ``[B, Hkv, N, d]``, N = offset + T.
      query_segments, key_segments: ``[B, T]`` and ``[B, N]`` int32; a query sees the
        keys of its own segment up to slot ``offset + t``, which must be one of them.
      offset: slots before the first query's.
      interpret: run the kernel's program without a TPU, slowly.

    Returns:
      ``[B, T, H, d]``.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    time, heads, dim = queries.shape[1:]
    slots = keys.shape[2]
    block_q, block_kv = _block(time), _block(slots)
    q = jnp.swapaxes(queries, 1, 2) * jnp.asarray(1 / math.sqrt(dim), queries.dtype)
    q, keys, values = (
        fill_up(x, 2, block)
        for x, block in ((q, block_q), (keys, block_kv), (values, block_kv))
    )
    mask = lib.CausalMask((q.shape[2], keys.shape[2]), offset)
    kernel = lib.make_splash_mha(
        lib.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=lib.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
    segments = lib.SegmentIds(
        q=fill_up(query_segments, 1, block_q), kv=fill_up(key_segments, 1, block_kv)
    )
    out = jax.vmap(kernel)(q, keys, values, segments)
    return jnp.swapaxes(out[:, :, :time], 1, 2).astype(queries.dtype)


def cudnn(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    offset: int = 0,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal attention among the real tokens of each row by cuDNN.

    cuDNN knows causality from the first slot on and padding at the end. So each row's
    real tokens are moved to its front, and queries stand at their own keys' places,
    with dummies where the prefix has none: ``offset^2 / 2`` scores are computed in
    vain.

    Args: as in `splash`, but segments tell padding (0 or less) from tokens, no more;
      a query of another segment yields NaN.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      ``[B, T, H, d]``, 0 at padding.
    """
    real = key_segments > 0
    order = jnp.argsort(~real, axis=1, stable=True)[:, :, None, None]
    back = jnp.argsort(order, axis=1)
    lengths = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)
    q = jnp.pad(queries, ((0, 0), (offset, 0), (0, 0), (0, 0)))
    q, keys, values = (
        jnp.take_along_axis(x, order, axis=1)
        for x in (q, jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2))
    )
    out = jax.nn.dot_product_attention(
        q,
        keys,
        values,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    out = jnp.take_along_axis(out, back, axis=1)[:, offset:]
    padding = query_segments[:, :, None, None] <= 0
    out = jnp.where(padding, 0, out)
    return jnp.where(jnp.any(query_segments > 1), jnp.nan, out)


KERNELS: dict[str, Callable[..., jax.Array]] = {"splash": splash, "cudnn": cudnn}


def _block(size: int) -> int:
    """The size of a kernel's blocks: whole lanes, no more than the tokens need."""
    return min(_LARGEST_BLOCK, -(-size // _LANES) * _LANES)
