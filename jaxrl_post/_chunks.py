"""How tokens are walked over a chunk at a time, on one device or by many."""

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

from jaxrl_post._logits import Logits, logits_dtype, make_logits, product_dtype
from jaxrl_post.sharding.mesh import BATCH_AXES, VOCAB_AXIS, auto_axes


class Walk:
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


def over_chunks(
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


def check_result(result: Any, n: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
        name = f"map_logits: fn's result{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != n:
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)}; it must be [{n}, ...]: per token."
            )
