"""Memory and time of attention, value and gradient, by every program that runs here.

    python scripts/bench_attention.py
    python scripts/bench_attention.py --heads 16 --kv-heads 8 --head-dim 128 \
        --dtype bfloat16 --lengths 4096 16384 --log attention.jsonl

One layer's attention without its projections: causal, one sequence or more of T tokens.
Memory is XLA's own account of the compiled program. The programs run in turns, and the
ratios are those of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post.errors import InputError
from jaxrl_post.models.attention import (
    IMPLEMENTATIONS,
    LayerCache,
    Visibility,
    attend,
    choose,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"batch": 1, "heads": 9, "kv_heads": 3, "head_dim": 64, "runs": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    lengths = [256, 512, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--most-gib", type=float, default=4.0, help="leave out larger")
    parser.add_argument("--log", type=Path, help="appends a row for each measurement")
    args = parser.parse_args()
    device = jax.devices()[0]
    about = {name: getattr(args, name) for name in sizes} | {
        "dtype": args.dtype,
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    for length in args.lengths:
        rows = measure(args, length)
        for row in rows:
            print(
                "T={tokens:6d}  {attention:8s} {temp_mib:9.1f} MiB of temp"
                "  {seconds:8.4f} s  {ratio:5.2f} x the time of plain".format(**row)
                if row["ratio"]
                else "T={tokens:6d}  {attention:8s} {temp_mib:9.1f} MiB of temp".format(
                    **row
                ),
                flush=True,
            )
            if args.log is not None:
                with args.log.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")


def measure(args: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """One row for each program that takes these shapes on this device."""
    dtype = jnp.dtype(args.dtype)
    programs, rows = {}, {}
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (args.batch, tokens, args.heads, args.head_dim))
    shape = (args.batch, args.kv_heads, tokens, args.head_dim)
    arrays = [q.astype(dtype), *(jax.random.normal(k, shape, dtype) for k in keys[1:])]
    for name in IMPLEMENTATIONS:
        try:
            how = choose(
                name,
                time=tokens,
                slots=tokens,
                prefix=0,
                head_dim=args.head_dim,
                dtype=dtype,
            )
        except InputError:  # another platform's
            continue
        if name == "auto" or how in programs:
            continue
        program = compile_program(how, arrays)
        temp = program.memory_analysis().temp_size_in_bytes
        rows[how] = {"tokens": tokens, "attention": how, "temp_mib": temp / 2**20}
        rows[how] |= {"seconds": None, "ratio": None}
        if temp <= args.most_gib * 2**30:
            programs[how] = program
    times: dict[str, list[float]] = {how: [] for how in programs}
    for run in range(args.runs + 1):
        for how, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if run:  # the first warms up
                times[how].append(time.perf_counter() - start)
    for how, seconds in times.items():
        rows[how]["seconds"] = statistics.median(seconds)
        if "plain" in times:
            ratio = rows[how]["seconds"] / statistics.median(times["plain"])
            rows[how]["ratio"] = round(ratio, 3)
    return list(rows.values())


def compile_program(how: str, arrays: list[jax.Array]) -> Any:
    """Value and gradient of a sum of squares, compiled."""

    def loss(q, k, v):
        batch, tokens = q.shape[:2]
        ids = jnp.ones((batch, tokens), jnp.int32)
        own = None
        if how == "plain":
            own = jnp.broadcast_to(
                jnp.tri(tokens, dtype=bool)[None], (batch, tokens, tokens)
            )
        out = attend(q, LayerCache(k, v), Visibility(ids, ids, own, how=how))
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    return program.lower(*arrays).compile()


if __name__ == "__main__":
    main()
