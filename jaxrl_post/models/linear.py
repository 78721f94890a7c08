"""The product of a linear map, and its gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """``jnp.tensordot(x, kernel, axes)``, whose kernel's gradient is ``x^T g``.

    jax derives ``(g^T x)^T``, which is the same, but XLA's CPU backend multiplies it
    at half the rate, g being copied into the other order before: docs/performance.md.

    Args:
      x: ``[..., *inputs]``.
      kernel: ``[*inputs, *outputs]``, of x's dtype.
      axes: number of inputs' axes; static.

    Returns:
      ``[..., *outputs]``.
    """
    return jnp.tensordot(x, kernel, axes=axes)


def _forward(x, kernel, axes):
    # Not by `linear`: rematerialisation would not see a product, and not keep it.
    out = jnp.tensordot(x.value, kernel.value, axes=axes)
    # Of what is not trained, as the base below an adapter, no gradient is made.
    kept = x.value if kernel.perturbed else None
    return out, (kept, kernel.value if x.perturbed else None)


def _backward(axes, residuals, g):
    x, kernel = residuals
    to_x = to_kernel = None
    if kernel is not None:
        outputs = kernel.ndim - axes
        of_g, of_kernel = range(g.ndim - outputs, g.ndim), range(axes, kernel.ndim)
        to_x = jnp.tensordot(g, kernel, axes=(tuple(of_g), tuple(of_kernel)))
    if x is not None:
        tokens = tuple(range(x.ndim - axes))
        to_kernel = jnp.tensordot(x, g, axes=(tokens, tokens))
    return to_x, to_kernel


linear.defvjp(_forward, _backward, symbolic_zeros=True)
