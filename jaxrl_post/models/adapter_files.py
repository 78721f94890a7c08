"""Adapters in peft's layout: ``adapter_config.json``, ``adapter_model.safetensors``."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chex
import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.models.adapters import has_adapter, is_projection, module_name
from jaxrl_post.models.policy import Policy
from jaxrl_post.models.tensors import TensorRule, tensor_rules
from jaxrl_post.models.weights_out import flatten_leaves, new_folder, write_json

_PREFIX = "base_model.model."


def save_adapter(
    policy: Policy,
    params: chex.ArrayTree,
    tokenizer: Any | None,
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the adapter alone, as peft opens it, without the base.

    The folder appears whole or not at all. Where the files have one matrix of several
    that are adapted here (Phi-3), it has one adapter of their ranks' sum, with a
    ``rank_pattern``: A's one above the other, B's as blocks.

    Args:
      policy: of the parameters.
      params: with an adapter; the base's leaves may be there too.
      tokenizer: written beside it; None: none.
      path: the folder to write.
      base: name or path of the base, for ``base_model_name_or_path``.
      card: text of the folder's README.md.
      overwrite: replace an adapter that is already there.

    Returns:
      The path.

    Raises:
      InputError: there is no adapter, or `path` holds something.
    """
    if not has_adapter(params):
        raise InputError(
            "there is no adapter: the model's own weights were trained; leave out "
            "--adapter (models.save) to write them."
        )
    from safetensors.numpy import save_file

    flat = flatten_leaves(params)
    targets = [
        rule
        for rule in tensor_rules(policy.config)
        if is_projection(rule) and _leaf(rule, "lora_a") in flat
    ]
    rank = flat[_leaf(targets[0], "lora_a")].shape[-1]
    scale = float(np.asarray(flat[_leaf(targets[0], "lora_scale")]).flat[0])
    parts = Counter(map(module_name, targets))
    ranks = {name: rank * count for name, count in parts.items() if count > 1}
    with new_folder(path, overwrite, marker="adapter_config.json") as folder:
        tensors = dict(_tensors(policy.config.num_layers, flat, targets))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": scale * rank,
            "rank_pattern": ranks,
            "alpha_pattern": {name: scale * rank for name, rank in ranks.items()},
            "lora_dropout": 0.0,
            "target_modules": list(parts),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        write_json(folder / "adapter_config.json", settings)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return Path(path).expanduser()


def _tensors(
    layers: int, flat: Mapping[str, Any], targets: list[TensorRule]
) -> Iterator[tuple[str, np.ndarray]]:
    """A and B of every matrix, ``[rank, inputs]`` and ``[outputs, rank]``."""
    for _, group in itertools.groupby(targets, lambda rule: rule.name):
        parts = []
        for rule in group:
            a, b = (np.asarray(flat[_leaf(rule, k)]) for k in ("lora_a", "lora_b"))
            rank = a.shape[-1:]
            parts.append(
                (replace(rule, outputs=rank), a, replace(rule, inputs=rank), b)
            )
        for at, name in parts[0][0].names(layers).items():
            module = f"{_PREFIX}{name.removesuffix('.weight')}"
            rows = [rule.to_file(a[at]) for rule, a, _, _ in parts]
            blocks = [rule.to_file(b[at]) for _, _, rule, b in parts]
            yield f"{module}.lora_A.weight", np.concatenate(rows)
            yield f"{module}.lora_B.weight", _block_diagonal(blocks)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The blocks from the upper left to the lower right, zeros elsewhere.

    >>> _block_diagonal([np.ones((1, 2)), np.full((2, 1), 3.0)]).tolist()
    [[1.0, 1.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 3.0]]
    """
    rows, columns = np.sum([block.shape for block in blocks], axis=0)
    out, row, column = np.zeros((rows, columns), blocks[0].dtype), 0, 0
    for block in blocks:
        height, width = block.shape
        out[row : row + height, column : column + width] = block
        row, column = row + height, column + width
    return out


def _leaf(rule: TensorRule, name: str) -> str:
    return ".".join((*rule.path[:-1], name))
