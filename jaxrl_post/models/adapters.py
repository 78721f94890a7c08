"""Low-rank adapters (LoRA), and frozen matrices of eight bits.

Both are leaves beside a projection's ``kernel``, which the layer's product looks for:
``lora_a``, ``lora_b`` and ``lora_scale`` add ``scale * (x A) B``; where there is a
``kernel_scale`` the kernel is int8. A tree without ``lora_a`` is the base itself.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.errors import InputError
from jaxrl_post.models.linear import linear
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.tensors import TensorRule
from jaxrl_post.sharding.rules import Rules, param_shardings

EXTRAS = ("kernel_scale", "lora_a", "lora_b", "lora_scale")
"""What may stand beside a kernel."""

_TRAINED = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: ``W + alpha / rank * A B`` in the place of ``W``.

    B begins as zeros, so that the adapted model begins as its base; A as peft draws
    it, uniform within ``1 / sqrt(inputs)``.

    Source: arXiv 2106.09685; the names are those of peft (``r``, ``lora_alpha``,
    ``target_modules``).

    Attributes:
      rank: columns of A.
      alpha: the product counts ``alpha / rank`` times.
      targets: patterns (``*``, ``?``, ``[...]``) of modules, by their name in a layer
        (``self_attn.q_proj``) or its last part (``q_proj``).
      dtype: of A and B.
      seed: that A is drawn with.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("*",)
    dtype: Any = jnp.float32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank={self.rank}: an adapter needs at least 1.")

    def select(self, rules: Iterable[TensorRule]) -> list[TensorRule]:
        """The rules of the kernels that the patterns name.

        Raises:
          InputError: a pattern names none; the modules that there are.
        """
        kernels = list(filter(is_projection, rules))
        chosen: set[TensorRule] = set()
        for pattern in self.targets:
            named = {r for r in kernels if _matches(module_name(r), pattern)}
            if not named:
                known = ", ".join(map(module_name, kernels))
                raise InputError(
                    f"lora targets: {pattern!r} names no module of the model's layers; "
                    f"they have {known}."
                )
            chosen |= named
        if not chosen:
            raise InputError("lora targets: name a module, or '*' for all.")
        return [rule for rule in kernels if rule in chosen]


def is_projection(rule: TensorRule) -> bool:
    """Whether a leaf is the matrix of a layer's linear map, or of those of experts."""
    return rule.per_layer and rule.path[-1] == "kernel"


def is_quantised(rule: TensorRule) -> bool:
    """Whether a leaf is held in eight bits where the base is: experts are not."""
    return is_projection(rule) and not rule.experts


def module_name(rule: TensorRule) -> str:
    """A projection's name within its layer, as transformers has it; one for all
    experts.

    >>> name = "model.layers.{layer}.mlp.up_proj.weight"
    >>> module_name(TensorRule(("layers", "mlp", "up", "kernel"), name, (8,), (4,)))
    'mlp.up_proj'
    """
    name = rule.name.partition("{layer}.")[2].removesuffix(".weight")
    return name.replace("{expert}.", "")


def project(x: jax.Array, weights: Mapping[str, jax.Array], axes: int) -> jax.Array:
    """A projection without its bias, contracting the last `axes` of x.

    Args:
      x: ``[..., *inputs]``.
      weights: ``kernel`` ``[*inputs, *outputs]``, and any of `EXTRAS`:
        ``kernel_scale`` ``[O]`` (outputs' axes as one), ``lora_a``
        ``[*inputs, rank]``, ``lora_b`` ``[rank, *outputs]``, ``lora_scale`` ``[]``.
      axes: number of inputs' axes.

    Returns:
      ``[..., *outputs]`` in x's dtype.

    >>> weights = {"kernel": jnp.array([[2], [-1]], jnp.int8)}
    >>> weights |= {"kernel_scale": jnp.array([0.5]), "lora_a": jnp.ones((2, 1))}
    >>> weights |= {"lora_b": jnp.array([[3.0]]), "lora_scale": jnp.array(2.0)}
    >>> project(jnp.array([[1.0, 1.0]]), weights, 1).tolist()
    [[12.5]]
    """
    kernel, scale = weights["kernel"], weights.get("kernel_scale")
    if scale is None:
        out = linear(x, kernel.astype(x.dtype), axes)
    else:
        wide = _int8_product(axes)(x, kernel)
        scale = scale.reshape((1,) * (x.ndim - axes) + kernel.shape[axes:])
        out = (wide * scale.astype(wide.dtype)).astype(x.dtype)
    if (a := weights.get("lora_a")) is not None:
        narrow = linear(x, a.astype(x.dtype), axes)
        narrow = narrow * weights["lora_scale"].astype(x.dtype)
        out = out + linear(narrow, weights["lora_b"].astype(x.dtype), 1)
    return out


def _int8_product(axes: int):
    """``x W`` of an int8 kernel, in at least float32."""

    def product(x, kernel):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        kernel = kernel.astype(x.dtype)
        return jnp.tensordot(x, kernel, axes=axes, preferred_element_type=wide)

    # Recomputed in the backward pass: otherwise the scan over layers would keep a
    # de-quantised copy of every kernel until then.
    return jax.checkpoint(product, prevent_cse=False)


def quantise(kernel: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array]:
    """Eight bits per weight, with a scale per layer and output channel.

    ``scale = max |w| / 127`` over the inputs; ``w`` is ``q * scale`` within half of it.

    Args:
      kernel: ``[L, *inputs, *outputs]``.
      inputs: number of inputs' axes.

    Returns:
      int8 like `kernel`, and the scales ``[L, O]`` in float32, outputs' axes as one.

    >>> values, scale = quantise(jnp.array([[[127.0, -2.0], [64.0, 1.0]]]), 1)
    >>> values.tolist(), scale.tolist()
    ([[[127, -127], [64, 64]]], [[1.0, 0.016]])
    """
    reduced = tuple(range(1, 1 + inputs))
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale = jnp.max(jnp.abs(wide), axis=reduced, keepdims=True) / 127
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return values, scale.reshape(len(kernel), -1).astype(jnp.float32)


def quantise_placed(kernel: jax.Array, rule: TensorRule) -> dict[str, jax.Array]:
    """`quantise` of a leaf where it lies, by the names that the layer looks for."""
    inputs, shardings = len(rule.inputs), None
    if isinstance(kernel.sharding, NamedSharding):
        spec = [*kernel.sharding.spec, *[None] * kernel.ndim][: kernel.ndim]
        scales = P(spec[0], spec[1 + inputs])
        shardings = kernel.sharding, NamedSharding(kernel.sharding.mesh, scales)
    run = jax.jit(quantise, static_argnums=1, out_shardings=shardings)
    values, scale = run(kernel, inputs)
    return {"kernel": values, "kernel_scale": scale}


def quantised_axes(axes: Mapping[str, Any], rules: Iterable[TensorRule]) -> Any:
    """Logical axes with those of the scales of int8 kernels."""
    for rule in filter(is_quantised, rules):
        kernel = _at(axes, rule.path)
        scale = (kernel[0], kernel[1 + len(rule.inputs)])
        axes = _with(axes, rule.path[:-1], {"kernel_scale": scale})
    return axes


def quantised_shapes(params: Any, rules: Iterable[TensorRule]) -> Any:
    """Shapes of parameters, their kernels as `quantise_placed` leaves them."""
    for rule in filter(is_quantised, rules):
        inputs, kernel = len(rule.inputs), _at(params, rule.path)
        values, scale = jax.eval_shape(lambda x, n=inputs: quantise(x, n), kernel)
        both = {"kernel": values, "kernel_scale": scale}
        params = _with(params, rule.path[:-1], both)
    return params


def adapter_shapes(
    policy: Policy, adapter: Lora, targets: Iterable[TensorRule]
) -> tuple[Policy, Any]:
    """The policy of an adapted model, and its adapter's leaves as shapes.

    Args: as in `add_adapter`.
    """
    layers = policy.config.num_layers
    shapes: Any = {}
    axes: Any = policy.logical_axes
    for rule in targets:
        stacked, kernel = rule.stacked(layers), _at(axes, rule.path)
        first = len(stacked) + len(rule.inputs)
        lead, inputs = kernel[: len(stacked)], kernel[len(stacked) : first]
        names = {
            "lora_a": (*lead, *inputs, "rank"),
            "lora_b": (*lead, "rank", *kernel[first:]),
            "lora_scale": lead,
        }
        sizes = {
            "lora_a": (*stacked, *rule.inputs, adapter.rank),
            "lora_b": (*stacked, adapter.rank, *rule.outputs),
            "lora_scale": stacked,
        }
        leaves = {
            k: jax.ShapeDtypeStruct(v, adapter.dtype if k in _TRAINED else jnp.float32)
            for k, v in sizes.items()
        }
        axes = _with(axes, rule.path[:-1], names)
        shapes = _with(shapes, rule.path[:-1], leaves)
    return replace(policy, logical_axes=axes), shapes


def add_adapter(
    policy: Policy,
    params: chex.ArrayTree,
    adapter: Lora,
    targets: Iterable[TensorRule],
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[Policy, chex.ArrayTree]:
    """The policy and its parameters with a fresh adapter.

    Args:
      policy: of `stack.decoder`.
      params: its parameters, layers stacked.
      adapter: what to add.
      targets: the kernels to adapt, of `Lora.select`.
      mesh, rules: where the parameters lie, as in `models.load`.
    """
    targets = list(targets)
    policy, shapes = adapter_shapes(policy, adapter, targets)
    bounds = {rule.path[:-1]: 1 / math.sqrt(math.prod(rule.inputs)) for rule in targets}

    def init(key):
        def leaf(path, shape):
            name = path[-1].key
            if name == "lora_b":
                return jnp.zeros(shape.shape, shape.dtype)
            if name == "lora_scale":
                return jnp.full(shape.shape, adapter.alpha / adapter.rank, shape.dtype)
            # By its name: the same whichever others are adapted.
            own = np.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
            bound = bounds[tuple(part.key for part in path[:-1])]
            drawn = jax.random.uniform(
                jax.random.fold_in(key, own), shape.shape, minval=-bound, maxval=bound
            )
            return drawn.astype(shape.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    shardings = None
    if mesh is not None:
        own_axes = jax.tree_util.tree_map_with_path(
            lambda path, _: _at(policy.logical_axes, [part.key for part in path]),
            shapes,
        )
        shardings = param_shardings(shapes, own_axes, mesh, rules)
    drawn = jax.jit(init, out_shardings=shardings)(jax.random.key(adapter.seed))
    return policy, merge_adapter(params, drawn)


def split_adapter(params: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """What is trained and what is not: A and B of an adapter, or where there is none
    everything and nothing.

    >>> split_adapter({"q": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "embed": 4})
    ({'q': {'lora_a': 2, 'lora_b': 3}}, {'q': {'kernel': 1}, 'embed': 4})
    >>> split_adapter({"embed": 4})
    ({'embed': 4}, {})
    """
    if not has_adapter(params):
        return params, {}
    trained = _filter(params, lambda name: name in _TRAINED)
    return trained, _filter(params, lambda name: name not in _TRAINED)


def has_adapter(params: Any) -> bool:
    """Whether there is an adapter in the tree."""
    if not isinstance(params, Mapping):
        return isinstance(params, tuple) and any(map(has_adapter, params))
    return "lora_a" in params or any(map(has_adapter, params.values()))


def merged_kernel(parts: Mapping[str, Any], inputs: int, dtype: Any) -> np.ndarray:
    """One matrix of a kernel and what stands beside it, on the host.

    Args:
      parts: ``kernel`` ``[L, *inputs, *outputs]`` and any of `EXTRAS`, stacked; of
        experts ``[L, E, ...]``.
      inputs: number of inputs' axes.
      dtype: of the result; the sum is made in float32.
    """
    kernel = np.asarray(parts["kernel"])
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32))
    if "kernel_scale" in parts:
        scale = np.asarray(parts["kernel_scale"], np.float32)
        outputs = kernel.shape[1 + inputs :]
        wide *= scale.reshape(len(kernel), *[1] * inputs, *outputs)
    if "lora_a" in parts:
        factors = [np.asarray(parts[name], np.float32) for name in EXTRAS[1:]]
        for at in np.ndindex(factors[-1].shape):
            a, b, scale = (factor[at] for factor in factors)
            wide[at] += scale * np.tensordot(a, b, axes=1)
    return wide.astype(dtype)


def _matches(name: str, pattern: str) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, last))


def _at(tree: Any, path: Iterable[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: Mapping[str, Any], path: tuple[str, ...], leaves: Any) -> Any:
    """A copy of nested dicts with more leaves in the one at `path`."""
    if not path:
        return {**tree, **leaves}
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], leaves)}


def merge_adapter(params: Any, adapter: Any) -> Any:
    """The parameters with an adapter's leaves beside their kernels."""
    if not isinstance(adapter, Mapping):
        return adapter
    return {
        **params,
        **{k: merge_adapter(params.get(k, {}), v) for k, v in adapter.items()},
    }


def _filter(tree: Any, wanted: Any) -> Any:
    """The leaves with such names, without the dicts that hold none."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            if wanted(name):
                kept[name] = value
        elif below := _filter(value, wanted):
            kept[name] = below
    return kept


def leaves_beside(flat: Mapping[str, Any], rule: TensorRule) -> Iterator[str]:
    """Of dotted names of leaves, those of `EXTRAS` beside a kernel."""
    stem = ".".join(rule.path[:-1])
    return (f"{stem}.{name}" for name in EXTRAS if f"{stem}.{name}" in flat)
