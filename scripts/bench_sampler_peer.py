"""transformers' `generate`, for `bench_sampler.py`, which starts this with an
interpreter that has torch and transformers.

    python scripts/bench_sampler_peer.py FOLDER BATCH PROMPT NEW THREADS

Prints one JSON object to begin with, then one for each line that it is sent.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = sys.argv[5]

import torch
import transformers


def main() -> None:
    folder, batch, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt))
    weights = sum(p.numel() for p in model.parameters())
    say({"weights": weights, "version": transformers.__version__})
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                top_k=0,
                use_cache=True,
            )
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "tokens": made.numel() - tokens.numel()})


def say(what: dict) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
