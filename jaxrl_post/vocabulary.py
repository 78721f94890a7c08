"""The one place where hidden states meet the unembedding.

A language model's logits are its largest array: for one sequence of 8,192 tokens and a
vocabulary of 151,936 they are 5 GB. Nothing here builds it. `map_logits` walks over the
tokens a chunk at a time, hands each chunk's logits to a function, keeps the numbers per
token which that returns, and computes the chunk's logits again on the way back.
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
        logits, but at least 512 and at most 4096.
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
    hiddens = hidden if isinstance(hidden, (tuple, list)) else (hidden,)
    weights = unembedding if isinstance(unembedding, (tuple, list)) else (unembedding,)
    if len(weights) == 1:
        weights = tuple(weights) * len(hiddens)
    _check_shapes(hiddens, weights, per_token, mask)
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    rows = weights[0].shape[0]
    if vocab_size is not None and not 1 <= vocab_size <= rows:
        raise ValueError(f"vocab_size is {vocab_size}; unembedding has {rows} rows.")

    sizes = auto_axes(mesh)
    batch_axes = tuple(axis for axis in batch_axes if sizes.get(axis, 1) > 1)
    axis_name = vocab_axis if sizes.get(vocab_axis, 1) > 1 else None
    _check_divides("tokens' leading axis", hiddens[0].shape[0], batch_axes, sizes)
    _check_divides("unembedding's rows", rows, (axis_name,) if axis_name else (), sizes)

    masters = tuple(
        w.astype(_logits_dtype(h, w)) for h, w in zip(hiddens, weights, strict=True)
    )
    weights = tuple(
        lax.stop_gradient(w).astype(_product_dtype(h, w))
        for h, w in zip(hiddens, weights, strict=True)
    )
    make_logits = functools.partial(
        _make_logits, softcap=softcap, vocab_size=vocab_size, axis_name=axis_name
    )

    def on_device(hiddens, weights, masters, per_token, mask, temperature):
        # Tell JAX before the loop that every device uses the weights for tokens of its
        # own: their gradients are then added up once, after the loop, in float32.
        weights, masters = lax.pcast((weights, masters), batch_axes, to="varying")

        def on_chunk(tokens):
            hiddens, per_token, mask = tokens
            logits = (
                make_logits(h, w, m, mask, temperature)
                for h, w, m in zip(hiddens, weights, masters, strict=True)
            )
            result = fn(*logits, *_sanitise(mask, per_token))
            _check_result(result, hiddens[0].shape[0])
            return _sanitise(mask, result)

        size = chunk_size or _default_chunk_size(weights[0].shape[0])
        return _map_chunks(on_chunk, (hiddens, per_token, mask), size)

    if mask is not None:
        mask = mask.astype(bool)
    args = (tuple(hiddens), weights, masters, per_token, mask, jnp.asarray(temperature))
    if not batch_axes and axis_name is None:
        return on_device(*args)
    tokens, vocabulary = P(batch_axes), P(axis_name)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        axis_names=frozenset(sizes),
        in_specs=(tokens, vocabulary, vocabulary, tokens, tokens, P()),
        out_specs=tokens,
    )(*args)


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
    weights = unembedding.astype(_product_dtype(hidden, unembedding))
    master = unembedding.astype(_logits_dtype(hidden, unembedding))
    return _make_logits(
        hidden, weights, master, None, temperature, softcap, vocab_size, None
    ).values


def _make_logits(
    hidden, weights, master, mask, temperature, softcap, vocab_size, axis_name
) -> Logits:
    if axis_name is not None:
        hidden = lax.pcast(hidden, axis_name, to="varying")
    values = _project(_sanitise(mask, hidden), weights, master)
    # Once more after the product: a NaN that `fn`'s derivative makes of a masked
    # token's zeros would otherwise reach the weights' gradient as NaN * 0.
    values = _sanitise(mask, values)
    if softcap is not None:
        values = softcap * jnp.tanh(values / softcap)
    values = values / jnp.asarray(temperature, values.dtype)
    return Logits(values, vocab_size=vocab_size, axis_name=axis_name)


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


def _map_chunks(on_chunk: Callable[[Any], Any], tokens: Any, chunk_size: int) -> Any:
    """`on_chunk(tokens)` for tokens `[..., rest]`, by chunks of `[chunk, rest]`."""
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
        result = on_chunk(tokens)
    else:
        # Inside a loop nothing can be merged with the forward pass, so that
        # prevent_cse's barriers would only get in the compiler's way.
        on_chunk = jax.checkpoint(on_chunk, prevent_cse=False)
        result = jax.tree.map(join, lax.map(on_chunk, jax.tree.map(split, tokens)))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), result)


def _default_chunk_size(local_rows: int) -> int:
    # Few tokens keep a chunk's logits in a CPU's cache; fewer than 512 would have an
    # accelerator wait for the unembedding, which every chunk reads anew.
    return min(max(2**22 // local_rows, 512), 4096)


def _product_dtype(hidden: jax.Array, weights: jax.Array) -> jnp.dtype:
    half = jnp.finfo(hidden.dtype).bits < 32
    return hidden.dtype if half else jnp.result_type(hidden, weights)


def _logits_dtype(hidden: jax.Array, weights: jax.Array) -> jnp.dtype:
    return jnp.promote_types(_product_dtype(hidden, weights), jnp.float32)


def _sanitise(mask: jax.Array | None, tree: Any) -> Any:
    """Zeros where the mask is false, in values and (so `where` derives) gradients."""
    if mask is None:
        return tree

    def keep(x):
        column = mask.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(column, x, jnp.zeros((), x.dtype))

    return jax.tree.map(keep, tree)


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
