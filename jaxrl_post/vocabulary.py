"""The one place where hidden states meet the unembedding.

A language model's logits are its largest array: for one sequence of 8,192 tokens and a
vocabulary of 151,936 they are 5 GB. Nothing here builds it. `map_logits` walks over the
tokens a chunk at a time, hands each chunk's logits to a function, keeps the numbers per
token which that returns, and computes the chunk's logits again on the way back. Where
these are only added up, `sum_logits` computes nothing twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrl_post._logits import Logits as Logits
from jaxrl_post._logits import logits_dtype, make_logits, product_dtype, sanitise
from jaxrl_post.sharding.mesh import BATCH_AXES, VOCAB_AXIS, auto_axes


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
    walk = _Walk(
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
            _check_result(result, hiddens[0].shape[0])
            return carry, sanitise(mask, result)

        tokens = (hiddens, per_token, mask)
        return _over_chunks(step, (), tokens, walk.chunk_size, remat=True)[1]

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
    walk = _Walk(hidden, unembedding, *per_token, **options)

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
        _check_result(result, hidden.shape[0])
        return sanitise(mask, loss).sum(), sanitise(mask, result)

    @jax.custom_vjp
    def total_of(hidden, master, constants, tokens):
        def step(total, chunk):
            loss, result = on_chunk(chunk[0][0], master, constants, chunk)
            return total + loss, result

        zero = jnp.zeros_like(hidden, master.dtype, ())
        return _over_chunks(step, zero, tokens, walk.chunk_size)

    def forward(hidden, master, constants, tokens):
        gradients_of = jax.value_and_grad(on_chunk, (0, 1), has_aux=True)

        def step(sums, chunk):
            (loss, result), (to_hidden, to_master) = gradients_of(
                chunk[0][0], master, constants, chunk
            )
            return jax.tree.map(jnp.add, sums, (loss, to_master)), (result, to_hidden)

        zeros = jnp.zeros_like(hidden, master.dtype, ()), jnp.zeros_like(master)
        sums, (result, to_hidden) = _over_chunks(step, zeros, tokens, walk.chunk_size)
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


class _Walk:
    """The arguments of a pass, checked, and where it runs."""

    def __init__(
        self,
        hidden,
        unembedding,
        *per_token,
        mask=None,
        temperature=1.0,
        softcap=None,
        chunk_size=None,
        vocab_size=None,
        mesh=None,
        batch_axes=BATCH_AXES,
        vocab_axis=VOCAB_AXIS,
    ) -> None:
        several = (tuple, list)
        hiddens = hidden if isinstance(hidden, several) else (hidden,)
        weights = unembedding if isinstance(unembedding, several) else (unembedding,)
        if len(weights) == 1:
            weights = tuple(weights) * len(hiddens)
        _check_shapes(hiddens, weights, per_token, mask)
        traced = isinstance(temperature, jax.core.Tracer)
        if not traced and not np.asarray(temperature) > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        rows = weights[0].shape[0]
        if vocab_size is not None and not 1 <= vocab_size <= rows:
            raise ValueError(
                f"vocab_size is {vocab_size}; unembedding has {rows} rows."
            )

        sizes = auto_axes(mesh)
        self._mesh, self._axes = mesh, frozenset(sizes)
        self._batch_axes = tuple(a for a in batch_axes if sizes.get(a, 1) > 1)
        self._axis_name = vocab_axis if sizes.get(vocab_axis, 1) > 1 else None
        split = (self._axis_name,) if self._axis_name else ()
        lead = hiddens[0].shape[0]
        _check_divides("tokens' leading axis", lead, self._batch_axes, sizes)
        _check_divides("unembedding's rows", rows, split, sizes)
        self.chunk_size = chunk_size or _default_chunk_size(
            rows // math.prod(sizes[axis] for axis in split)
        )
        self._make_logits = functools.partial(
            make_logits,
            softcap=softcap,
            vocab_size=vocab_size,
            axis_name=self._axis_name,
        )
        pairs = list(zip(hiddens, weights, strict=True))
        self._arguments = (
            tuple(hiddens),
            tuple(lax.stop_gradient(w).astype(product_dtype(h, w)) for h, w in pairs),
            tuple(w.astype(logits_dtype(h, w)) for h, w in pairs),
            per_token,
            None if mask is None else mask.astype(bool),
            jnp.asarray(temperature),
        )

    def logits(self, hiddens, weights, masters, mask, temperature) -> list[Logits]:
        """A chunk's, one for each model."""
        return [
            self._make_logits(h, w, m, mask, temperature)
            for h, w, m in zip(hiddens, weights, masters, strict=True)
        ]

    def run(self, on_device: Callable[..., Any]) -> Any:
        """`on_device` of the arguments, on every device's own tokens.

        The result has the tokens' leading axis.
        """
        if not self._batch_axes and self._axis_name is None:
            return on_device(*self._arguments)

        def varying(hiddens, weights, masters, *others):
            # Tell JAX before the loop that every device uses the weights for tokens of
            # its own: their gradients are added up once, after the loop, in float32.
            own = lax.pcast((weights, masters), self._batch_axes, to="varying")
            return on_device(hiddens, *own, *others)

        tokens, vocabulary = P(self._batch_axes), P(self._axis_name)
        return jax.shard_map(
            varying,
            mesh=self._mesh,
            axis_names=self._axes,
            in_specs=(tokens, vocabulary, vocabulary, tokens, tokens, P()),
            out_specs=tokens,
        )(*self._arguments)


def _over_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    tokens: Any,
    chunk_size: int,
    *,
    remat: bool = False,
) -> tuple[Any, Any]:
    """`lax.scan` of `step` over chunks `[chunk, rest]` of tokens `[..., rest]`.

    Args:
      step: `step(carry, chunk) -> carry, result`, results `[chunk, rest]`.
      carry: to begin with.
      tokens: hidden states, `per_token`, and the mask or None.
      chunk_size: most tokens per chunk.
      remat: compute chunks again on the way back.

    Returns:
      The last carry, and the results of all tokens, `[..., rest]`.
    """
    hiddens, per_token, mask = tokens
    lead = hiddens[0].shape[:-1]
    n = math.prod(lead)
    chunks = max(1, -(-n // chunk_size))
    size = -(-n // chunks)
    padding = chunks * size - n
    if padding and mask is None:
        mask = jnp.ones(lead, bool)

    def flatten(x):
        return x.reshape(n, *x.shape[len(lead) :])

    def split(x):
        if padding:
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    def join(x):
        return x.reshape(chunks * size, *x.shape[2:])[:n]

    tokens = jax.tree.map(flatten, (hiddens, per_token, mask))
    if chunks == 1:
        carry, result = step(carry, tokens)
    else:
        if remat:
            # Inside a loop nothing can be merged with the forward pass, so that
            # prevent_cse's barriers would only get in the compiler's way.
            step = jax.checkpoint(step, prevent_cse=False)
        carry, result = lax.scan(step, carry, jax.tree.map(split, tokens))
        result = jax.tree.map(join, result)
    return carry, jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), result)


def _default_chunk_size(local_rows: int) -> int:
    # Few tokens keep a chunk's logits in a CPU's cache, and memory low; with fewer than
    # some 200 operations for each byte of the unembedding, which every chunk reads
    # anew, an accelerator would wait for it.
    return min(max(2**22 // local_rows, 192), 4096)


def _check_shapes(hiddens, weights, per_token, mask) -> None:
    if len(hiddens) != len(weights):
        raise ValueError(
            f"map_logits got {len(hiddens)} hidden and {len(weights)} unembedding "
            "arrays; give one unembedding per hidden, or a single one for all."
        )
    lead = hiddens[0].shape[:-1]
    if not lead:
        raise ValueError(f"hidden must be [..., D], got shape {hiddens[0].shape}.")
    for h, w in zip(hiddens, weights, strict=True):
        if h.shape[:-1] != lead or w.ndim != 2 or h.shape[-1] != w.shape[-1]:
            raise ValueError(
                f"hidden {h.shape} and unembedding {w.shape} do not fit: they must be "
                f"{[*lead, 'D']} and [V, D]."
            )
        if w.shape[0] != weights[0].shape[0]:
            raise ValueError(
                "All unembeddings need the same number of rows, got "
                f"{[w.shape[0] for w in weights]}; pad the shorter and give vocab_size."
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path((*per_token, mask)):
        if leaf.shape[: len(lead)] != lead:
            last = path[0].idx == len(per_token)
            name = "mask" if last else f"per_token{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name} has shape {leaf.shape}; tokens are {lead}.")


def _check_divides(what: str, size: int, axes: Sequence[str], sizes) -> None:
    shards = math.prod(sizes[axis] for axis in axes)
    if size % shards:
        names = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
        raise ValueError(
            f"The {what} ({size}) does not divide over the mesh ({names}). Pad it to "
            f"a multiple of {shards}: tokens by mask, vocabulary rows by vocab_size."
        )


def _check_result(result: Any, n: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
        name = f"map_logits: fn's result{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != n:
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)}; it must be [{n}, ...]: per token."
            )
