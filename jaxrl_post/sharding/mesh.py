"""Meshes: which device holds which part of the batch and of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxrl_post.errors import InputError

AXES = ("data", "fsdp", "tensor")
"""`data` splits the batch; `fsdp` the batch and every parameter; `tensor` the heads,
the MLP and the vocabulary."""

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which sequences are split."""

VOCAB_AXIS = "tensor"
"""The mesh axis over which the vocabulary is split."""


FastWithin = Literal["slice", "process", "all"]
"""Which devices the fast links join: a TPU slice's or a GPU node's, as they report it
(`slice_index`); those of one process; or all."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    fast_within: FastWithin = "slice",
) -> Mesh:
    """A mesh `data x fsdp x tensor` with Auto axes; one size may be -1: the rest.

    Neighbours on the mesh are neighbours on the links. Where several slices or nodes
    take part, `data` runs over the slow network between them, then `fsdp` as far as
    `data` is too small for them all; `tensor` stays within one.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}

    Args:
      data: copies of the model, each with its share of the batch.
      fsdp: shards of parameters and optimizer state, each with its share of the batch.
      tensor: shards of heads, MLP and vocabulary.
      devices: those to use; None: all of them.
      fast_within: which of them fast links join.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or `tensor` would
        cross the slow network.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(
            f"mesh sizes must be positive, at most one of them -1 (the rest): {given}."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {given} does not fit {len(devices)} device(s): the sizes must "
            f"multiply to {len(devices)}; set one of them to -1 to give it the rest."
        )
    placed = arrange(tuple(sizes.values()), devices, fast_within)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(
    sizes: tuple[int, ...], devices: Sequence[Any], fast_within: FastWithin = "slice"
) -> np.ndarray:
    """The devices as an array of the shape `sizes`, arranged as `make_mesh` says.

    Args:
      sizes: of `AXES`; they multiply to the number of devices.
      devices: all that the mesh has.
      fast_within: which of them fast links join.

    Raises:
      InputError: `tensor` would cross the slow network.
    """
    attribute = {"slice": "slice_index", "process": "process_index"}.get(fast_within)
    islands = {getattr(device, attribute or "", 0) for device in devices}
    if len(islands) == 1:
        return mesh_utils.create_device_mesh(
            sizes,
            devices,
            allow_split_physical_axes=True,  # where nothing else does
        )
    across, left = [], len(islands)
    for size in sizes[:-1]:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        given = ", ".join(f"{a}={n}" for a, n in zip(AXES, sizes, strict=True))
        raise InputError(
            f"mesh {given} on {len(islands)} slices or nodes: mesh.tensor={sizes[-1]} "
            "would run over the slow network between them. Let data x fsdp be a "
            f"multiple of {len(islands)}; or set mesh.fast_within=all, if their links "
            "are as fast as those within."
        )
    within = [n // m for n, m in zip(sizes, [*across, 1], strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within,
        [*across, 1],
        devices,
        process_is_granule=fast_within == "process",
        allow_split_physical_axes=True,
    )


def auto_axes(mesh: Mesh | AbstractMesh | None = None) -> Mapping[str, int]:
    """Names and sizes of the axes that are still to be split by the compiler.

    Axes of a surrounding `shard_map` (Manual) are not among them: inside it arrays are
    already a device's own.

    Args:
      mesh: None: that of `jax.set_mesh`; without one there are no axes.

    Raises:
      ValueError: an axis is Explicit.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [axis for axis, kind in types.items() if kind == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"mesh axes {explicit} are Explicit, which jax.make_mesh gives unless told "
            "otherwise; make the mesh with jaxrl_post.sharding.make_mesh (Auto axes)."
        )
    auto = [axis for axis, kind in types.items() if kind == AxisType.Auto]
    return {axis: mesh.shape[axis] for axis in auto}
