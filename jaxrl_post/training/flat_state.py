"""A `TrainState` as a flat mapping from paths to arrays, and back: what is on disk."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.training.state import TrainState


def flatten(state: TrainState) -> dict[str, Any]:
    """Arrays by path; the random key as its data; frozen parameters, and empty arrays,
    which Orbax refuses, left out. The host's float64 goes by its bits: jax would round
    it."""
    state = state.replace(rng=jax.random.key_data(state.rng), frozen={})
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): leaf.view(np.uint32) if _is_double(leaf) else leaf
        for path, leaf in leaves
        if leaf.size
    }


def unflatten(like: TrainState, leaves: dict[str, Any]) -> TrainState:
    def restored(path, leaf):
        if not leaf.size:
            return leaf
        value = leaves[jax.tree_util.keystr(path)]
        if _is_double(leaf):
            return np.asarray(value).view(np.float64)
        # Orbax commits arrays to their device. Programs of committed arrays are others
        # than those that the run was begun with, to compile and to trust.
        return value if leaf.committed else jnp.array(np.asarray(value))

    state = jax.tree_util.tree_map_with_path(
        restored, like.replace(rng=jax.random.key_data(like.rng), frozen={})
    )
    rng = jax.random.wrap_key_data(state.rng, impl=jax.random.key_impl(like.rng))
    return state.replace(rng=rng, frozen=like.frozen)


def _is_double(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype == np.float64
