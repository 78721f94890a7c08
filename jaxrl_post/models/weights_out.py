"""`save`: a policy and its parameters become a folder that transformers opens."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chex
import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.models.adapters import leaves_beside, merged_kernel
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.families import config_to_hf
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.tensors import TensorRule, tensor_rules
from jaxrl_post.models.weights_in import stop_token_ids

_INDEX = "model.safetensors.index.json"


def save(
    policy: Policy,
    params: chex.ArrayTree,
    tokenizer: Any | None,
    path: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 2**30,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a Hugging Face folder: weights, config, generation config, tokenizer.

    The folder appears whole or not at all: it is written beside `path` and renamed.
    Weights keep the dtype of `params`; padding rows of the embedding are written too.
    Adapters are merged into their matrices; int8 becomes the embedding's dtype.

    Args:
      policy: the policy, of `models.load` or `stack.decoder`.
      params: its parameters, layers stacked or not.
      tokenizer: a transformers tokenizer, or None to write none.
      path: the folder to write.
      max_shard_bytes: weights beyond it go to several files with an index.
      generation: what ``generation_config.json`` says besides the special tokens.
      card: text of the folder's README.md.
      overwrite: replace a model that is already there.

    Returns:
      The path.

    Raises:
      InputError: `path` exists and holds something, or the parameters do not fit the
        policy's config.
    """
    path = Path(path).expanduser()
    refuse_folder(path, overwrite)
    config = policy.config
    settings = config_to_hf(config)
    leaves = _leaves(config, params)
    dtype = next(iter(leaves.values())).dtype
    stop = stop_token_ids(policy, tokenizer)
    ids = {
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": (stop[0] if len(stop) == 1 else list(stop)) if stop else None,
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }

    with new_folder(path, overwrite) as folder:
        _write_weights(config, leaves, folder, max_shard_bytes)
        settings = settings | ids | {"dtype": str(dtype)}
        write_json(folder / "config.json", settings, nulls=True)
        write_json(folder / "generation_config.json", ids | dict(generation or {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return path


@contextmanager
def new_folder(
    path: str | os.PathLike[str], overwrite: bool, marker: str = "config.json"
) -> Iterator[Path]:
    """A folder to write into, which appears at `path` whole or not at all.

    Args:
      path: where it is to be.
      overwrite: replace what is there, if it is of the same kind.
      marker: a file that such a folder has.

    Raises:
      InputError: something is at `path` that is not to be replaced.
    """
    path = Path(path).expanduser()
    refuse_folder(path, overwrite, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    folder = scratch / "model"
    try:
        folder.mkdir()
        yield folder
        for file in folder.glob("*.safetensors"):  # safetensors makes them private
            file.chmod((folder / marker).stat().st_mode)
        if path.exists():
            path.rename(scratch / "replaced")
        folder.rename(path)
    finally:
        shutil.rmtree(scratch)


def refuse_folder(path: Path, overwrite: bool, marker: str = "config.json") -> None:
    """Raises where `new_folder` would."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise InputError(
            f"{path} exists; choose another path, or replace it (--overwrite, "
            "overwrite=True)."
        )
    if not (path / marker).is_file():
        raise InputError(f"{path} exists and has no {marker}; it is not overwritten.")


def _leaves(config: DecoderConfig, params: Any) -> dict[TensorRule, Any]:
    """Every leaf, or one error that lists what is missing, left over, mis-shaped."""
    unread = flatten_leaves(params)
    leaves, problems = {}, []
    for rule in tensor_rules(config):
        leaf = unread.pop(".".join(rule.path), None)
        expected = (*rule.stacked(config.num_layers), *rule.shape)
        if leaf is None:
            problems.append(f"missing: {'.'.join(rule.path)}")
        elif leaf.shape != expected:
            problems.append(
                f"mis-shaped: {'.'.join(rule.path)} is {leaf.shape}, the config asks "
                f"for {expected}"
            )
        elif beside := list(leaves_beside(unread, rule)):
            parts = {n.rpartition(".")[2]: unread.pop(n) for n in beside}
            leaf = _Merged({"kernel": leaf, **parts}, rule, params["embed"].dtype)
        leaves[rule] = leaf
    problems += [f"unexpected: {name}" for name in unread]
    if problems:
        raise InputError(
            f"{len(problems)} parameter(s) do not fit the {config.family} config:"
            + "".join(f"\n  {problem}" for problem in problems)
        )
    return leaves


class _Unstacked:
    """A tuple of per-layer arrays that looks like the stacked one."""

    def __init__(self, layers: tuple[Any, ...]) -> None:
        self.layers = layers
        self.dtype = layers[0].dtype
        self.shape = (len(layers), *layers[0].shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.stack([np.asarray(layer) for layer in self.layers])


class _Merged:
    """A kernel with an adapter, or of eight bits, that looks like a plain one."""

    def __init__(self, parts: dict[str, Any], rule: TensorRule, dtype: Any) -> None:
        self.parts, self.inputs = parts, len(rule.inputs)
        self.dtype, self.shape = dtype, parts["kernel"].shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return merged_kernel(self.parts, self.inputs, self.dtype)


def flatten_leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves by their dotted names, layers stacked or not."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, tuple):
            layers = [flatten_leaves(layer, f"{name}.") for layer in value]
            flat |= {
                k: _Unstacked(tuple(part[k] for part in layers)) for k in layers[0]
            }
        elif isinstance(value, dict):
            flat |= flatten_leaves(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _tensors(
    config: DecoderConfig, leaves: dict[TensorRule, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors as files have them, one leaf on the host at a time.

    Leaves that share a tensor are on the host together.
    """
    for _, group in itertools.groupby(leaves.items(), lambda item: item[0].name):
        parts = [(rule, np.asarray(leaf)) for rule, leaf in group]
        for at, name in parts[0][0].names(config.num_layers).items():
            rows = [rule.to_file(leaf[at]) for rule, leaf in parts]
            yield name, rows[0] if len(rows) == 1 else np.concatenate(rows)


def _write_weights(
    config: DecoderConfig, leaves: dict[TensorRule, Any], folder: Path, limit: int
) -> None:
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush():
        save_file(shard, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in _tensors(config, leaves):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.tmp").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.tmp").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / _INDEX, index)


def write_json(path: Path, content: Mapping[str, Any], nulls: bool = False) -> None:
    """Writes an object, without the keys that are None.

    Args:
      path: the file.
      content: the object.
      nulls: write these too: for readers to whom null and absent are not the same, as
        to transformers a ``sliding_window``.
    """
    kept = {k: v for k, v in content.items() if nulls or v is not None}
    text = json.dumps(kept, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
