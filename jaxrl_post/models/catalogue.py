"""The families of models: in what each differs from Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What sets a family apart from Llama.

    Attributes:
      architecture: transformers' class.
      options: fields of `DecoderConfig` that its layout fixes.
      keys: other fields, and the keys of ``config.json`` that have them.
      defaults: of keys that a file may lack, as transformers' config classes have them.
      only: keys of which it allows one value.
      local: the layers with a window where ``layer_types`` does not say: all of them,
        each but every so manieth, those from ``max_window_layers`` on, or those without
        rotation; None: windows are not supported.
      optional_window: there is one only where ``use_sliding_window`` is true.
      nested_rope: local layers have a rotation of their own.
      fused: q, k, v and gate, up are one tensor each.
    """

    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    local: str | int | None = None
    optional_window: bool = False
    nested_rope: bool = False
    fused: bool = False


_WINDOW = {"sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, **_WINDOW}
_OLMO = {"pre_norm": False, "post_norm": True, "qk_norm": True, "joint_qk_norm": True}
_GEMMA: Mapping[str, Any] = {
    "options": {
        "post_norm": True,
        "norm_offset": 1.0,
        "scale_embeddings": True,
        "activation": "gelu_tanh",
    },
    "keys": {
        "query_scalar": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    "only": {"hidden_activation": "gelu_pytorch_tanh"},
    "defaults": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
        **_WINDOW,
    },
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={
            **{"num_key_value_heads": 8, "max_position_embeddings": 131_072},
            **_WINDOW,
        },
        local="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        options={"qkv_bias": True},
        defaults=_QWEN,
        local="upper",
        optional_window=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        options={"qk_norm": True},
        defaults={**_QWEN, "head_dim": 128},
        local="upper",
        optional_window=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        options={"qk_norm": True},
        keys={
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
            "normalise_experts": "norm_topk_prob",
        },
        defaults={
            **{**_QWEN, "num_key_value_heads": 4, "num_experts": 128},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 768},
        },
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
        local="all",
        optional_window=True,
    ),
    "olmo2": Family("Olmo2ForCausalLM", options=_OLMO, defaults={"rms_norm_eps": 1e-5}),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        options=_OLMO,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, **_WINDOW},
        local=4,
        nested_rope=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        **{
            **_GEMMA,
            "defaults": {
                **{**_GEMMA["defaults"], "max_position_embeddings": 8192},
                **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            },
        },
        local=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **{
            **_GEMMA,
            "options": {**_GEMMA["options"], "qk_norm": True},
            "defaults": {
                **{**_GEMMA["defaults"], "max_position_embeddings": 131_072},
                **{"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            },
        },
        local=6,
        nested_rope=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        keys={"partial_rotary": "partial_rotary_factor"},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        local="all",
        fused=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults={
            **{"num_key_value_heads": 4, "max_position_embeddings": 32_768},
            **{"rope_theta": 2e6, "tie_word_embeddings": True},
            "no_rope_layer_interval": 4,
        },
        local="unrotated",
        optional_window=True,
    ),
}
"""By ``model_type``."""
