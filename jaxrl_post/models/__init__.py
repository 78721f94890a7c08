"""Language models: a decoder as pure functions, its weights in and out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_post.models.adapter_files import save_adapter
    from jaxrl_post.models.adapters import Lora, split_adapter
    from jaxrl_post.models.cache import Cache, Prefix
    from jaxrl_post.models.config import DecoderConfig
    from jaxrl_post.models.modules import policy_of
    from jaxrl_post.models.policy import Policy
    from jaxrl_post.models.stack import decoder, unstack_params
    from jaxrl_post.models.weights_in import load, stop_token_ids
    from jaxrl_post.models.weights_out import save

_HOMES = {
    "Cache": "cache",
    "DecoderConfig": "config",
    "Lora": "adapters",
    "Policy": "policy",
    "Prefix": "cache",
    "decoder": "stack",
    "load": "weights_in",
    "policy_of": "modules",
    "save": "weights_out",
    "save_adapter": "adapter_files",
    "split_adapter": "adapters",
    "stop_token_ids": "weights_in",
    "unstack_params": "stack",
}

__all__ = [
    "Cache",
    "DecoderConfig",
    "Lora",
    "Policy",
    "Prefix",
    "decoder",
    "load",
    "policy_of",
    "save",
    "save_adapter",
    "split_adapter",
    "stop_token_ids",
    "unstack_params",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
