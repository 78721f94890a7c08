"""Memory and time of attention, value and gradient, by every program that runs here.

    python scripts/bench_attention.py
    python scripts/bench_attention.py --heads 16 --kv-heads 8 --head-dim 128 \
        --dtype bfloat16 --lengths 4096 16384 --log attention.jsonl
    JAX_PLATFORMS=cpu python scripts/bench_attention.py --topology v5e:2x4 --tensor 2 \
        --heads 16 --kv-heads 8 --head-dim 128 --dtype bfloat16

One layer's attention without its projections, causal. Memory is XLA's own account of
the compiled program, per device. The programs run in turns, and ratios are those of
medians. With `--topology` they are compiled for devices that are not here (TPU: needs
libtpu; GPU: `--topology 1x1x8 --target-config FILE`, needs jax's CUDA plugin), and not
run.
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post.errors import InputError
from jaxrl_post.models.attention import (
    IMPLEMENTATIONS,
    LayerCache,
    Visibility,
    attend,
    choose,
)
from jaxrl_post.sharding import batch_shards, make_mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"batch": 1, "heads": 9, "kv_heads": 3, "head_dim": 64, "runs": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    lengths = [256, 512, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--topology", help="of TPU, or slices x hosts x GPUs")
    parser.add_argument("--target-config", type=Path, help="XLA's, of the GPU")
    parser.add_argument("--tensor", type=int, default=1, help="devices per head group")
    parser.add_argument("--most-gib", type=float, default=4.0, help="leave out larger")
    parser.add_argument("--log", type=Path, help="appends a row for each measurement")
    args = parser.parse_args()
    mesh = open_mesh(args)
    about = {name: getattr(args, name) for name in sizes} | {
        "dtype": args.dtype,
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }
    for length in args.lengths:
        with jax.set_mesh(mesh):
            rows = measure(args, mesh, length)
        for row in rows:
            line = f"T={length:6d}  {row['attention']:8s} {row['temp_mib']:9.1f} MiB"
            if row["seconds"]:
                line += f"  {row['seconds']:8.4f} s"
            if row["ratio"]:
                line += f"  {row['ratio']:5.2f} x the time of plain"
            print(line, flush=True)
            if args.log is not None:
                with args.log.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")


def open_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    """Of the devices that are here, or of those named."""
    if args.topology is None:
        return make_mesh(1, -1, args.tensor)
    about: dict[str, Any] = {"platform": "tpu", "topology_name": args.topology}
    if args.target_config is not None:
        about = {"platform": "cuda", "topology_name": "gpu", "topology": args.topology}
        about["target_config"] = args.target_config.read_text()
    topology = topologies.get_topology_desc(**about)
    return make_mesh(1, -1, args.tensor, topology.devices)


def measure(
    args: argparse.Namespace, mesh: jax.sharding.Mesh, tokens: int
) -> list[dict[str, Any]]:
    """One row for each program that takes these shapes on these devices."""
    dtype, batch = jnp.dtype(args.dtype), args.batch * batch_shards(mesh)
    programs, rows = {}, {}
    own = (batch, args.kv_heads, tokens, args.head_dim)
    shapes = [(batch, tokens, args.heads, args.head_dim), own, own]
    splits = [P("fsdp", None, "tensor"), P("fsdp", "tensor"), P("fsdp", "tensor")]
    arrays: list[Any] = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))
        for shape, split in zip(shapes, splits, strict=True)
    ]
    if args.topology is None:
        rng = np.random.default_rng(0)
        arrays = [
            jax.device_put(rng.normal(size=x.shape).astype(dtype), x.sharding)
            for x in arrays
        ]
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
        if args.topology is None and temp <= args.most_gib * 2**30:
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


def compile_program(how: str, arrays: list[Any]) -> Any:
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
