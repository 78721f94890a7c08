"""Adapters in peft's layout: ``adapter_config.json``, ``adapter_model.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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

    The folder appears whole or not at all.

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
      InputError: there is no adapter, `path` holds something, or the family's files
        have one matrix where several are adapted (Phi-3).
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
    if fused := sorted({module_name(rule) for rule in targets if rule.rows}):
        raise InputError(
            f"{', '.join(fused)}: one matrix in {policy.config.family}'s files, with "
            "an adapter for each of its parts here, which peft has no layout for; "
            "leave out --adapter (models.save) to write the merged model."
        )
    first = targets[0]
    rank = flat[_leaf(first, "lora_a")].shape[-1]
    scale = float(np.asarray(flat[_leaf(first, "lora_scale")])[0])
    with new_folder(path, overwrite, marker="adapter_config.json") as folder:
        tensors = dict(_tensors(policy.config.num_layers, flat, targets, rank))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": scale * rank,
            "lora_dropout": 0.0,
            "target_modules": [module_name(rule) for rule in targets],
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
    layers: int, flat: Mapping[str, Any], targets: list[TensorRule], rank: int
) -> Iterator[tuple[str, np.ndarray]]:
    """A and B of every layer, ``[rank, inputs]`` and ``[outputs, rank]``."""
    for rule in targets:
        matrices = {
            "lora_A": replace(rule, outputs=(rank,)),
            "lora_B": replace(rule, inputs=(rank,)),
        }
        for name, form in matrices.items():
            stacked = np.asarray(flat[_leaf(rule, name.lower())])
            for layer in range(layers):
                module = rule.name.format(layer=layer).removesuffix(".weight")
                tensor = form.to_file(stacked[layer])
                yield f"{_PREFIX}{module}.{name}.weight", tensor


def _leaf(rule: TensorRule, name: str) -> str:
    return ".".join((*rule.path[:-1], name))
