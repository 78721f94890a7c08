"""Writes tests/goldens/models: tiny random models and what transformers says of them.

Needs PyTorch, which the project itself does not: in an environment of its own,

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install transformers==5.23.0 safetensors
    python scripts/make_model_goldens.py

Every folder has a model as transformers saves it and ``golden.npz``: ``tokens`` and
their ``logits``; left-padded ``prompts`` with their ``prompt_mask``, and ``greedy``:
the 64 tokens that ``generate`` continues them with. All in float32, eager attention.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


def models() -> dict[str, PreTrainedModel]:
    """One model per layout, by the name of its folder."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    wide_rope = {"rope_type": "default", "rope_theta": 1e6}
    llama = LlamaConfig(**SHAPE, rope_parameters=rope)
    tied = LlamaConfig(**SHAPE, rope_parameters=wide_rope, tie_word_embeddings=True)
    qwen2 = Qwen2Config(**SHAPE, rope_parameters=wide_rope)
    qwen3 = Qwen3Config(**SHAPE, rope_parameters=wide_rope, head_dim=12)
    return {
        "llama": LlamaForCausalLM(llama),
        "llama_tied": LlamaForCausalLM(tied),
        "qwen2": Qwen2ForCausalLM(qwen2),
        "qwen3": Qwen3ForCausalLM(qwen3),
    }


def randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights at which every part of the model matters to the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.3 * noise)  # norms and biases
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)


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


def main() -> None:
    root = Path(__file__).parents[1] / "tests" / "goldens" / "models"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=root)
    out = parser.parse_args().out
    for name, model in models().items():
        model.eval()
        for seed in itertools.count():
            generator = torch.Generator().manual_seed(seed)
            randomize(model, generator)
            if (arrays := golden(model, generator)) is not None:
                break
        model.save_pretrained(out / name)
        np.savez_compressed(out / name / "golden.npz", **arrays)
        print(f"{name}: seed {seed}, |logits| <= {abs(arrays['logits']).max():.1f}")


if __name__ == "__main__":
    main()
