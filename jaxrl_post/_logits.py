"""The logits of a chunk of tokens, whole or a slice of the vocabulary per device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PADDING = -1e9
"""The logit of a padding row: finite, so that 0 * log(0) is 0, yet exp of it is 0."""


class Logits:
    """The logits of a chunk of tokens over a vocabulary that may be sharded.

    Every method is right, in value and gradient, on one device and where each device
    holds a slice of the vocabulary: results per token are complete on every device.
    Only `values` and `log_softmax()` are the device's own slice; what is computed from
    them becomes whole through `sum`, `sum_shards` or `expectation`.

    >>> logits = Logits(jnp.log(jnp.array([[0.5, 0.25, 0.25]])))
    >>> logits.log_probs(jnp.array([1])).round(4)
    Array([-1.3863], dtype=float32)
    >>> logits.entropy().round(4)
    Array([1.0397], dtype=float32)
    >>> logits.top_k(2)[1]
    Array([[0, 1]], dtype=int32)

    Attributes:
      values: `[n, V]`, this device's logits, after softcap and temperature, at least
        float32. Entries of padding rows are -1e9: probability and gradient 0.
    """

    def __init__(
        self,
        values: jax.Array,
        *,
        vocab_size: int | None = None,
        axis_name: str | None = None,
    ):
        """Wraps logits `[n, V]`.

        Args:
          values: `[n, V]`; under `axis_name` each device's slice of the vocabulary.
          vocab_size: rows from this id on are padding; None: there are none.
          axis_name: the `shard_map` axis over which the vocabulary is split, or None.
        """
        self._axis_name = axis_name
        width = values.shape[-1]
        shards = 1 if axis_name is None else lax.axis_size(axis_name)
        self._vocab_size = width * shards if vocab_size is None else vocab_size
        self._first = 0 if axis_name is None else lax.axis_index(axis_name) * width
        self._valid = None
        if self._vocab_size < width * shards:
            self._valid = (self._first + jnp.arange(width) < self._vocab_size)[None]
            values = jnp.where(self._valid, values, PADDING)
        self.values = values

        peak = lax.stop_gradient(values).max(axis=-1)
        if axis_name is not None:
            peak = lax.pmax(peak, axis_name)
        total = self.sum_shards(jnp.exp(values - peak[:, None]).sum(axis=-1))
        self._logsumexp = jnp.log(total) + peak

    def mix(self, other: Logits, share: float | jax.Array) -> Logits:
        """The logits `(1 - share) * self + share * other`, of the same vocabulary.

        As a distribution it is their normalised geometric mean: what a trust region
        around `self` allows of `other`.
        """
        return Logits(
            (1 - share) * self.values + share * other.values,
            vocab_size=self._vocab_size,
            axis_name=self._axis_name,
        )

    def logsumexp(self) -> jax.Array:
        """Log of the normaliser, `[n]`."""
        return self._logsumexp

    def log_softmax(self) -> jax.Array:
        """Log-probabilities `[n, V]` of this device's slice of the vocabulary."""
        return self.values - self._logsumexp[:, None]

    def log_probs(self, ids: jax.Array) -> jax.Array:
        """Log-probabilities of `ids`, `[n]` or `[n, K]`; same shape.

        An id outside the vocabulary gives NaN rather than a number that looks right.
        """
        lse = self._logsumexp
        return self._lookup(ids) - (lse if ids.ndim == 1 else lse[:, None])

    def top_k(self, k: int) -> tuple[jax.Array, jax.Array]:
        """The `min(k, V)` largest logits and their ids, as `lax.top_k` orders them.

        Values are logits: subtract `logsumexp()` for log-probabilities. Of equal
        logits the lowest id comes first. Ids carry no gradient; values do.

        Returns:
          values `[n, K]` and int32 ids `[n, K]`.
        """
        k = min(k, self._vocab_size)
        values = lax.stop_gradient(self.values)
        best, ids = lax.top_k(values, min(k, values.shape[-1]))
        if self._axis_name is not None:
            # Candidates lie in the order of the shards, hence of ids, so that the
            # second pass breaks ties as one pass over the whole row would.
            best = _all_gather_invariant(best, self._axis_name)
            ids = _all_gather_invariant(ids + self._first, self._axis_name)
            ids = jnp.take_along_axis(ids, lax.top_k(best, k)[1], axis=-1)
        return self._lookup(ids), ids

    def entropy(self) -> jax.Array:
        """Entropy `-sum_v p_v log p_v` in nats, `[n]`."""
        return -self.expectation(lambda logps: logps)

    def expectation(self, f: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`sum_v p_v f(log p)_v` under these logits' distribution, `[n]`.

        `f` maps the log-probabilities `[n, V]` of this device's slice to values of the
        same shape, and may use other `Logits` of the same chunk:

            forward = teacher.expectation(lambda logps: logps - student.log_softmax())
            reverse = student.expectation(lambda logps: logps - teacher.log_softmax())
        """
        logps = self.log_softmax()
        return self.sum(jnp.exp(logps) * f(logps))

    def sum(self, values: jax.Array) -> jax.Array:
        """Sum over the whole vocabulary of `[n, V]` values, padding left out; `[n]`."""
        if self._valid is not None:
            values = jnp.where(self._valid, values, 0)
        return self.sum_shards(values.sum(axis=-1))

    def sum_shards(self, partial: jax.Array) -> jax.Array:
        """Adds what each device has already summed over its slice of the vocabulary.

        It makes a function that sums over its last axis right on a sharded one:

            student.sum_shards(losses.divergence(
                student.log_softmax(), teacher.log_softmax(), alpha=0.5))
        """
        if self._axis_name is None:
            return partial
        return lax.psum(partial, self._axis_name)

    def _lookup(self, ids: jax.Array) -> jax.Array:
        columns = ids[:, None] if ids.ndim == 1 else ids
        local = columns.astype(jnp.int32) - self._first
        own = (local >= 0) & (local < self.values.shape[-1])
        found = jnp.take_along_axis(
            self.values, jnp.where(own, local, 0), axis=-1, mode="promise_in_bounds"
        )
        found = self.sum_shards(jnp.where(own, found, 0))
        inside = (columns >= 0) & (columns < self._vocab_size)
        return jnp.where(inside, found, jnp.nan).reshape(ids.shape)


def make_logits(
    hidden, weights, master, mask, temperature, softcap, vocab_size, axis_name
) -> Logits:
    if axis_name is not None:
        hidden = lax.pcast(hidden, axis_name, to="varying")
    values = _project(sanitise(mask, hidden), weights, master)
    # Once more after the product: a NaN that `fn`'s derivative makes of a masked
    # token's zeros would otherwise reach the weights' gradient as NaN * 0.
    values = sanitise(mask, values)
    if softcap is not None:
        values = softcap * jnp.tanh(values / softcap)
    values = values / jnp.asarray(temperature, values.dtype)
    return Logits(values, vocab_size=vocab_size, axis_name=axis_name)


def _all_gather_invariant(x: jax.Array, axis_name: str) -> jax.Array:
    """The shards' columns side by side, `[n, shards * k]`, the same on every device."""
    shards, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    slot = (jnp.arange(shards) == index)[None, :, None]
    columns = lax.psum(jnp.where(slot, x[:, None, :], 0), axis_name)
    return columns.reshape(x.shape[0], -1)


@jax.custom_vjp
def _project(hidden: jax.Array, weights: jax.Array, master: jax.Array) -> jax.Array:
    """`hidden @ weights.T`; the gradient goes to `master`, whose value is not read.

    JAX adds up a loop's gradients in the dtype of what they belong to. `master` is the
    unembedding in the dtype of the logits, so bfloat16 weights get a float32 sum.
    """
    dtype = master.dtype
    return jnp.einsum("nd,vd->nv", hidden, weights, preferred_element_type=dtype)


def _project_forward(hidden, weights, master):
    return _project(hidden, weights, master), (hidden, weights)


def _project_backward(residuals, cotangent):
    hidden, weights = residuals
    dtype = cotangent.dtype
    # bfloat16 reaches as low as float32 does; in float16 small gradients would vanish.
    if hidden.dtype == jnp.bfloat16:
        cotangent = cotangent.astype(jnp.bfloat16)
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    to_hidden = product("nv,vd->nd", cotangent, weights)
    to_master = product("nv,nd->vd", cotangent, hidden)
    return to_hidden.astype(hidden.dtype), None, to_master


_project.defvjp(_project_forward, _project_backward)


def product_dtype(hidden: jax.Array, weights: jax.Array) -> jnp.dtype:
    half = jnp.finfo(hidden.dtype).bits < 32
    return hidden.dtype if half else jnp.result_type(hidden, weights)


def logits_dtype(hidden: jax.Array, weights: jax.Array) -> jnp.dtype:
    return jnp.promote_types(product_dtype(hidden, weights), jnp.float32)


def sanitise(mask: jax.Array | None, tree: Any) -> Any:
    """Zeros where the mask is false, in values and (so `where` derives) gradients."""
    if mask is None:
        return tree

    def keep(x):
        column = mask.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(column, x, jnp.zeros((), x.dtype))

    return jax.tree.map(keep, tree)
