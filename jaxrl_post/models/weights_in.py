"""`load`: a checkpoint's files become a policy and its parameters."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.models.adapters import (
    Lora,
    add_adapter,
    is_quantised,
    quantise_placed,
    quantised_axes,
)
from jaxrl_post.models.checkpoints import Checkpoint, open_checkpoint
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.stack import decoder
from jaxrl_post.models.tensors import Index, TensorRule, tensor_rules
from jaxrl_post.sharding.rules import Rules, param_shardings


def load(
    path_or_id: str | os.PathLike[str],
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    remat: str = "products",
    attention: str = "auto",
    int8: bool = False,
    adapter: Lora | None = None,
) -> tuple[Policy, chex.ArrayTree, Any | None]:
    """Opens a model: its functions, its parameters and its tokenizer.

    Weights are read one leaf of the tree at a time, large ones a tensor at a time; with
    a mesh every device's part is read by itself, and handed over before the next: a
    host never holds more of the model than its own devices do, and one part.

    Args:
      path_or_id: a Hugging Face folder (safetensors), a hub id, a ``.gguf`` file, or
        ``"science_base"``, the model that comes with the package.
      mesh: devices to spread the parameters over; None: the default device.
      rules: entries that replace those of `sharding.RULES`.
      dtype: of the parameters; training wants float32 master weights.
      compute_dtype: of activations; None: float32 on CPU, else bfloat16.
      remat, attention: see `stack.decoder`.
      int8: hold the matrices of the layers in eight bits, for a base that is not
        trained: one scale per output channel, computed with in `compute_dtype`.
      adapter: add one, whose A and B are then what `split_adapter` says is trained.

    Returns:
      The `Policy`, the parameters, and the tokenizer (a transformers tokenizer; None
      where the files have none). The policy's `vocab_size` is the number of the
      tokenizer's tokens: rows of the embedding beyond it are padding and never
      sampled.

    Raises:
      InputError: there is no such model, its architecture is not supported, or its
        tensors do not fit it; every missing, unexpected and mis-shaped tensor is
        listed. Or the adapter's patterns name no module of it.
    """
    checkpoint = open_checkpoint(path_or_id)
    tokenizer = checkpoint.tokenizer()
    config = fit_vocabulary(checkpoint.config, tokenizer, checkpoint.source)
    rules_by_leaf = list(tensor_rules(config))
    adapted = adapter.select(rules_by_leaf) if adapter else []
    _check_tensors(checkpoint, config, rules_by_leaf)

    if compute_dtype is None:
        on_cpu = jax.default_backend() == "cpu"
        compute_dtype = jnp.float32 if on_cpu else jnp.bfloat16
    policy = decoder(
        config, compute_dtype=compute_dtype, remat=remat, attention=attention
    )
    shapes: dict[str, Any] = {}
    for rule in rules_by_leaf:
        leading = rule.stacked(config.num_layers)
        shape = jax.ShapeDtypeStruct((*leading, *rule.shape), dtype)
        _set(shapes, rule.path, shape)
    shardings = None
    if mesh is not None:
        shardings = param_shardings(shapes, policy.logical_axes, mesh, rules)

    params: dict[str, Any] = {}
    for rule in rules_by_leaf:
        shape = _get(shapes, rule.path).shape

        def read(index, rule=rule, shape=shape):
            return _read_leaf(checkpoint, rule, index, shape, dtype)

        whole = (slice(None),) * len(shape)
        if shardings is not None:
            leaf = _by_parts(shape, _get(shardings, rule.path), read)
        elif rule.per_layer and math.prod(shape) * jnp.dtype(dtype).itemsize >= LARGE:
            blocks = _blocks(checkpoint, rule, whole, shape)
            leaf = _by_tensors(shape, dtype, blocks)
        else:
            (leaf,) = _place(read(whole), [None])
        if int8 and is_quantised(rule):
            for name, part in quantise_placed(leaf, rule).items():
                _set(params, (*rule.path[:-1], name), jax.block_until_ready(part))
        else:
            _set(params, rule.path, jax.block_until_ready(leaf))
    if int8:
        axes = quantised_axes(policy.logical_axes, rules_by_leaf)
        policy = replace(policy, logical_axes=axes)
    if adapter:
        policy, params = add_adapter(policy, params, adapter, adapted, mesh, rules)
    return policy, params, tokenizer


def stop_token_ids(policy: Policy, tokenizer: Any | None = None) -> tuple[int, ...]:
    """Every token that ends an answer: the checkpoint's list and the tokenizer's."""
    ids = set(policy.config.stop_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


LARGE = 2**28
"""Bytes from which on one device gets the leaf of all layers a tensor at a time, which
takes a program of its own."""


def _blocks(
    checkpoint: Checkpoint, rule: TensorRule, index: Index, shape
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The part `index` of a leaf: of each tensor its place in the part, and its own."""
    ranges = [range(*part.indices(n)) for part, n in zip(index, shape, strict=True)]
    stacked = len(shape) - len(rule.shape)
    names, part = rule.names(shape[0]), index[stacked:]
    for at in np.ndindex(*(len(r) for r in ranges[:stacked])):
        name = names[tuple(r[i] for r, i in zip(ranges, at, strict=False))]
        yield at, rule.from_file(checkpoint.read(name, rule.file_index(part)), part)


def _read_leaf(
    checkpoint: Checkpoint, rule: TensorRule, index: Index, shape, dtype
) -> np.ndarray:
    """The part `index` of a leaf, tensor by tensor into one host array."""
    blocks = _blocks(checkpoint, rule, index, shape)
    if len(shape) == len(rule.shape):
        return np.asarray(next(blocks)[1], dtype)
    lengths = [len(range(*p.indices(n))) for p, n in zip(index, shape, strict=True)]
    out = np.empty(lengths, dtype)
    for at, block in blocks:
        out[at] = block
    return out


def _place(host: np.ndarray, devices: Iterable[Any]) -> list[jax.Array]:
    """Copies on devices, None being the default one, with no hold on `host` left."""
    copies = jax.block_until_ready([jax.device_put(host, d) for d in devices])
    gc.collect(0)  # jax lets go of host arrays when it next comes by, or then
    return copies


def _by_tensors(
    shape: tuple[int, ...],
    dtype: Any,
    blocks: Iterable[tuple[tuple[int, ...], np.ndarray]],
) -> jax.Array:
    """An array on the default device, of which no more than a tensor is on the host."""
    leaf = jnp.zeros(shape, dtype)
    for at, block in blocks:
        leaf = jax.block_until_ready(_write(leaf, np.asarray(block, dtype), at))
        del block
        gc.collect(0)
    return leaf


@partial(jax.jit, donate_argnums=0)
def _write(leaf: jax.Array, block: jax.Array, at: tuple[int, ...]) -> jax.Array:
    # in place, as a scatter (`at[].set`) of bfloat16 is not on CPU
    block = jnp.expand_dims(block, range(len(at)))
    return jax.lax.dynamic_update_slice(
        leaf, block, (*at, *[0] * (block.ndim - len(at)))
    )


def _by_parts(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """An array of which this process reads what its devices hold, each part once."""
    holders: dict[Any, list[tuple[jax.Device, Index]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # as the device holds a part
        key = tuple((part.start, part.stop) for part in index)
        holders.setdefault(key, []).append((device, index))
    placed: list[jax.Array] = []
    for part in holders.values():
        placed += _place(read(part[0][1]), [device for device, _ in part])
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def fit_vocabulary(
    config: DecoderConfig, tokenizer: Any | None, source: str
) -> DecoderConfig:
    """Tokens that the tokenizer does not have become padding."""
    if tokenizer is None:
        return config
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > config.rows:
        raise InputError(
            f"{source}: the tokenizer has {tokens} tokens, the embedding only "
            f"{config.rows} rows; they do not belong together."
        )
    return replace(config, vocab_size=tokens, padded_vocab_size=config.rows)


def _check_tensors(
    checkpoint: Checkpoint, config: DecoderConfig, rules: Iterable[TensorRule]
) -> None:
    """One error for everything that does not fit."""
    if config.num_layers > len(checkpoint.shapes):  # before a list is made of them
        raise InputError(
            f"{checkpoint.source}: the config has {config.num_layers} layers, the "
            f"files have {len(checkpoint.shapes)} tensors; they do not belong together."
        )
    expected = {
        name: rule.file_shape
        for rule in rules
        for name in rule.names(config.num_layers).values()
    }
    found = {
        name: shape
        for name, shape in checkpoint.shapes.items()
        if not name.endswith("rotary_emb.inv_freq")  # a buffer of old releases
    }
    problems = [f"missing: {name}" for name in expected if name not in found]
    if config.tie_embeddings and "lm_head.weight" in found:
        del found["lm_head.weight"]
        if not _same(checkpoint, "lm_head.weight", "model.embed_tokens.weight"):
            problems.append(
                "unexpected: lm_head.weight, which differs from the embedding although "
                "tie_word_embeddings is true (set it to false to use it)"
            )
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    problems += [
        f"mis-shaped: {name} is {found[name]}, the config asks for {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += checkpoint.problems
    if problems:
        start = f"{checkpoint.source}: {len(problems)} tensor(s) do not fit the"
        if len(problems) == 1:
            raise InputError(f"{start} {config.family} config: {problems[0]}")
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise InputError(f"{start} {config.family} config:{lines}")


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    shapes = checkpoint.shapes
    if shapes[first] != shapes.get(second):
        return False
    whole = (slice(None),) * len(shapes[first])
    return np.array_equal(checkpoint.read(first, whole), checkpoint.read(second, whole))


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
