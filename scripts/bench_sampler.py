"""Tokens per second of the sampler on a random model.

    python scripts/bench_sampler.py
    python scripts/bench_sampler.py --layers 30 --width 576 --heads 9 --kv-heads 3 \
        --mlp 1536 --vocab 49152 --prompts 2 --group 4

Every sequence is made as long as allowed. Times are medians over runs after the first,
which compiles.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np

from jaxrl_post.generation import Sampler
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.stack import decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "mlp": 352}
    sizes |= {"vocab": 512, "prompts": 16, "group": 8, "prompt_length": 32}
    for name, value in (sizes | {"new": 32, "runs": 10}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float)
    args = parser.parse_args()

    config = DecoderConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.width // args.heads,
        tie_embeddings=True,
    )
    policy = decoder(config)
    params = jax.block_until_ready(jax.jit(policy.init)(jax.random.key(0)))
    weights = sum(x.size for x in jax.tree.leaves(params))
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, args.vocab, (args.prompts, args.prompt_length))

    def seconds(new: int) -> tuple[float, float]:
        sampler = Sampler(
            policy,
            max_new_tokens=new,
            temperature=args.temperature,
            top_p=args.top_p,
        )
        times = []
        for run in range(args.runs + 1):
            start = time.perf_counter()
            key = jax.random.key(run)
            mask = np.ones_like(contexts)
            sampler.generate(params, contexts, mask, key=key, group_size=args.group)
            times.append(time.perf_counter() - start)
        return times[0], statistics.median(times[1:])

    rows = args.prompts * args.group
    compile_time, whole = seconds(args.new)
    first = seconds(1)[1]
    step = (whole - first) / max(1, args.new - 1)
    flops = 2 * weights * rows
    print(f"{weights / 1e6:.2f} M weights, {rows} sequences of {args.new} tokens")
    print(f"first call, compiling   {compile_time:8.2f} s")
    print(f"whole                   {whole * 1e3:8.1f} ms")
    print(f"prefill + first token   {first * 1e3:8.1f} ms")
    print(f"decoding step           {step * 1e3:8.3f} ms")
    print(f"generated               {rows * args.new / whole:8.0f} tokens/s")
    print(f"matrix products         {flops / step / 1e9:8.1f} GFLOP/s in a step")


if __name__ == "__main__":
    main()
