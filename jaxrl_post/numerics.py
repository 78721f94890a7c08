"""The few numerical habits that every formula of the package shares."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Scalar = float | jax.Array
"""A hyper-parameter that may be a Python number or a traced scalar."""


def promote(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """The arrays in one floating dtype: at least float32, float64 stays float64.

    >>> (x,) = promote(jnp.ones(2, jnp.bfloat16))
    >>> str(x.dtype)
    'float32'
    """
    converted = [jnp.asarray(x) for x in arrays]
    dtype = jnp.result_type(*converted)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)  # whole numbers: the default, float64 under x64
    dtype = jnp.promote_types(dtype, jnp.float32)
    return tuple(x.astype(dtype) for x in converted)


def clamp(
    x: jax.Array, low: Scalar | None = None, high: Scalar | None = None
) -> jax.Array:
    """`x` limited to `[low, high]`: gradient 1 on the closed interval, 0 outside.

    Differs from `jnp.clip` at the bounds themselves, where that halves the gradient;
    this is `torch.clamp`'s rule, which the reference implementations train with.
    """
    dtype = x.dtype
    if low is not None:
        x = jnp.where(x < low, low, x)
    if high is not None:
        x = jnp.where(x > high, high, x)
    return x.astype(dtype)


def bounded_exp(x: jax.Array) -> jax.Array:
    """`exp(x)` that cannot overflow: `x` is limited to half the dtype's range.

    The limit is 44.4 in float32 (a factor of 2e19), far beyond any ratio that still
    means something, and leaves room for products with advantages.
    """
    return jnp.exp(clamp(x, high=math.log(float(jnp.finfo(x.dtype).max)) / 2))


def bounded(x: jax.Array) -> jax.Array:
    """`x` limited so that products of two such numbers are finite (float32: 1.8e16)."""
    limit = float(jnp.finfo(x.dtype).max) ** 0.5 / 1024
    return clamp(x, -limit, limit)


def is_traced(value: object) -> bool:
    """Whether `value` has no number yet: an argument of jit, grad or vmap."""
    return isinstance(value, jax.core.Tracer)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    static: bool = False,
) -> None:
    """Refuses a hyper-parameter outside `[low, high]`; None and tracers pass.

    A traced value has no number yet, so it passes unless the parameter is `static`,
    that is, chooses between programs.
    """
    if value is None:
        return
    if is_traced(value):
        if static:
            raise TypeError(
                f"{name} chooses the program and must be a Python number, got a traced "
                "array; pass it outside of the arguments of jit, grad and vmap."
            )
        return
    number = float(value)
    above = low < number if open_low else low <= number
    below = number < high if open_high else number <= high
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name}={value} is not in {left}{low:g}, {high:g}{right}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a mode that does not exist, naming those that do."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.")
