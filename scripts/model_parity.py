"""Every family against transformers, on its own settings or on ones drawn at random.

Needs PyTorch besides the project itself (see make_model_goldens.py):

    python scripts/model_parity.py --random 30 --seed 0 --out docs/evidence/parity.jsonl

Each row is one model of random weights: the largest differences of its logits, alone,
padded on either side and packed; whether 64 greedy tokens are the same through a cache;
and the logits of what `models.save` wrote, as transformers reads it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError:
    sys.exit("model_parity.py compares with transformers' models, which need PyTorch.")

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from make_model_goldens import MODELS, NEW_TOKENS, SMALL, build, golden, randomize

from jaxrl_post import models

FULL, LOCAL = "full_attention", "sliding_attention"
PADDING = 8
LIMIT = 2e-4
CHECKS = ("logits", "left_padding", "right_padding", "packing", "reload")


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A family and settings: odd numbers of heads, untied heads, uneven windows."""
    name = rng.choice([*MODELS, *SMALL])
    settings = dict((MODELS | SMALL)[name])
    groups, kv_heads, layers = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3]), 3
    heads, head_dim = groups * kv_heads, rng.choice([6, 8, 12, 16])
    if name == "phi3":  # its head_dim is derived, and its factors are for 8
        head_dim = 8
    multiple = heads if name in ("llama", "llama_tied") else 1
    width = rng.choice([20, 28, 36, 44])  # torch multiplies experts in 16 bytes
    settings |= {
        "vocab_size": rng.choice([61, 96, 130]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": -(-width // multiple) * multiple,
        "intermediate_size": rng.choice([17, 40, 64]),
        "num_hidden_layers": layers,
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
    }
    if name in ("phi3", "qwen2", "olmo2", "olmo3", "smollm3") or "gemma" in name:
        settings["hidden_size"] = heads * head_dim
    if name not in ("phi3", "qwen2", "olmo2", "olmo3", "smollm3"):
        settings["head_dim"] = head_dim
    types = [rng.choice([FULL, LOCAL]) for _ in range(layers)]
    if name in ("mistral", "phi3"):
        settings["sliding_window"] = rng.choice([None, 3, 7, 100])
    elif name in ("gemma2", "gemma3_text", "olmo3"):
        # transformers needs a layer of each kind that has a rotation of its own
        types[:2] = [FULL, LOCAL]
        rng.shuffle(types)
        settings |= {"sliding_window": rng.choice([2, 5, 9]), "layer_types": types}
    elif name in ("qwen2", "qwen3", "smollm3") and rng.random() < 0.5:
        settings |= {"sliding_window": 5, "use_sliding_window": True}
        settings["layer_types"] = types
    if name == "smollm3":
        settings["no_rope_layers"] = [rng.randrange(2) for _ in range(layers)]
    if name == "qwen3_moe":
        experts = rng.choice([3, 5, 8])
        settings |= {"num_experts": experts, "norm_topk_prob": rng.random() < 0.5}
        settings["num_experts_per_tok"] = rng.randrange(1, experts)
    return name, settings


def compare(model, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, Any]:
    """One row of the table, of a model and what it says of the tokens."""
    model.save_pretrained(folder / "theirs")
    policy, params, _ = models.load(folder / "theirs")
    cap = policy.logit_softcap

    def head(hidden):
        logits = hidden @ policy.unembedding(params).T
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @jax.jit
    def forward(tokens, segments, positions):
        return head(policy.hidden(params, tokens, positions, segments)[0])

    tokens, expected = arrays["tokens"], arrays["logits"]
    rows, length = tokens.shape

    def difference(before, behind):
        wide = np.pad(tokens, ((0, 0), (before, behind)), constant_values=7)
        segments = np.pad(np.ones_like(tokens), ((0, 0), (before, behind)))
        positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
        logits = forward(wide, segments, positions)[:, before : before + length]
        return float(np.abs(logits - expected).max())

    first = np.roll(tokens, 1, axis=0)[:, :PADDING]
    packed = np.concatenate([first, tokens], axis=1)
    segments = np.repeat([[1, 2]], rows, axis=0).repeat([PADDING, length], axis=1)
    positions = np.concatenate([np.arange(PADDING), np.arange(length)])
    both = forward(packed, segments, np.broadcast_to(positions, packed.shape))
    apart = np.concatenate([np.roll(expected, 1, 0)[:, :PADDING], expected], axis=1)

    path = models.save(policy, params, None, folder / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    with torch.no_grad():
        reloaded = again(torch.from_numpy(tokens)).logits.numpy()
    return {
        "logits": difference(0, 0),
        "left_padding": difference(PADDING, 0),
        "right_padding": difference(0, PADDING),
        "packing": float(np.abs(both - apart).max()),
        "greedy_64_equal": bool((greedy(policy, params, head, arrays)).all()),
        "reload": float(np.abs(reloaded - expected).max()),
        "reload_complains": [k for k, v in report.items() if v],
    }


def greedy(policy, params, head, arrays) -> np.ndarray:
    """Whether each token through the cache is the one that `generate` wrote."""
    prompts, mask = arrays["prompts"], arrays["prompt_mask"].astype(np.int32)
    rows, length = prompts.shape
    ones = jnp.ones((rows, 1), jnp.int32)

    @jax.jit
    def decode():
        def step(carry, _):
            token, position, cache = carry
            hidden, cache = policy.hidden(
                params, token[:, None], position[:, None], ones, cache
            )
            following = jnp.argmax(head(hidden[:, -1]), axis=-1).astype(jnp.int32)
            return (following, position + 1, cache), token

        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        cache = policy.init_cache(rows, length + NEW_TOKENS)
        hidden, cache = policy.hidden(params, prompts, positions, mask, cache)
        token = jnp.argmax(head(hidden[:, -1]), axis=-1).astype(jnp.int32)
        start = (token, jnp.asarray(mask.sum(1)), cache)
        return jax.lax.scan(step, start, length=NEW_TOKENS)[1].T

    return np.asarray(decode()) == arrays["greedy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=0, help="settings to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cases = [*(MODELS | SMALL).items(), *(draw(rng) for _ in range(args.random))]
    command = " ".join(["python", "scripts/model_parity.py", *sys.argv[1:]])
    lines = [
        {
            "command": command,
            "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        }
    ]
    header = (*CHECKS, "greedy 64", "")
    print(f"{'family':12}", *(f"{name:>13}" for name in header))
    failed = 0
    for number, (name, settings) in enumerate(cases):
        model = build(name.removesuffix("_tied"), **settings).eval()
        for seed in itertools.count():
            generator = torch.Generator().manual_seed(seed)
            randomize(model, generator)
            if (arrays := golden(model, generator)) is not None:
                break
        with tempfile.TemporaryDirectory() as folder:
            row = compare(model, arrays, Path(folder))
        good = all(row[check] <= LIMIT for check in CHECKS)
        good = good and row["greedy_64_equal"] and not row["reload_complains"]
        failed += not good
        drawn = number >= len(MODELS | SMALL)
        lines.append({"family": name, "drawn": drawn, **row, "settings": settings})
        print(
            f"{name:12}",
            *(f"{row[check]:13.1e}" for check in CHECKS),
            f"{row['greedy_64_equal']!s:>13}",
            "" if good else "FAILED",
            flush=True,
        )
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(cases)} models, {failed} beyond {LIMIT} or unequal")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
