"""What the benchmarks work on: random models, a tokenizer for them, prompts."""

from __future__ import annotations

import itertools
import json
import os
import string
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "evidence" / "performance.jsonl"

MODELS: dict[str, dict[str, Any]] = {
    "qwen2-5m": {
        "family": "qwen2",
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "qkv_bias": True,
        "rms_norm_eps": 1e-6,
        "tie_embeddings": True,
    },
    "smollm2-135m": {
        "family": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "rope_theta": 100_000.0,
        "tie_embeddings": True,
    },
    "qwen3-8b": {
        "family": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_layers": 36,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "qk_norm": True,
    },
}
"""Arguments of `DecoderConfig`; the last one's costs are counted, nothing more."""


def open_model(name: str):
    """A policy and random parameters, the same ones each time."""
    import jax

    from jaxrl_post.models.config import DecoderConfig
    from jaxrl_post.models.stack import decoder

    policy = decoder(DecoderConfig(**MODELS[name]))
    return policy, policy.init(jax.random.key(0))


def write_checkpoint(name: str, folder: Path) -> None:
    """A random model that ends no sequence, as a folder that every library opens.

    All sequences are to be equally long, and no library is to be asked for anything
    unusual: one number of each embedding is the same for all tokens, and what is left
    of it in the last hidden state speaks against the end token.
    """
    from jaxrl_post import models

    policy, params = open_model(name)
    embed = params["embed"].at[:, 0].set(_BIAS).at[END, 0].set(-_BIAS)
    tokenizer = make_tokenizer(policy.vocab_size)
    models.save(policy, {**params, "embed": embed}, tokenizer, folder)


END = 0
_BIAS = 8.0
"""Several times what the layers add to a number of the residual stream."""


def make_tokenizer(size: int):
    """Bytes, and merged letters and digits up to `size` tokens.

    Random tokens decoded and encoded again are about as many as before, as they are
    with a trained tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [
        "<|endoftext|>"
    ]  # the END, and the name that Qwen's tokenizer insists on
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    signs = string.ascii_lowercase + string.digits + string.ascii_uppercase
    pairs = list(itertools.product(signs, signs))
    triples = (("".join(pair), sign) for pair in pairs for sign in signs)
    room = size - len(special) - len(alphabet)
    merges = list(itertools.islice(itertools.chain(pairs, triples), room))
    tokens = [*special, *alphabet, *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=special[END], eos_token=special[END]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def make_prompts(tokenizer, count: int) -> tuple[list[str], int]:
    """Questions that are all equally many tokens, and how many."""
    numbers = range(100, 100 + 8 * count)
    texts = [f"Question: what is {i} plus {i + 3}? Answer:" for i in numbers]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    common = Counter(lengths).most_common(1)[0][0]
    chosen = [t for t, n in zip(texts, lengths, strict=True) if n == common]
    if len(chosen) < count:
        raise ValueError(f"Only {len(chosen)} of {count} prompts have {common} tokens.")
    return chosen[:count], common


def about_run(cores: list[int]) -> dict[str, Any]:
    """Where and when something was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return {
        "threads": len(cores),
        "load": [round(x, 2) for x in os.getloadavg()],
        "commit": commit.stdout.strip() or None,
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Writes a row as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """All rows so far."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())
