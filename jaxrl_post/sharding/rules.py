"""Which mesh axis splits which dimension of parameters and batches.

Models name the dimensions of their parameters ("vocab", "embed", "heads", ...). One
table maps those names to mesh axes, so that a model knows nothing of meshes and another
layout is another table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.errors import InputError
from jaxrl_post.sharding.mesh import BATCH_AXES
from jaxrl_post.sharding.processes import place

Rules = Mapping[str, str | Sequence[str] | None]

RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "tensor",
    "norm": None,
    "rank": None,
}
"""The layout of every model unless told otherwise: fully sharded over `fsdp` along the
model width, split over `tensor` along heads, MLP, experts and vocabulary; None: not
split."""


def param_shardings(
    params: Any, logical_axes: Any, mesh: Mesh, rules: Rules | None = None
) -> Any:
    """A `NamedSharding` for every parameter, from the names of its dimensions.

    >>> from jaxrl_post.sharding import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> params = {"head": jax.ShapeDtypeStruct((8, 4), "float32")}
    >>> shardings = param_shardings(params, {"head": ("vocab", "embed")}, mesh)
    >>> list(shardings["head"].spec)
    ['tensor', 'fsdp']

    Args:
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
      logical_axes: the same pytree with a tuple of names per array, one name (or None:
        not split) per dimension.
      mesh: whose axes `rules` name.
      rules: entries that replace or extend those of `RULES`, e.g. `{"kv_heads": None}`.

    Raises:
      InputError: one message with every name without a rule, every tuple of the wrong
        length and every dimension that its mesh axes do not divide.
    """
    table = {
        name: tuple(axes) if isinstance(axes, list) else axes  # lists come from YAML
        for name, axes in {**RULES, **(rules or {})}.items()
    }
    problems: list[str] = []

    def sharding(path, param, names):
        where = jax.tree_util.keystr(path)
        if len(names) != len(param.shape):
            problems.append(f"{where}: shape {param.shape} has logical axes {names}")
            return None
        spec = [None if name is None else table.get(name) for name in names]
        for name, axes, size in zip(names, spec, param.shape, strict=True):
            shards, unknown = _shards(axes, mesh)
            if name is not None and name not in table:
                problems.append(f"{where}: no rule for logical axis {name!r}")
            elif unknown:
                problems.append(f"{where}: {name!r} -> {axes!r}, not a mesh axis")
            elif size % shards:
                problems.append(f"{where}: {name}={size} is not divisible by {shards}")
        used = [axis for axes in spec for axis in _names(axes)]
        for axis in sorted({axis for axis in used if used.count(axis) > 1}):
            problems.append(
                f"{where}: mesh axis {axis!r} splits two dimensions, {names}"
            )
        return None if problems else NamedSharding(mesh, P(*spec))

    shardings = jax.tree_util.tree_map_with_path(sharding, params, logical_axes)
    if problems:
        raise InputError(
            f"These parameters cannot be laid out on the mesh {dict(mesh.shape)}:\n  "
            + "\n  ".join(problems)
            + "\nChange the mesh's sizes, or the rule of the axis, such as "
            "mesh.rules.kv_heads=null (not split)."
        )
    return shardings


def shard(
    params: Any, logical_axes: Any, mesh: Mesh, rules: Rules | None = None
) -> Any:
    """Places parameters on the mesh, laid out by `param_shardings`."""
    return jax.device_put(params, param_shardings(params, logical_axes, mesh, rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits the leading axis of a batch."""
    return _shards(BATCH_AXES, mesh)[0]


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places arrays `[B, ...]` on the mesh, their rows split by `batch_sharding`.

    Raises:
      ValueError: one message with every array whose leading axis does not divide.
    """
    shards = batch_shards(mesh)
    problems = [
        f"{jax.tree_util.keystr(path)}: shape {leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if not leaf.shape or leaf.shape[0] % shards
    ]
    if problems:
        raise ValueError(
            f"The leading axis must be a multiple of {shards} (mesh "
            f"{dict(mesh.shape)}); pad these with masked rows:\n  "
            + "\n  ".join(problems)
        )
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: place(leaf, sharding), batch)


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _shards(axes: str | Sequence[str] | None, mesh: Mesh) -> tuple[int, list[str]]:
    """The product of the axes' sizes, and those that the mesh lacks."""
    known = [name for name in _names(axes) if name in mesh.shape]
    unknown = [name for name in _names(axes) if name not in mesh.shape]
    return math.prod(mesh.shape[name] for name in known), unknown
