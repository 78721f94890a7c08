"""What the loss over the vocabulary costs: XLA's memory and FLOPs, and time.

    python scripts/bench_vocabulary.py --out docs/evidence/vocabulary.jsonl

The loss is SDPO's over the whole vocabulary, the Jensen-Shannon divergence of a student
from a teacher, in value and gradients. Three ways to the same number:

    dense   both [N, V] arrays of logits, as plain JAX has it
    map     `vocabulary.map_logits`: a chunk of tokens at a time, again on the way back
    sum     `vocabulary.sum_logits`: the same, its gradients formed with the logits

Memory is what XLA allocates beside arguments and results (`memory_analysis`), so it can
be told for more tokens than this machine holds. Times are medians of runs that take
turns, after a first one.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.losses import divergence
from jaxrl_post.vocabulary import map_logits, sum_logits

jensen_shannon = functools.partial(divergence, alpha=0.5)


def dense(hidden, unembedding, teacher):
    frozen = jax.lax.stop_gradient(unembedding)
    student_logps = jax.nn.log_softmax(hidden @ unembedding.T)
    return jensen_shannon(student_logps, jax.nn.log_softmax(teacher @ frozen.T)).sum()


def of_chunk(student, teacher):
    return jensen_shannon(student.log_softmax(), teacher.log_softmax())


def by_map(hidden, unembedding, teacher):
    pair = unembedding, jax.lax.stop_gradient(unembedding)
    return map_logits(of_chunk, (hidden, teacher), pair).sum()


def by_sum(hidden, unembedding, teacher):
    def loss(*logits):
        return of_chunk(*logits), ()

    return sum_logits(loss, (hidden, teacher), unembedding)[0]


PASSES = {"dense": dense, "map": by_map, "sum": by_sum}


def compile_step(loss, tokens: int, width: int, vocab: int):
    states = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    weights = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    step = jax.value_and_grad(loss, (0, 1))
    return jax.jit(step).lower(states, weights, states).compile()


def temp_bytes(loss, *shape: int) -> int:
    return compile_step(loss, *shape).memory_analysis().temp_size_in_bytes


def memory_rows(counts: list[int], width: int, vocab: int) -> Iterator[dict]:
    plain: dict[int, int] = {}
    for name, loss in PASSES.items():
        first = None
        for tokens in counts:
            taken = temp_bytes(loss, tokens, width, vocab)
            first = first or (tokens, taken)
            plain.setdefault(tokens, taken)
            row = {
                "measure": "memory",
                "pass": name,
                "tokens": tokens,
                "temp_bytes": taken,
                "dense_over_this": round(plain[tokens] / taken, 2),
            }
            if tokens != first[0]:
                row["bytes_per_further_token"] = round(
                    (taken - first[1]) / (tokens - first[0])
                )
                row["bound"] = 4 * width * 4
            yield row


def time_rows(tokens: int, width: int, vocab: int, repeats: int) -> list[dict]:
    rng = np.random.default_rng(0)
    arguments = [
        jnp.asarray(scale * rng.normal(size=(rows, width)), jnp.float32)
        for rows, scale in ((tokens, 1.0), (vocab, width**-0.5), (tokens, 1.0))
    ]
    steps = {name: compile_step(f, tokens, width, vocab) for name, f in PASSES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    values = {}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            value, gradients = jax.block_until_ready(step(*arguments))
            seconds[name].append(time.perf_counter() - start)
            values[name] = (float(value), float(norm(gradients)))
            del gradients
    for name in steps:  # a ratio of different work would mean nothing
        np.testing.assert_allclose(values[name], values["dense"], rtol=1e-4)
    plain = statistics.median(seconds["dense"][1:])
    return [
        {
            "measure": "time",
            "pass": name,
            "tokens": tokens,
            "seconds": [round(x, 3) for x in taken[1:]],
            "over_dense": round(statistics.median(taken[1:]) / plain, 3),
        }
        for name, taken in seconds.items()
    ]


def norm(gradients) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(x, x) for x in gradients))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--memory", type=int, nargs="*", default=[2048, 32_768])
    parser.add_argument("--time", type=int, nargs="*", default=[1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines; the screen by default")
    args = parser.parse_args()

    shape = {"width": args.width, "vocab": args.vocab}
    about = {**shape, "platform": jax.default_backend(), "jax": jax.__version__}
    rows: list[dict] = []
    rows += memory_rows(args.memory, **shape)
    for tokens in args.time:
        rows += time_rows(tokens, **shape, repeats=args.repeats)
    text = "".join(json.dumps({**row, **about}) + "\n" for row in rows)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
