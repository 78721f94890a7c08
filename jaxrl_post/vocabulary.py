"""The one place where hidden states meet the unembedding.

A language model's logits are its largest array: for one sequence of 8,192 tokens and a
vocabulary of 151,936 they are 5 GB. Nothing here builds it. `map_logits` walks over the
tokens a chunk at a time, hands each chunk's logits to a function, keeps the numbers per
token which that returns, and computes the chunk's logits again on the way back. Where
these are only added up, `sum_logits` computes nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_post._chunks import Walk, check_result, over_chunks
from jaxrl_post._logits import Logits as Logits
from jaxrl_post._logits import logits_dtype, make_logits, product_dtype, sanitise
from jaxrl_post.sharding.mesh import BATCH_AXES, VOCAB_AXIS


def map_logits(
    fn: Callable[..., Any],
    hidden: jax.Array | Sequence[jax.Array],
    unembedding: jax.Array | Sequence[jax.Array],
    *per_token: Any,
    mask: jax.Array | None = None,
    temperature: jax.typing.ArrayLike = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    batch_axes: Sequence[str] = BATCH_AXES,
    vocab_axis: str = VOCAB_AXIS,
) -> Any:
    """Applies `fn` to the logits of every token without ever holding them all.

        logits = softcap(hidden @ unembedding.T) / temperature
        softcap(z) = c * tanh(z / c)

    Tokens are walked over in chunks; a chunk's logits exist for that chunk only, and
    are computed again in the backward pass. The product runs in the dtype of `hidden`
    and accumulates in at least float32, as does the gradient of `unembedding`.

    Under a mesh the tokens are split over `batch_axes` by their leading axis and the
    vocabulary over `vocab_axis`; every device walks over its own tokens.

    >>> hidden = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> unembedding = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    >>> def score(logits, ids):
    ...     return {"logps": logits.log_probs(ids), "entropy": logits.entropy()}
    >>> scores = map_logits(score, hidden, unembedding, jnp.array([0, 0, 3]))
    >>> [round(float(logp), 3) for logp in scores["logps"]]
    [-0.744, -1.744, -2.006]

    Args:
      fn: `fn(*logits, *per_token)` gets one `Logits` per pair of `hidden` and
        `unembedding` and the chunk of each of `per_token`, tokens on one axis `[n]`,
        and returns a pytree of arrays `[n, ...]`. It is traced once. It may close over
        traced values; those that need a gradient belong into `per_token`, since before
        jax 0.11 a mesh and such a closure do not go together.
      hidden: `[..., D]`, tokens of any shape, or one such array per model (student,
        teacher, ...); their D may differ.
      unembedding: `[V, D]`, or one per model, of the same V; a single one serves all.
        Models that share it but not its gradient: `(w, lax.stop_gradient(w))`.
      *per_token: pytrees of arrays `[..., *rest]`, e.g. token ids and old log-probs.
      mask: `[...]`, true for tokens that count. The others may hold anything, NaN
        included: it reaches neither values nor gradients, and their results are 0.
      temperature: positive scalar, may be traced.
      softcap: bound of the logits before temperature (Gemma 2), or None.
      chunk_size: most tokens per chunk and device. None: as many as have 16 MiB of
        logits, but at least 192 and at most 4096.
      vocab_size: rows of `unembedding` from this one on are padding: no probability, no
        gradient. None: there are none.
      mesh: a mesh with Auto axes; None: that of `jax.set_mesh`, if any.
      batch_axes: mesh axes over which the leading axis of the tokens is split.
      vocab_axis: mesh axis over which the vocabulary is split.

    Returns:
      The pytree that `fn` returns, for all tokens: leaves `[..., *rest]`.

    Raises:
      ValueError: shapes disagree, or do not divide over the mesh.
    """
    walk = Walk(
        hidden,
        unembedding,
        *per_token,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        chunk_size=chunk_size,
        vocab_size=vocab_size,
        mesh=mesh,
        batch_axes=batch_axes,
        vocab_axis=vocab_axis,
    )

    def on_device(hiddens, weights, masters, per_token, mask, temperature):
        def step(carry, tokens):
            hiddens, per_token, mask = tokens
            logits = walk.logits(hiddens, weights, masters, mask, temperature)
            result = fn(*logits, *sanitise(mask, per_token))
            check_result(result, hiddens[0].shape[0])
            return carry, sanitise(mask, result)

        tokens = (hiddens, per_token, mask)
        return over_chunks(step, (), tokens, walk.chunk_size, remat=True)[1]

    return walk.run(on_device)


def sum_logits(
    fn: Callable[..., Any],
    hidden: jax.Array | Sequence[jax.Array],
    unembedding: jax.Array | Sequence[jax.Array],
    *per_token: Any,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """The sum of a loss over all tokens, its gradient formed where its logits are.

    A token's part in the gradient of a sum is known as soon as its logits are. So both
    gradients are made in the forward pass, and no logits are computed again on the way
    back, as in `map_logits`: that takes three products with the unembedding instead of
    four, and one instead of two for each model that is not trained. In exchange the
    gradient of `unembedding` exists from then on, and what `fn` returns beside the loss
    carries none.

    >>> hidden = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> unembedding = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> def loss(logits, ids, weights):
    ...     logps = logits.log_probs(ids)
    ...     return -weights * logps, {"logps": logps}
    >>> ids, weights = jnp.array([0, 2]), jnp.array([0.5, 0.5])
    >>> total, scores = sum_logits(loss, hidden, unembedding, ids, weights)
    >>> print(total.round(3), scores["logps"].round(3))
    1.051 [-0.551 -1.551]

    Args:
      fn: as in `map_logits`, but it returns a pair: the loss `[n]` of each token, all
        weights and denominators included, and a pytree of arrays `[n, ...]`.
      hidden, unembedding: as in `map_logits`. Of several models the first is the one
        that is trained: nothing else gets a gradient.
      *per_token: as in `map_logits`.
      **options: the other arguments of `map_logits`.

    Returns:
      The sum of the loss, at least float32, and the pytree for all tokens.

    Raises:
      ValueError: as `map_logits`.
    """
    walk = Walk(hidden, unembedding, *per_token, **options)

    def on_chunk(hidden, master, constants, tokens):
        """The chunk's loss, and its results; the first two arguments are trained."""
        weights, masters, temperature = constants
        hiddens, per_token, mask = tokens
        hiddens, masters = (hidden, *hiddens[1:]), (master, *masters[1:])
        logits = walk.logits(hiddens, weights, masters, mask, temperature)
        loss, result = fn(*logits, *sanitise(mask, per_token))
        if jnp.shape(loss) != hidden.shape[:1]:
            raise ValueError(
                f"sum_logits: fn's loss has shape {jnp.shape(loss)}; it must be "
                f"[{hidden.shape[0]}]: one number per token."
            )
        check_result(result, hidden.shape[0])
        return sanitise(mask, loss).sum(), sanitise(mask, result)

    @jax.custom_vjp
    def total_of(hidden, master, constants, tokens):
        def step(total, chunk):
            loss, result = on_chunk(chunk[0][0], master, constants, chunk)
            return total + loss, result

        zero = jnp.zeros_like(hidden, master.dtype, ())
        return over_chunks(step, zero, tokens, walk.chunk_size)

    def forward(hidden, master, constants, tokens):
        gradients_of = jax.value_and_grad(on_chunk, (0, 1), has_aux=True)

        def step(sums, chunk):
            (loss, result), (to_hidden, to_master) = gradients_of(
                chunk[0][0], master, constants, chunk
            )
            return jax.tree.map(jnp.add, sums, (loss, to_master)), (result, to_hidden)

        zeros = jnp.zeros_like(hidden, master.dtype, ()), jnp.zeros_like(master)
        sums, (result, to_hidden) = over_chunks(step, zeros, tokens, walk.chunk_size)
        total, to_master = sums
        return (total, result), (to_hidden, to_master)

    def backward(gradients, cotangents):
        scaled = (cotangents[0].astype(g.dtype) * g for g in gradients)
        return (*scaled, None, None)

    total_of.defvjp(forward, backward)

    def on_device(hiddens, weights, masters, per_token, mask, temperature):
        constants = lax.stop_gradient((weights, masters, temperature))
        tokens = lax.stop_gradient((hiddens, per_token, mask))
        total, result = total_of(hiddens[0], masters[0], constants, tokens)
        return total[None], result  # one for each shard of the batch

    totals, result = walk.run(on_device)
    return totals.sum(), result


def logits(
    hidden: jax.Array,
    unembedding: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> jax.Array:
    """Logits `[n, V]` of a few tokens, such as the next of each sequence in decoding.

    The same arithmetic as in `map_logits`; padding rows get -1e9.

    Args:
      hidden: `[n, D]`.
      unembedding: `[V, D]`.
      temperature: positive scalar, may be traced.
      softcap: bound of the logits before temperature, or None.
      vocab_size: rows from this one on are padding; None: there are none.

    >>> logits(jnp.ones((1, 2)), jnp.eye(3, 2), temperature=0.5, vocab_size=2)
    Array([[ 2.e+00,  2.e+00, -1.e+09]], dtype=float32)
    """
    weights = unembedding.astype(product_dtype(hidden, unembedding))
    master = unembedding.astype(logits_dtype(hidden, unembedding))
    return make_logits(
        hidden, weights, master, None, temperature, softcap, vocab_size, None
    ).values
