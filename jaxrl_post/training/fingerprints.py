"""Checksums of a checkpoint's arrays, which no process need have whole."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.sharding.processes import fetch, is_spread

SHA256, SUMS = "sha256", "sums"
"""Kinds of checksums."""

_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def kind_for(arrays: Mapping[str, Any]) -> str:
    """`SUMS` where an array is spread over processes, which compute them in place."""
    return SUMS if any(map(is_spread, arrays.values())) else SHA256


def checksums(arrays: Mapping[str, Any], kind: str) -> dict[str, str]:
    """A checksum of each array's dtype, shape and contents.

    Args:
      arrays: of NumPy or JAX, by name.
      kind: `SHA256`, for which arrays that are spread over processes are fetched, one
        at a time; or `SUMS`.
    """
    if kind == SUMS:
        return sums(arrays)
    if any(map(is_spread, arrays.values())):
        return {name: _sha256(fetch(x)) for name, x in arrays.items()}
    with ThreadPoolExecutor() as pool:  # hashing large buffers lets other threads run
        return dict(zip(arrays, pool.map(_sha256, arrays.values()), strict=True))


def _sha256(array: Any) -> str:
    host = np.asarray(array)
    digest = hashlib.sha256(f"{host.dtype} {host.shape} ".encode())
    digest.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def sums(arrays: Mapping[str, Any]) -> dict[str, str]:
    """64 bits of each array's dtype, shape and contents, as 16 hexadecimal digits.

    Every 32-bit word is hashed together with its place, and the hashes are added up
    modulo 2^32, twice with different seeds. Integer addition does not mind the order:
    each device sums over what it holds, and the result is the same on every mesh and
    for every number of processes. It finds damage; it is no defence against forgery.

    >>> a = np.arange(6, dtype=np.float32)
    >>> same = sums({"a": a, "b": a.copy()})
    >>> same["a"] == same["b"], len(same["a"])
    (True, 16)
    >>> swapped = sums({"a": a[::-1], "b": a.reshape(2, 3)})
    >>> len({*same.values(), *swapped.values()})
    3

    Args:
      arrays: of NumPy or JAX, by name; those on several devices on the same mesh.
    """
    if not arrays:
        return {}
    words = np.asarray(fetch(_all_sums(list(arrays.values()))))
    return {
        name: "".join(f"{word:08x}" for word in row)
        for name, row in zip(arrays, words.tolist(), strict=True)
    }


@jax.jit
def _all_sums(arrays: list[Any]) -> jax.Array:
    return jnp.stack([_sums(x) for x in arrays])


def _sums(x: jax.Array) -> jax.Array:
    """``[2]`` uint32."""
    salt = np.uint32(zlib.crc32(f"{x.dtype} {x.shape}".encode()))
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * np.uint32(size) + index
    hashed = [_mix(words ^ _mix(place + np.uint32(seed) + salt)) for seed in _SEEDS]
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32) for h in hashed])


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as 32-bit words."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}")
    return bits.astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the argument matters to all.

    Source: the finalizer of MurmurHash3 (Appleby, in the public domain).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
