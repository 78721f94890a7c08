"""Meshes: which device holds which part of the batch and of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
"""`data` splits the batch; `fsdp` the batch and every parameter; `tensor` the heads,
the MLP and the vocabulary."""

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which sequences are split."""

VOCAB_AXIS = "tensor"
"""The mesh axis over which the vocabulary is split."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh `data x fsdp x tensor` with Auto axes; one size may be -1: the rest.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}

    Args:
      data: copies of the model, each with its share of the batch.
      fsdp: shards of parameters and optimizer state, each with its share of the batch.
      tensor: shards of heads, MLP and vocabulary.
      devices: those to use; None: all of them.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    given = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh sizes must be positive, at most one of them -1 (the rest): {given}."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} device(s): the sizes must "
            f"multiply to {len(devices)}; set one of them to -1 to give it the rest."
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices
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
