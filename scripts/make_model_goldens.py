"""Writes tests/goldens/models: tiny random models and what transformers says of them.

Needs PyTorch, which the project itself does not: in an environment of its own,

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install transformers==5.23.0 safetensors
    python scripts/make_model_goldens.py

Every folder has a model as transformers saves it and ``golden.npz``: ``tokens`` and
their ``logits``; left-padded ``prompts`` with their ``prompt_mask``, and ``greedy``:
the 64 tokens that ``generate`` continues them with. Where there are experts,
``router.npz`` has their balance loss on padded rows, with gradients, in float64. All
else in float32, eager attention; of `SMALL` the weights are of bfloat16's values, and
stored so. ``rope.json`` has the frequencies of every kind of rotation by transformers'
own functions.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LENGTHS = (5, 9, 12)  # of the prompts
NEW_TOKENS = 64
SMALLEST_MARGIN = 1e-3  # greedy tokens must not hang on rounding


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
WIDE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LOCAL, FULL = "sliding_attention", "full_attention"

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": ROPE},
    "llama_tied": {"rope_parameters": WIDE, "tie_word_embeddings": True},
    "qwen2": {"rope_parameters": WIDE},
    "qwen3": {"rope_parameters": WIDE, "head_dim": 12},
}
"""Settings by folder; the model type is what stands before ``_tied``."""

SMALL: dict[str, dict[str, Any]] = {
    "mistral": {"rope_parameters": LLAMA3, "sliding_window": 8, "head_dim": 12},
    "olmo2": {"rope_parameters": LINEAR},
    "olmo3": {
        "rope_parameters": {FULL: YARN, LOCAL: ROPE},
        "sliding_window": 8,
        "layer_types": [LOCAL, LOCAL, FULL],
        "num_hidden_layers": 3,
    },
    "gemma2": {
        "rope_parameters": ROPE,
        "sliding_window": 8,
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "rope_parameters": {FULL: LINEAR | {"rope_theta": 1e6}, LOCAL: ROPE},
        "sliding_window": 8,
        "layer_types": [LOCAL, FULL, LOCAL],
        "num_hidden_layers": 3,
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
    },
    "phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 128,
        "pad_token_id": 0,
    },
    "qwen3_moe": {
        "rope_parameters": YARN,
        "head_dim": 12,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "smollm3": {
        "rope_parameters": DYNAMIC,
        "no_rope_layers": [1, 0, 1],
        "num_hidden_layers": 3,
        "pad_token_id": 0,
    },
}


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model of transformers with random weights."""
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights at which every part of the model matters to the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.3 * noise)  # norms and biases
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)


def golden(
    model: PreTrainedModel, generator: torch.Generator
) -> dict[str, np.ndarray] | None:
    """The arrays of ``golden.npz``; None where a greedy token's lead is too small."""
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (3, 24), generator=generator)
    prompts = torch.randint(vocabulary, (3, max(LENGTHS)), generator=generator)
    columns = torch.arange(max(LENGTHS))
    mask = columns >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        logits = model(tokens).logits
        answer = model.generate(
            prompts * mask,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(answer.logits).topk(2).values
    if (best[..., 0] - best[..., 1]).min() < SMALLEST_MARGIN:
        return None
    return {
        "tokens": tokens.numpy(),
        "logits": logits.numpy(),
        "prompts": (prompts * mask).numpy(),
        "prompt_mask": mask.numpy(),
        "greedy": answer.sequences[:, max(LENGTHS) :].numpy(),
    }


def router_golden(model: PreTrainedModel, arrays) -> dict[str, np.ndarray]:
    """The load-balancing loss of right-padded rows, and some of its gradient."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the others have no float64
    tokens = torch.from_numpy(arrays["tokens"])
    mask = torch.arange(tokens.shape[1]) < torch.tensor([24, 15, 6])[:, None]
    loss = model(tokens, attention_mask=mask.long(), output_router_logits=True).aux_loss
    loss.backward()
    layers = model.model.layers
    return {
        "tokens": tokens.numpy(),
        "mask": mask.numpy(),
        "loss": loss.detach().numpy(),
        "router": torch.stack([x.mlp.gate.weight.grad for x in layers]).numpy(),
        "output": torch.stack(
            [x.self_attn.o_proj.weight.grad.T for x in layers]
        ).numpy(),
        "embedding": model.model.embed_tokens.weight.grad.numpy(),
    }


def rope_goldens() -> dict[str, Any]:
    """Frequencies, and the factor of cosine and sine, by kind of rotation."""
    out = {}
    for rope in (LINEAR, LLAMA3, YARN, YARN | {"truncate": False}, LONGROPE):
        config = LlamaConfig(**SHAPE | {"rope_parameters": rope})
        for length in (None, 200) if rope is LONGROPE else (None,):
            function = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
            frequencies, factor = function(config, "cpu", seq_len=length)
            name = f"{len(out)}_{rope['rope_type']}"
            out[name] = {
                "rope": rope,
                "max_positions": length or 128,
                "extended_positions": SHAPE["max_position_embeddings"],
                "frequencies": frequencies.tolist(),
                "factor": factor,
            }
    return out


def main() -> None:
    root = Path(__file__).parents[1] / "tests" / "goldens" / "models"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=root)
    parser.add_argument("--only", nargs="*", help="folders to write; else all")
    args = parser.parse_args()
    rope = json.dumps(rope_goldens(), indent=1)
    (args.out / "rope.json").write_text(rope + "\n", encoding="utf-8")
    for name, changes in (MODELS | SMALL).items():
        if args.only and name not in args.only:
            continue
        model = build(name.removesuffix("_tied"), **changes).eval()
        for seed in itertools.count():
            generator = torch.Generator().manual_seed(seed)
            randomize(model, generator)
            if name in SMALL:
                for parameter in model.parameters():
                    parameter.data = parameter.data.bfloat16().float()
            if (arrays := golden(model, generator)) is not None:
                break
        if "num_experts" in changes:
            np.savez_compressed(
                args.out / name / "router.npz", **router_golden(model, arrays)
            )
        (model.bfloat16() if name in SMALL else model).save_pretrained(args.out / name)
        np.savez_compressed(args.out / name / "golden.npz", **arrays)
        print(f"{name}: seed {seed}, |logits| <= {abs(arrays['logits']).max():.1f}")


if __name__ == "__main__":
    main()
