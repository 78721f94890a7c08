"""Families of the Llama layout: their configs and the names of their tensors.

Everything that differs between a checkpoint's words and ours is a table here: keys of
``config.json``, and for every leaf of the parameter tree the tensor it is stored in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.models.config import DecoderConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Family:
    """What sets a family apart from Llama."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        defaults=(("num_key_value_heads", 32), ("max_position_embeddings", 32768)),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        defaults=(
            ("num_key_value_heads", 32),
            ("max_position_embeddings", 32768),
            ("head_dim", 128),
        ),
    ),
}
"""By ``model_type``; the defaults are those of transformers' config classes."""

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

_SIZES = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Keys of which one value is supported; absent and null are fine."""


def config_from_hf(
    values: Mapping[str, Any], source: str = "config.json"
) -> DecoderConfig:
    """The `DecoderConfig` of a Hugging Face ``config.json``.

    Args:
      values: the file's content, in transformers' older layout (``rope_theta``,
        ``rope_scaling``) or that of version 5 (``rope_parameters``).
      source: what errors call the file.

    Returns:
      The `DecoderConfig`; its `padded_vocab_size` and `vocab_size` are both the
      file's ``vocab_size``.

    Raises:
      InputError: a key is missing, or asks for what this decoder does not do.

    >>> config = config_from_hf(
    ...     {
    ...         "model_type": "qwen3",
    ...         "vocab_size": 64,
    ...         "hidden_size": 8,
    ...         "head_dim": 16,
    ...         "intermediate_size": 32,
    ...         "num_hidden_layers": 2,
    ...         "num_attention_heads": 4,
    ...         "num_key_value_heads": 2,
    ...         "rope_parameters": {"rope_theta": 1e6},
    ...     }
    ... )
    >>> config.head_dim, config.rope_theta, config.qk_norm
    (16, 1000000.0, True)
    """
    name = str(values.get("model_type"))
    if name not in FAMILIES:
        raise InputError(
            f"{source}: model_type {name!r} is not supported; {nearest(name, FAMILIES)}"
        )
    family = FAMILIES[name]
    values = {
        **dict(family.defaults),
        **{k: v for k, v in values.items() if v is not None},
    }
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    problems = [f"{key} is missing" for key in _REQUIRED if key not in values]
    problems += _wrong_types(values, rope)
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems) + ".")
    problems = [
        f"{key} = {values[key]!r} is not supported, only {only!r}"
        for key, only in _ONLY.items()
        if values.get(key, only) != only
    ]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        problems.append(f"rope_type = {rope_type!r} is not supported, only 'default'")
    layer_types = set(values.get("layer_types", ())) - {"full_attention"}
    if layer_types:
        problems.append(
            f"layer_types has {sorted(layer_types)}, supported is only 'full_attention'"
        )
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems) + ".")
    heads = values["num_attention_heads"]
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    try:
        return DecoderConfig(
            family=name,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads", heads),
            head_dim=values.get("head_dim", values["hidden_size"] // heads),
            rope_theta=float(theta),
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            max_positions=values.get("max_position_embeddings", 2048),
            stop_token_ids=token_ids(values.get("eos_token_id")),
        )
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _wrong_types(values: Mapping[str, Any], rope: Any) -> list[str]:
    """Values that no decoder can have: files are others' work."""
    if not isinstance(rope, Mapping):
        return [f"rope_parameters = {rope!r} is no object"]
    if not isinstance(values.get("layer_types", []), list):
        return [f"layer_types = {values['layer_types']!r} is no list"]

    def is_size(x):
        return type(x) is int and 0 < x < 2**31

    def is_positive(x):
        return type(x) in (int, float) and 0 < x < 1e30

    kinds = {
        **dict.fromkeys(_SIZES, ("a positive integer", is_size)),
        "rope_theta": ("a positive number", is_positive),
        "rms_norm_eps": ("a positive number", is_positive),
        "tie_word_embeddings": ("true or false", lambda x: type(x) is bool),
    }
    given = {**values, **{k: v for k, v in rope.items() if k == "rope_theta"}}
    return [
        f"{key} = {given[key]!r:.80} is not {words}"
        for key, (words, fits) in kinds.items()
        if key in given and not fits(given[key])
    ]


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads; inverse of `config_from_hf`.

    ``vocab_size`` is the number of the embedding's rows, padding included: there is
    no key for the number of tokens, which comes from the tokenizer.

    Raises:
      InputError: options that no supported family combines so.
    """
    family = FAMILIES.get(config.family)
    options = (config.qkv_bias, config.qk_norm)
    if family is None or options != (family.qkv_bias, family.qk_norm):
        raise InputError(
            f"family={config.family!r} with qkv_bias={config.qkv_bias} and "
            f"qk_norm={config.qk_norm} is none of transformers' models; it has "
            + ", ".join(
                f"{name} ({f.qkv_bias}, {f.qk_norm})" for name, f in FAMILIES.items()
            )
            + "."
        )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    biases = {} if config.qkv_bias else {"attention_bias": False}  # Qwen2 has no key
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.rows,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,  # where transformers 4 and others look
        **biases,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.stop_token_ids) or None,
    }


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An id, several or none, as config files have them, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"eos_token_id = {value!r:.80} is no token's id, nor several")
    return tuple(ids)


@dataclass(frozen=True)
class TensorRule:
    """Where one leaf of the parameter tree is stored.

    A file has matrices ``[outputs, inputs]`` with heads and their dimensions in one
    axis; the leaf has an axis for each.

    Attributes:
      path: keys from the tree's root to the leaf.
      name: the tensor's name, with ``{layer}`` where every layer has one.
      outputs: sizes of the axes that make the tensor's rows.
      inputs: sizes of the axes that make its columns; empty for a vector.
      transposed: the leaf is ``[*inputs, *outputs]``, else ``[*outputs, *inputs]``.
    """

    path: tuple[str, ...]
    name: str
    outputs: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    transposed: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf, of one layer's part where layers are stacked."""
        first, last = self.outputs, self.inputs
        return last + first if self.transposed else first + last

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return tuple(math.prod(axes) for axes in (self.outputs, self.inputs) if axes)

    @property
    def per_layer(self) -> bool:
        """Whether the leaf stacks one tensor per layer."""
        return "{layer}" in self.name

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor as the file has it."""
        if self.transposed:
            inputs = tuple(range(len(self.inputs)))
            leaf = np.moveaxis(leaf, inputs, tuple(i - len(inputs) for i in inputs))
        return np.ascontiguousarray(leaf.reshape(self.file_shape))

    def file_index(self, index: Index) -> Index:
        """The part of the file's tensor to read for `index` into the leaf.

        Of heads times dimensions, whole heads: `from_file` cuts the rest.
        """
        outputs, inputs = self._split(index)
        return _first_axis(outputs, self.outputs) + _first_axis(inputs, self.inputs)

    def from_file(self, block: np.ndarray, index: Index) -> np.ndarray:
        """The leaf's part `index` from what was read at `file_index`."""
        outputs, inputs = self._split(index)
        axes = [
            size if i else len(range(*part[0].indices(size)))
            for part, sizes in ((outputs, self.outputs), (inputs, self.inputs))
            for i, size in enumerate(sizes)
        ]
        cut = [
            part if i else slice(None)
            for parts in (outputs, inputs)
            for i, part in enumerate(parts)
        ]
        block = block.reshape(axes)[tuple(cut)]
        if self.transposed:
            outputs_at = tuple(range(len(self.outputs)))
            block = np.moveaxis(
                block, outputs_at, tuple(i - len(outputs_at) for i in outputs_at)
            )
        return block

    def _split(self, index: Index) -> tuple[Index, Index]:
        count = len(self.inputs) if self.transposed else len(self.outputs)
        first, last = tuple(index[:count]), tuple(index[count:])
        return (last, first) if self.transposed else (first, last)


def _first_axis(index: Index, sizes: tuple[int, ...]) -> Index:
    """`index` on the first of axes that are flattened into one, the others whole."""
    if not sizes:
        return ()
    start, stop, _ = index[0].indices(sizes[0])
    inner = math.prod(sizes[1:])
    return (slice(start * inner, stop * inner),)


def tensor_rules(config: DecoderConfig) -> Iterator[TensorRule]:
    """One rule for every leaf of the tree that `stack.decoder` builds for `config`."""
    width, mlp = (config.hidden_size,), (config.intermediate_size,)
    heads = (config.num_heads, config.head_dim)
    kv_heads = (config.num_kv_heads, config.head_dim)

    def embedding(leaf, name):
        return TensorRule((leaf,), name, (config.rows,), width, transposed=False)

    yield embedding("embed", "model.embed_tokens.weight")
    if not config.tie_embeddings:
        yield embedding("unembed", "lm_head.weight")
    yield TensorRule(("final_norm", "scale"), "model.norm.weight", width)

    def layer(path, name, *sizes):
        full = ("layers", *path.split("."))
        return TensorRule(full, "model.layers.{layer}." + name, *sizes)

    yield layer("attention_norm.scale", "input_layernorm.weight", width)
    yield layer("mlp_norm.scale", "post_attention_layernorm.weight", width)
    for part, features in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        name = f"self_attn.{part}_proj"
        yield layer(f"attention.{part}.kernel", f"{name}.weight", features, width)
        if config.qkv_bias:
            yield layer(f"attention.{part}.bias", f"{name}.bias", features)
        if config.qk_norm and part != "v":
            norm = f"self_attn.{part}_norm.weight"
            yield layer(f"attention.{part}_norm.scale", norm, (config.head_dim,))
    yield layer("attention.o.kernel", "self_attn.o_proj.weight", width, heads)
    yield layer("mlp.gate.kernel", "mlp.gate_proj.weight", mlp, width)
    yield layer("mlp.up.kernel", "mlp.up_proj.weight", mlp, width)
    yield layer("mlp.down.kernel", "mlp.down_proj.weight", width, mlp)
