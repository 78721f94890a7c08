"""What a checkpoint's ``config.json`` says, and what is ours.

Everything in which a family differs from Llama is an entry of `catalogue.FAMILIES`; the
names of tensors are in `models.tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.models.catalogue import FAMILIES, Family
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.rope import FULL, LOCAL, is_positive, read_rope, rope_parts

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_KEYS = {
    **_SIZES,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Fields of every family, and the keys of ``config.json`` that have them."""

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "use_bidirectional_attention": False,
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
        also = (
            " It reads images too; the text model inside would have to be saved alone."
            if "vision_config" in values
            else ""
        )
        raise InputError(
            f"{source}: model_type {name!r} is not supported; "
            f"{nearest(name, FAMILIES)}{also}"
        )
    family = FAMILIES[name]
    window = values.get("sliding_window", family.defaults.get("sliding_window"))
    caps = [key for k, key in family.keys.items() if k.endswith("softcap")]
    absent = {k: None for k in caps if k in values}  # null is a value of these
    values = {k: v for k, v in values.items() if v is not None}
    if "num_local_experts" in values:  # transformers 5 writes it so
        values.setdefault("num_experts", values["num_local_experts"])
    values = {**family.defaults, **absent, **values, "sliding_window": window}
    problems = [f"{key} is missing" for key in _SIZES.values() if key not in values]
    problems += _wrong_types(values, family)
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems) + ".")
    allowed = {**_ONLY, **family.only}
    for key in (
        *family.keys.values(),
        *["use_sliding_window"] * family.optional_window,
    ):
        allowed.pop(key, None)
    if "hidden_activation" in allowed:  # which transformers then reads in its place
        del allowed["hidden_act"]
    problems = [
        f"{key} = {values[key]!r} is not supported, only {only!r}"
        for key, only in allowed.items()
        if values.get(key, only) != only
    ]
    unrotated = _unrotated(values, name)
    local, odd = _local_layers(values, family, unrotated)
    rope, wrong = read_rope(values, family)
    problems += odd + wrong
    if problems:
        raise InputError(f"{source}: " + "; ".join(problems) + ".")
    heads = values["num_attention_heads"]
    derived = {
        "num_key_value_heads": heads,
        "head_dim": values["hidden_size"] // heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    found = {**derived, **values}
    keys = {**_KEYS, **family.keys}
    read = {ours: found[key] for ours, key in keys.items() if key in found}
    try:
        return DecoderConfig(
            **{
                **{**read, "family": name, **family.options, **rope},
                "unrotated_layers": unrotated,
                "local_layers": local,
                "window": window if local else None,
                "stop_token_ids": token_ids(values.get("eos_token_id")),
            }
        )
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _unrotated(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Numbers of the layers without rotation (SmolLM3)."""
    layers = range(values["num_hidden_layers"])
    if name != "smollm3":
        return ()
    if "no_rope_layers" in values:
        return tuple(i for i in layers if not values["no_rope_layers"][i])
    return tuple(i for i in layers if not (i + 1) % values["no_rope_layer_interval"])


def _local_layers(
    values: Mapping[str, Any], family: Family, unrotated: tuple[int, ...]
) -> tuple[tuple[int, ...], list[str]]:
    """Numbers of the layers with a window, and what is wrong with them."""
    layers = range(values["num_hidden_layers"])
    types = values.get("layer_types")
    known = {FULL} if family.local in (None, "all") else {FULL, LOCAL}
    if odd := sorted({*map(str, types or ())} - known):
        supported = " and ".join(map(repr, sorted(known)))
        return (), [f"layer_types has {odd}, supported is only {supported}"]
    if types is not None and len(types) != len(layers):
        return (), [f"layer_types has {len(types)} entries for {len(layers)} layers"]
    wanted = values.get("use_sliding_window", not family.optional_window)
    if family.local is None or not wanted or values["sliding_window"] is None:
        return (), []
    if family.local == "all":
        return tuple(layers), []
    if types is not None:
        return tuple(i for i in layers if types[i] == LOCAL), []
    if family.local == "unrotated":
        return unrotated, []
    if family.local == "upper":
        return tuple(layers)[values.get("max_window_layers", 28) :], []
    every = values.get("sliding_window_pattern", family.local)
    return tuple(i for i in layers if (i + 1) % every), []


def _wrong_types(values: Mapping[str, Any], family: Family) -> list[str]:
    """Values that no decoder can have: files are others' work."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key, {})
        if not isinstance(rope, Mapping):
            return [f"{key} = {rope!r} is no object"]
        if odd := [k for k in (FULL, LOCAL) if not isinstance(rope.get(k) or {}, dict)]:
            return [f"{key}.{odd[0]} = {rope[odd[0]]!r:.80} is no object"]
    for key in ("layer_types", "no_rope_layers"):
        if not isinstance(values.get(key, []), list):
            return [f"{key} = {values[key]!r} is no list"]

    def is_size(x):
        return type(x) is int and 0 < x < 2**31

    size = ("a positive integer", is_size)
    positive = ("a positive number", is_positive)
    truth = ("true or false", lambda x: type(x) is bool)
    sizes = [
        *(*_SIZES.values(), "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "original_max_position_embeddings"),
        *("sliding_window", "sliding_window_pattern", "no_rope_layer_interval"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ]
    numbers = ["rope_theta", "rms_norm_eps", "rope_local_base_freq"]
    numbers += ["query_pre_attn_scalar"]
    numbers += ["attn_logit_softcapping", "final_logit_softcapping"]
    kinds = {
        **dict.fromkeys(sizes, size),
        **dict.fromkeys(numbers, positive),
        **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob"), truth),
        "use_sliding_window": truth,
        "max_window_layers": (
            "a number of layers",
            lambda x: type(x) is int and x >= 0,
        ),
        "partial_rotary_factor": ("a share", lambda x: is_positive(x) and x <= 1),
    }
    parts = [values, *rope_parts(values, family)]
    problems = [
        f"{key} = {given[key]!r:.80} is not {words}"
        for key, (words, fits) in kinds.items()
        for given in parts
        if given.get(key) is not None and not fits(given[key])
    ]
    layers = values.get("num_hidden_layers")
    if "no_rope_layers" in values and len(values["no_rope_layers"]) != layers:
        problems.append(f"no_rope_layers has not one entry for each of {layers} layers")
    return list(dict.fromkeys(problems))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads; inverse of `config_from_hf`.

    ``vocab_size`` is the number of the embedding's rows, padding included: there is
    no key for the number of tokens, which comes from the tokenizer.

    Raises:
      InputError: options that no supported family combines so.
    """
    family = FAMILIES.get(config.family, Family(""))
    keys = {**_KEYS, **family.keys}
    out: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{key: getattr(config, ours) for ours, key in keys.items()},
        "vocab_size": config.rows,
        "hidden_act": "silu",
        **family.only,
        "max_position_embeddings": config.extended_positions or config.max_positions,
        "rope_theta": config.rope_theta,  # where transformers 4 and others look
        "eos_token_id": list(config.stop_token_ids) or None,
    }
    if not config.qkv_bias:  # Qwen2 has no key
        out["attention_bias"] = False
    if "hidden_activation" in out:
        out["hidden_act"] = out["hidden_activation"]
    scaling = dict(config.rope_scaling)
    rope = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
    if "partial_rotary" in family.keys:
        rope["partial_rotary_factor"] = config.partial_rotary
    rope = {k: list(v) if isinstance(v, tuple) else v for k, v in rope.items()}
    out["rope_parameters"] = rope
    if config.local_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        out["rope_parameters"] = {FULL: rope, LOCAL: local}
        out["rope_local_base_freq"] = config.local_rope_theta
    if scaling:
        out["rope_scaling"] = rope
        if family.fused:
            original = "original_max_position_embeddings"
            out[original] = scaling.get(original)
    layers = range(config.num_layers)
    if family.local is not None:
        out["sliding_window"] = config.window
        if family.optional_window:
            out["use_sliding_window"] = config.window is not None
        if family.local != "all":
            here = config.local_layers
            out["layer_types"] = [LOCAL if i in here else FULL for i in layers]
    if config.family == "smollm3":
        rotated = [int(i not in config.unrotated_layers) for i in layers]
        out["no_rope_layers"] = rotated
    _check_family(config, out)
    return out


def _check_family(config: DecoderConfig, written: Mapping[str, Any]) -> None:
    """Raises InputError where what was written says less than the config."""
    told = config_from_hf(written, "the model") if config.family in FAMILIES else None
    free = {"vocab_size", "padded_vocab_size", "max_positions", "extended_positions"}
    lost = [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in fields(DecoderConfig)
        if f.name not in free
        and (told is None or getattr(told, f.name) != getattr(config, f.name))
    ]
    if lost:
        what = f"family={config.family!r} with " + " and ".join(lost)
        raise InputError(
            f"{what if told else f'family={config.family!r}'} is none of transformers' "
            f"models; families: {', '.join(FAMILIES)}."
        )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An id, several or none, as config files have them, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"eos_token_id = {value!r:.80} is no token's id, nor several")
    return tuple(ids)
