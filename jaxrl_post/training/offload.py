"""Parts of the state that lie in the host's memory between their uses.

A part says by its own memory kind where it lies: the update brings it to the device
where it is used, a layer at a time in the model's scan, and puts its successor back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.errors import InputError
from jaxrl_post.training.state import TrainState

_FIELDS = {"teacher": "teacher", "reference": "reference", "optimizer": "opt_state"}
"""Fields of `TrainState`, by their names in `training.offload`."""

_HOST = "pinned_host"


def offload(state: TrainState, parts: Sequence[str]) -> TrainState:
    """The state with these parts in the host's memory; scalars stay on the device.

    Args:
      state: whose arrays lie on their devices; or their shapes.
      parts: of "teacher", "reference" and "optimizer"; what a recipe does not have is
        passed over.

    Raises:
      InputError: the devices cannot reach the host's memory.
    """
    if not parts:
        return state

    def to_host(x: Any) -> Any:
        if not x.ndim:
            return x
        shape = isinstance(x, jax.ShapeDtypeStruct)
        sharding = x.sharding
        devices: set[Any] = (
            sharding.device_set if shape else sharding.addressable_devices
        )
        for device in devices:
            kinds = [memory.kind for memory in device.addressable_memories()]
            # Of GPUs that are not here jax does not say which they have.
            if kinds and _HOST not in kinds:
                raise InputError(
                    f"training.offload={list(parts)}: {device.platform} has no memory "
                    f"of kind {_HOST} (it has {', '.join(kinds)}); leave it empty."
                )
        sharding = sharding.with_memory_kind(_HOST)
        if shape:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    fields = [_FIELDS[part] for part in parts]
    moved = {name: jax.tree.map(to_host, getattr(state, name)) for name in fields}
    return state.replace(**moved)


class LayoutKeepingJit:
    """``jax.jit(program, donate_argnums=0)`` of a state and something else, whose new
    state lies where the old one lay.

    Left to the compiler a parameter may come out split over the mesh in another way,
    and every program that takes it would be compiled anew. And only where it is told
    that a result stays in the host's memory does it write it over the donated array
    there; otherwise it reserves memory of the device for that. (Not so for CPU, which
    has names for kinds of memory but one memory, and which returns the results of
    several devices under another name than it was told.)
    """

    def __init__(self, program: Callable, mesh: jax.sharding.Mesh | None) -> None:
        self._program, self._mesh = program, mesh
        self._jitted: dict[Any, Any] = {}

    def __call__(self, state: TrainState, other: Any) -> Any:
        return self._for(state)(state, other)

    def lower(self, state: TrainState, other: Any) -> Any:
        """As that of `jax.jit`."""
        return self._for(state).lower(state, other)

    def trace(self, state: TrainState, other: Any) -> Any:
        """As that of `jax.jit`."""
        return self._for(state).trace(state, other)

    def _for(self, state: TrainState) -> Any:
        layout = self._layout(state)
        leaves, treedef = jax.tree.flatten(layout)
        key = (treedef, *leaves)
        if key not in self._jitted:
            options: dict[str, Any] = {}
            if layout is not None:
                options["out_shardings"] = (layout, None)
            self._jitted[key] = jax.jit(self._program, donate_argnums=0, **options)
        return self._jitted[key]

    def _layout(self, state: TrainState) -> Any:
        """The shardings of the new state, or None: the compiler's choice."""
        leaves = jax.tree.leaves(state)
        hosted = [x.sharding for x in leaves if _kind(x) == _HOST]
        if any(d.platform == "cpu" for sharding in hosted for d in sharding.device_set):
            return None
        if self._mesh is None:
            return jax.tree.map(lambda x: x.sharding, state) if hosted else None
        everywhere = NamedSharding(self._mesh, P())
        return jax.tree.map(
            lambda x: x.sharding if getattr(x, "committed", True) else everywhere, state
        )


def _kind(x: Any) -> str | None:
    return getattr(getattr(x, "sharding", None), "memory_kind", None)


def put_back(new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
    """What follows `old`, in the memory where `old` lies."""

    def put(new, old):
        host = jax.typeof(old).memory_space == jax.memory.Space.Host
        return jax.device_put(new, jax.memory.Space.Host) if host else new

    return jax.tree.map(put, new, old)
