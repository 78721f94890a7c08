"""What is kept for the backward pass, and where what is not in use lies meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
from jax import checkpoint_policies as policies

from jaxrl_post.errors import nearest
from jaxrl_post.models.chunked import SAVED_NAME
from jaxrl_post.models.experts import PRODUCT_NAME

POLICIES: dict[str, Any] = {
    "none": None,
    "full": policies.nothing_saveable,
    "products": policies.save_from_both_policies(
        policies.dots_saveable,
        policies.save_only_these_names(SAVED_NAME, PRODUCT_NAME),
    ),
    "dots_saveable": policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": policies.dots_with_no_batch_dims_saveable,
    "attention_saveable": policies.save_only_these_names(SAVED_NAME),
    "attention_offloaded": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[SAVED_NAME],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the backward pass of a layer finds ready besides the layer's input. ``none``:
everything, nothing is computed again. ``full``: nothing. ``products``: what products of
matrices and attention put out; what is computed again between them costs less than
keeping it. ``dots_saveable`` and ``dots_with_no_batch_dims_saveable`` are jax's: all
products' results, attention's output not among them, and those of products with
weights. ``attention_saveable``: attention's output alone; ``attention_offloaded``: the
same, in the host's memory."""


def rematerialise(layer: Callable, name: str) -> Callable:
    """The function, of whose backward pass `POLICIES` says what is computed again.

    Raises:
      ValueError: there is no policy of that name.
    """
    if name not in POLICIES:
        raise ValueError(
            f"remat={name!r}: there is no such policy; {nearest(str(name), POLICIES)}"
        )
    if name == "none":
        return layer
    return jax.checkpoint(layer, policy=POLICIES[name])


def on_device(tree: chex.ArrayTree) -> chex.ArrayTree:
    """What lies in the host's memory, moved; everything else as it is.

    Called where an array is used, so that a scan over layers holds one layer at a time.
    """

    def move(x):
        if jax.typeof(x).memory_space != jax.memory.Space.Host:
            return x
        return jax.device_put(x, jax.memory.Space.Device)

    return jax.tree.map(move, tree)
