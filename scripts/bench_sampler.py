"""The sampler beside transformers, beside the machine's bound and beside itself.

    python scripts/bench_sampler.py decode --peer TORCH_ENV/bin/python
    python scripts/bench_sampler.py decode --model smollm2-135m --prompt 32 \
        --new 32 --runs 3 --peer TORCH_ENV/bin/python
    python scripts/bench_sampler.py continuous
    python scripts/bench_sampler.py prefix --prompt 512

`decode`: tokens per second at one or several batch sizes, every sequence as long as
allowed, in pairs of runs that take turns with transformers' `generate` on the same
checkpoint and threads; no ratio where parameters or token counts differ. `bound` is the
time to read the weights once a step at the bandwidth that this process measures, the
prefill not counted; `bound_flops` that of the products at its rate of products.
`continuous`: 256 sequences in 32 slots, their lengths geometric (a share of the
vocabulary ends a sequence), refilled against static waves. `prefix`: what is stored for
a group's prompt. Times are medians after a run that compiles.

Each row is a line of JSON, appended to --out, if given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_work
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import models
from jaxrl_post.cli.memory import keep_freed_memory
from jaxrl_post.generation import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["decode", "continuous", "prefix"])
    parser.add_argument(
        "--model",
        default="qwen2-5m",
        help="folder, GGUF file, or one of random weights: qwen2-5m, smollm2-135m",
    )
    parser.add_argument("--peer", help="python with torch and transformers")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    sizes = {"prompt": 64, "new": 64, "runs": 5}
    sizes |= {"prompts": 32, "group": 8, "slots": 32, "longest": 1024, "mean": 64}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="file that rows are appended to")
    args = parser.parse_args()
    keep_freed_memory()  # as `jaxrl-post train` does
    if args.model in bench_work.MODELS:
        policy, params = bench_work.open_model(args.model)
    else:
        policy, params, _ = models.load(args.model)
    params = jax.block_until_ready(params)
    make = {"decode": decode, "continuous": continuous, "prefix": prefix}[args.what]
    for row in make(args, policy, params):
        row = {
            "what": args.what,
            "model": Path(args.model).name,
            "weights": sum(x.size for x in jax.tree.leaves(params)),
            "cores": len(os.sched_getaffinity(0)),
            "jax": jax.__version__,
            **row,
        }
        line = json.dumps({k: rounded(v) for k, v in row.items()})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


def decode(args, policy, params):
    """A row for each batch size."""
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory() as folder:
        if args.peer:
            models.save(policy, params, None, folder)
        for batch in args.batch:
            ours = timed(args, policy, params, batch, args.new)
            first = timed(args, policy, params, batch, 1)
            with Peer(args, folder, batch) as peer:
                # The first runs compile, and fill caches.
                pairs = [(ours(), first(), peer()) for _ in range(args.runs + 1)][1:]
                whole, prefill, theirs = (
                    statistics.median(x) for x in zip(*pairs, strict=True)
                )
                step = (whole - prefill) / (args.new - 1)
                row = {
                    "batch": batch,
                    "prompt": args.prompt,
                    "new": args.new,
                    "tokens_per_second": batch * args.new / whole,
                    "prefill_ms": prefill * 1e3,
                    "step_ms": step * 1e3,
                }
                bytes_, flops = machine()
                row |= {
                    "read_GB_per_second": bytes_ / 1e9,
                    "GFLOP_per_second": flops / 1e9,
                    "of_bound": size / bytes_ / step,
                    "of_bound_flops": size / 4 * 2 * batch / flops / step,
                }
                if args.peer:
                    row |= {
                        "transformers": peer.version,
                        "transformers_tokens_per_second": batch * args.new / theirs,
                        **peer.ratios(size // 4, [(p[0], p[2]) for p in pairs]),
                    }
            yield row


def timed(args, policy, params, batch, new):
    """A function that samples so many tokens and returns the seconds."""
    sampler = Sampler(policy, max_new_tokens=new)
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, policy.vocab_size, (batch, args.prompt))
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def run() -> float:
        key = jax.block_until_ready(next(keys))
        start = time.perf_counter()
        got = sampler.generate(params, contexts, np.ones_like(contexts), key=key)
        seconds = time.perf_counter() - start
        assert got.mask.all()
        return seconds

    return run


class Peer:
    """`bench_sampler_peer.py` in a process of its own; idle between its runs."""

    def __init__(self, args, folder: str, batch: int) -> None:
        self._process = None
        if not args.peer:
            return
        script = Path(__file__).with_name("bench_sampler_peer.py")
        sizes = [batch, args.prompt, args.new, len(os.sched_getaffinity(0))]
        self._expected = batch * args.new
        self._process = subprocess.Popen(
            [args.peer, script, folder, *map(str, sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        about = self._read()
        self.weights, self.version = about["weights"], about["version"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process:
            self._process.communicate()

    def __call__(self) -> float:
        if not self._process:
            return float("nan")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        said = self._read()
        if said["tokens"] != self._expected:
            sys.exit(f"{said['tokens']} tokens instead of {self._expected}: no ratio.")
        return said["seconds"]

    def ratios(self, weights: int, pairs: list[tuple[float, float]]) -> dict:
        """Theirs over ours: of the medians, and the lowest and highest of the pairs."""
        if weights != self.weights:
            sys.exit(f"{weights} weights against {self.weights}: no ratio.")
        ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
        single = sorted(b / a for a, b in pairs)
        return {"ratio": theirs / ours, "ratio_min": single[0], "ratio_max": single[-1]}

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the peer's process ended; its message is above.")
        return json.loads(line)


def machine() -> tuple[float, float]:
    """Bytes per second of reading memory, and FLOP/s of a large product; the best of
    several tries, since others may use the machine."""
    array = jnp.ones((64 << 20,), jnp.float32)
    total = jax.jit(lambda x: jnp.max(x.reshape(-1, 4096), axis=0))
    square = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    numpy_array = np.asarray(array)
    read = min(seconds(total, array), seconds(np.sum, numpy_array))
    return array.nbytes / read, 2 * 2048**3 / seconds(product, square)


def seconds(fn, x, tries: int = 5) -> float:
    times = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        jax.block_until_ready(fn(x))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def continuous(args, policy, params):
    """One row: refilled slots against static waves, the same tokens."""
    config = dataclasses.replace(policy.config, max_positions=1 << 20)
    policy = dataclasses.replace(policy, config=config)
    stops = range(0, policy.vocab_size, args.mean)
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, policy.vocab_size, (args.prompts, args.prompt))
    samplers = [
        Sampler(
            policy,
            max_new_tokens=args.longest,
            slots=args.slots,
            stop_tokens=stops,
            continuous=refilled,
        )
        for refilled in (True, False)
    ]

    def run(sampler):
        start = time.perf_counter()
        got = sampler.generate(
            params,
            contexts,
            np.ones_like(contexts),
            key=jax.random.key(0),
            group_size=args.group,
        )
        return time.perf_counter() - start, got

    times = []
    for _ in range(args.runs + 1):
        (refilled, ours), (static, waves) = map(run, samplers)
        if (ours.tokens != waves.tokens).any():
            sys.exit("the schedules gave different tokens: no ratio.")
        times.append((refilled, static))
    refilled, static = (statistics.median(x) for x in zip(*times[1:], strict=True))
    single = sorted(a / b for a, b in times[1:])
    lengths = ours.lengths
    yield {
        "sequences": len(lengths),
        "slots": args.slots,
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "refilled_seconds": refilled,
        "static_seconds": static,
        "ratio": refilled / static,
        "ratio_min": single[0],
        "ratio_max": single[-1],
    }


def prefix(args, policy, params):
    """One row: bytes of the arrays of the prompts' keys and values in decoding."""
    config = policy.config
    each = 2 * config.num_layers * config.num_kv_heads * args.prompt * config.head_dim
    each *= 4  # float32
    tokens = np.ones((args.prompts, args.prompt), np.int32)
    sampler = Sampler(policy, max_new_tokens=args.new, steps_per_dispatch=1)
    stream = sampler.stream(
        params, tokens, tokens, key=jax.random.key(0), group_size=args.group
    )
    next(stream)
    cached = 0
    for x in jax.live_arrays():
        if x.ndim == 4 and x.shape[1] == policy.config.num_kv_heads:
            cached += x.nbytes if args.prompt in x.shape[2:] else 0
    yield {
        "prompts": args.prompts,
        "group": args.group,
        "prompt": args.prompt,
        "bytes": cached,
        "bytes_of_one_prompt_for_each_sequence": each * args.prompts * args.group,
    }


def rounded(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
