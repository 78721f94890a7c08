"""What the vocabulary pass costs: XLA's memory and FLOPs, and time, as JSON lines.

    python scripts/bench_vocabulary.py > vocabulary.jsonl

For each vocabulary it compiles value and gradient of log-probs and entropy at two
numbers of tokens, by chunks and densely. Chunked memory should grow by at most
4 * D * 4 bytes per token whatever the vocabulary; the dense computation's grows with V.
A chunked pass multiplies by the unembedding four times (twice for the logits, which are
computed again on the way back, and once for each of the two gradients), a dense one
three times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.vocabulary import map_logits


def chunked_loss(hidden, unembedding, ids, *, chunk_size):
    logps, entropy = map_logits(
        lambda logits, ids: (logits.log_probs(ids), logits.entropy()),
        hidden,
        unembedding,
        ids,
        chunk_size=chunk_size,
    )
    return (0.01 * entropy - logps).mean()


def dense_loss(hidden, unembedding, ids, *, chunk_size):
    del chunk_size
    logps = jax.nn.log_softmax((hidden @ unembedding.T).astype(jnp.float32))
    entropy = -(jnp.exp(logps) * logps).sum(-1)
    return (0.01 * entropy - jnp.take_along_axis(logps, ids[:, None], 1)[:, 0]).mean()


def compile_step(loss, tokens, width, vocab, chunk_size):
    step = jax.value_and_grad(
        lambda h, w, ids: loss(h, w, ids, chunk_size=chunk_size), (0, 1)
    )
    shape = jax.ShapeDtypeStruct
    return (
        jax.jit(step)
        .lower(
            shape((tokens, width), jnp.float32),
            shape((vocab, width), jnp.float32),
            shape((tokens,), jnp.int32),
        )
        .compile()
    )


def median_seconds(steps, arguments, repeats):
    """Median time of each program; they take turns, so that drift hits all alike."""
    times = [[] for _ in steps]
    for _ in range(repeats + 1):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    losses = {"chunked": chunked_loss, "dense": dense_loss}
    for vocab in args.vocab:
        shapes = args.width, vocab, args.chunk
        steps = {k: compile_step(f, args.tokens, *shapes) for k, f in losses.items()}
        halves = {
            k: compile_step(f, args.tokens // 2, *shapes) for k, f in losses.items()
        }
        # Counted where no loop hides the repetitions: one chunk's forward pass and its
        # backward pass, XLA counting each loop's body once.
        counted = compile_step(chunked_loss, 2 * args.chunk, *shapes)
        product = 2 * args.chunk * args.width * vocab
        arguments = (
            jnp.asarray(rng.normal(size=(args.tokens, args.width)), jnp.float32),
            jnp.asarray(rng.normal(size=(vocab, args.width)) / 16, jnp.float32),
            jnp.asarray(rng.integers(0, vocab, args.tokens), jnp.int32),
        )
        seconds = median_seconds(list(steps.values()), arguments, args.repeats)
        for (name, step), median in zip(steps.items(), seconds, strict=True):
            temp, half = (
                program.memory_analysis().temp_size_in_bytes
                for program in (step, halves[name])
            )
            row = {
                "pass": name,
                "platform": jax.default_backend(),
                "tokens": args.tokens,
                "width": args.width,
                "vocab": vocab,
                "temp_bytes": temp,
                "temp_bytes_per_token": (temp - half)
                / (args.tokens - args.tokens // 2),
                "bound_bytes_per_token": 4 * args.width * 4,
                "seconds": round(median, 4),
            }
            if name == "chunked":
                row["chunk"] = args.chunk
                row["products"] = round(counted.cost_analysis()["flops"] / product, 3)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
