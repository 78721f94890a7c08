"""What GGUF files say of an architecture, in the words of ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_post.errors import InputError

ROPE_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)
"""Divisors of the rotation's frequencies, which are settings and no weights."""

_FAMILIES = {"qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}
"""By architecture, where the two are not the same."""

_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the model whose scores llama.cpp divides by ``sqrt(D / heads)``, knowing it
by them; by ``sqrt(head_dim)`` those of the others."""


def config_values(
    value: Callable[[str], Any], factors: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """``config.json`` as a file's fields tell it; what llama.cpp has in its code, too.

    Args:
      value: of a field by its key, None where there is none.
      factors: the `ROPE_TENSORS` that are there.
      source: what errors call the file.

    Raises:
      InputError: fields contradict each other.
    """
    arch = value("general.architecture")

    def of(key):
        return value(f"{arch}.{key}")

    values: dict[str, Any] = {"model_type": arch}
    if isinstance(arch, str):
        values["model_type"] = _FAMILIES.get(arch, arch)
    values |= {ours: of(theirs) for ours, theirs in _KEYS.items()}
    values["sliding_window"] = values["sliding_window"] or None  # Phi-4 has 0
    sizes = [values[k] for k in ("hidden_size", "num_attention_heads")]
    if not all(type(n) is int and n > 0 for n in sizes):
        return values  # which the config's own check names
    derived = sizes[0] // sizes[1]
    head_dim = values["head_dim"] or derived
    if arch == "qwen3moe":
        values["norm_topk_prob"] = True
    if arch in _LARGEST_GEMMA:
        largest = values["num_hidden_layers"] == _LARGEST_GEMMA[arch]
        values["query_pre_attn_scalar"] = derived if largest else head_dim
    if arch == "olmo2" and values["sliding_window"]:
        values["model_type"] = "olmo3"
    pattern = of("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ("full_attention", "sliding_attention")
        values["layer_types"] = [kinds[bool(local)] for local in pattern]
    elif pattern is not None:
        values["sliding_window_pattern"] = pattern
    if arch == "phi3" and (rotated := of("rope.dimension_count")):
        values["partial_rotary_factor"] = rotated / head_dim
    values["rope_scaling"] = _scaling(of, factors, values, source)
    return values


def _scaling(of, factors: Mapping[str, Any], values, source: str) -> dict | None:
    kind = of("rope.scaling.type")
    if factors:
        plain = factors.get("rope_freqs.weight")
        short, long = (factors.get(name, plain) for name in ROPE_TENSORS[1:])
        if short is None or long is None:
            raise InputError(f"{source}: of the rotation's two sets one is missing.")
        original = of("rope.scaling.original_context_length")
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": of("rope.scaling.attn_factor") or 1.0,
            "original_max_position_embeddings": original
            or values["max_position_embeddings"],
        }
    if kind in (None, "none"):
        return None
    known = {ours: of(f"rope.scaling.{key}") for ours, key in _SCALING.items()}
    if kind == "linear":
        known = {"factor": known["factor"]}
    return {"rope_type": kind, **{k: v for k, v in known.items() if v is not None}}
