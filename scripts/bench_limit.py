"""How far from what the machine can do: achieved over attainable, phase by phase.

    python scripts/bench_limit.py                      # every setting, measured here
    python scripts/bench_limit.py --only smollm2-update --repeats 3
    python scripts/bench_limit.py --peaks              # bounds on TPUs and GPUs

The machine's rate of matrix products and its bandwidth are measured in the same process
as the phases. What the algorithm must spend is counted from shapes: the products, and
the bytes of weights, keys and values that have to be read or written at least once, a
group's prompt once for all. A phase cannot take less than the longer of operations over
rate and bytes over bandwidth; its share is that bound over its time. Rows go to
docs/evidence/performance.jsonl as they come.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_work
from bench_work import RESULTS, about_run, append

from jaxrl_post.cli.memory import keep_freed_memory


class Shape(NamedTuple):
    """A rollout batch: P prompts of S tokens, G responses to each of T tokens."""

    prompts: int
    group: int
    length: int
    new: int


class Setting(NamedTuple):
    """A model, a batch, the phases to measure, and their least shares."""

    model: str
    shape: Shape
    phases: tuple[str, ...]
    must: dict[str, float] = {}


PHASES = ("prefill", "decode", "forward", "update", "step")
SETTINGS = {
    "qwen2": Setting("qwen2-5m", Shape(4, 8, 32, 64), PHASES),
    "smollm2": Setting(
        "smollm2-135m", Shape(8, 1, 32, 32), ("prefill", "decode"), {"decode": 0.5}
    ),
    "smollm2-update": Setting(
        "smollm2-135m", Shape(2, 1, 8, 248), ("forward", "update"), {"update": 0.6}
    ),
}


class Peak(NamedTuple):
    """A chip as its maker describes it: bf16 operations and bytes per second."""

    flops: float
    bandwidth: float
    source: str


PEAKS = {
    "TPU v5e": Peak(197e12, 800e9, "docs.cloud.google.com/tpu/docs/v6e"),
    "TPU v5p": Peak(459e12, 2765e9, "docs.cloud.google.com/tpu/docs/v5p"),
    "TPU v6e": Peak(918e12, 1600e9, "docs.cloud.google.com/tpu/docs/v6e"),
    "H100 SXM": Peak(989e12, 3350e9, "H100 datasheet, SXM, without sparsity"),
}


class Cost(NamedTuple):
    """Operations and bytes that a phase cannot do without."""

    flops: float
    bytes: float

    def seconds(self, rate: float, bandwidth: float) -> float:
        return max(self.flops / rate, self.bytes / bandwidth)


def weights(model: dict[str, Any]) -> tuple[int, int]:
    """Numbers in the matrices of the layers, and in the unembedding.

    >>> sum(weights(bench_work.MODELS["qwen2-5m"]))
    5242880
    """
    width, head = model["hidden_size"], model["head_dim"]
    heads = 2 * model["num_heads"] + 2 * model["num_kv_heads"]
    layer = width * head * heads + 3 * width * model["intermediate_size"]
    return model["num_layers"] * layer, model["vocab_size"] * width


def costs(
    model: dict[str, Any],
    shape: Shape,
    itemsize: int = 4,
    optimizer_bytes: int = 7 * 4,
) -> dict[str, list[Cost]]:
    """What each phase must spend: parts that follow one another.

    Args:
      model: arguments of `DecoderConfig`.
      shape: of the batch.
      itemsize: bytes of a weight or an activation where it is multiplied.
      optimizer_bytes: per parameter. AdamW in float32 reads gradient, weight and two
        moments and writes the last three.
    """
    layers, unembedding = weights(model)
    prompts, group, length, new = shape
    rows, parameters = prompts * group, layers + unembedding
    # A query against a key, and the value it weighs, over all layers.
    pair = 4 * model["num_layers"] * model["num_heads"] * model["head_dim"]
    entry = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]

    prefill = Cost(
        2 * prompts * (length * layers + unembedding)
        + pair * prompts * length * (length + 1) / 2,
        itemsize * (parameters + entry * prompts * length),
    )
    decode = []
    for own in range(1, new):  # tokens before this one, which the prompt predicted
        seen = itemsize * entry * (prompts * length + rows * own)
        products = 2 * rows * parameters + pair * rows * (length + own)
        decode.append(Cost(products, itemsize * parameters + seen))
    of_prompts = length * prompts * (2 * layers + pair * (length + 1) / 2)
    of_responses = new * rows * (2 * parameters + pair * (length + (new + 1) / 2))
    forward = Cost(of_prompts + of_responses, itemsize * parameters)
    # Backward each product becomes two, and the weights are read again.
    both = Cost(3 * forward.flops, 3 * forward.bytes)
    update = [both, Cost(0, optimizer_bytes * parameters)]
    return {
        "prefill": [prefill],
        "decode": decode,
        "forward": [forward],
        "update": update,
        "step": [prefill, *decode, *update],
    }


def bound(parts: Sequence[Cost], rate: float, bandwidth: float) -> float:
    """Seconds that no implementation can do without."""
    return sum(part.seconds(rate, bandwidth) for part in parts)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    import jax

    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def best_seconds(run: Callable[[], Any], repeats: int = 8) -> float:
    """What the machine can do is what it has done once."""
    return min(median_seconds(run, 1) for _ in range(repeats))


def machine() -> tuple[float, float]:
    """Operations per second of float32 products, and bytes read per second."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    rates = []
    for size in (512, 1024, 2048):
        a = jnp.ones((size, size))
        rates.append(2 * size**3 / best_seconds(lambda a=a: product(a, a)))
    # A matrix times a vector reads as decoding does; a sum reads as little else can.
    wide, narrow = jnp.ones((8192, 8192)), jnp.ones((8192,))
    times = [
        best_seconds(lambda: product(wide, narrow)),
        best_seconds(lambda: jax.jit(jnp.sum)(wide)),
    ]
    return max(rates), wide.nbytes / min(times)


def measure(setting: Setting, repeats: int) -> dict[str, float]:
    """Seconds of the phases."""
    import jax
    import numpy as np
    import optax

    from jaxrl_post import recipes
    from jaxrl_post.generation import Sampler
    from jaxrl_post.recipes.batch import Batch
    from jaxrl_post.training import init_state, make_score_step, make_update_step

    policy, params = bench_work.open_model(setting.model)
    prompts, group, length, new = setting.shape
    rows = prompts * group
    rng = np.random.default_rng(0)

    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(0, policy.vocab_size, shape, dtype=np.int32)

    contexts, mask = tokens(prompts, length), np.ones((rows, new), bool)
    batch = Batch(
        contexts=contexts,
        context_mask=np.ones_like(contexts, bool),
        responses=tokens(rows, new),
        token_mask=mask,
        loss_mask=mask,
        sequence_mask=mask[:, 0],
        advantages=rng.normal(size=rows).astype(np.float32),
    )
    found = {}

    def generate(count: int) -> float:
        sampler = Sampler(policy, max_new_tokens=count)
        key, seen = jax.random.key(0), np.ones_like(contexts)
        return median_seconds(
            lambda: sampler.generate(params, contexts, seen, key=key, group_size=group),
            repeats,
        )

    if "prefill" in setting.phases:
        found["prefill"] = generate(1)
        found["decode"] = generate(new) - found["prefill"]
    if "forward" in setting.phases:
        score = make_score_step(policy)
        found["forward"] = median_seconds(lambda: score(params, batch), repeats)
    if "update" in setting.phases:
        recipe, optimizer = recipes.grpo(), optax.adamw(1e-4)
        update = make_update_step(policy, recipe, optimizer)
        state = init_state(params, optimizer, recipe, jax.random.key(0))

        def run():
            nonlocal state
            state, metrics = update(state, batch)
            return state, metrics

        found["update"] = median_seconds(run, repeats)
    if "step" in setting.phases:
        parts = ("prefill", "decode", "update")
        found["step"] = sum(found[part] for part in parts)
    return found


def shares(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Every phase of a setting beside its bound on this machine."""
    setting = SETTINGS[name]
    before = machine()
    seconds = measure(setting, repeats)
    # The faster of two looks: what else the machine does only slows it down.
    rate, bandwidth = map(max, before, machine())
    for phase in setting.phases:
        parts = costs(bench_work.MODELS[setting.model], setting.shape)[phase]
        least = bound(parts, rate, bandwidth)
        flops = sum(part.flops for part in parts)
        yield {
            "row": name,
            "phase": phase,
            "model": setting.model,
            "shape": setting.shape._asdict(),
            "gflops": round(flops / 1e9, 3),
            "gbytes": round(sum(part.bytes for part in parts) / 1e9, 4),
            "seconds": round(seconds[phase], 5),
            "bound": round(least, 5),
            "share": round(least / seconds[phase], 3),
            "must": setting.must.get(phase),
            "gflops_per_second": round(flops / seconds[phase] / 1e9, 1),
            "machine_gflops_per_second": round(rate / 1e9, 1),
            "machine_gbytes_per_second": round(bandwidth / 1e9, 1),
        }


def peak_rows(model: str, shape: Shape, chips: int) -> Iterator[dict[str, Any]]:
    """Bounds on accelerators, from their makers' figures, the work shared evenly."""
    parts = costs(bench_work.MODELS[model], shape, itemsize=2)
    for name, peak in PEAKS.items():
        rate, bandwidth = chips * peak.flops, chips * peak.bandwidth
        yield {
            "row": "peaks",
            "chip": name,
            "chips": chips,
            "model": model,
            "shape": shape._asdict(),
            "bound": {
                phase: round(bound(parts[phase], rate, bandwidth), 5)
                for phase in PHASES
            },
            "source": peak.source,
        }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=5, help="after the first one")
    parser.add_argument(
        "--peaks", action="store_true", help="bounds from makers' figures alone"
    )
    parser.add_argument("--model", choices=bench_work.MODELS, default="qwen3-8b")
    parser.add_argument("--chips", type=int, default=64)
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(32, 8, 1024, 8192), metavar=tuple("PGST")
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if min(arguments.repeats, arguments.chips, *arguments.shape) < 1:
        parser.error("--repeats, --chips and --shape must be at least 1.")
    return arguments


def main() -> None:
    arguments = parse()
    keep_freed_memory()  # as `jaxrl-post train` does
    command = shlex.join(["python", "scripts/bench_limit.py", *sys.argv[1:]])
    cores = sorted(os.sched_getaffinity(0))

    def keep(row: dict[str, Any]) -> None:
        about = {} if "chip" in row else about_run(cores)
        append(arguments.out, {"bench": "limit", **row, **about, "command": command})

    if arguments.peaks:
        shape = Shape(*arguments.shape)
        for row in peak_rows(arguments.model, shape, arguments.chips):
            keep(row)
            print(f"{row['chip']:9s} " + str(row["bound"]))
        return
    for name in arguments.only:
        for row in shares(name, arguments.repeats):
            keep(row)
            print(
                f"{name:15s} {row['phase']:8s} {row['seconds']:9.4f} s, at least "
                f"{row['bound']:9.4f} s: {row['share']:.0%}  "
                f"({row['gflops_per_second']} of {row['machine_gflops_per_second']} "
                "GFLOP/s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
