"""Memory and time of loading a checkpoint of an 8 B model's shape.

    python scripts/bench_load.py --layers 4 --out docs/evidence/load.jsonl

Writes random bfloat16 weights of Qwen3-8B's layout with that many of its 36 layers, in
files of about 1 GB, and loads them in a process of its own, spread over 8 CPU devices
and on a single one. Bytes: ``held`` by the devices, ``largest`` leaf, ``above``: the
peak of resident memory less what the process had before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
}
SHARD = 2**30


def write(folder: Path, layers: int) -> int:
    """The checkpoint; its bytes."""
    from safetensors.numpy import save_file

    from jaxrl_post.models.families import config_from_hf
    from jaxrl_post.models.tensors import tensor_rules

    values = {**QWEN3_8B, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(0)
    files: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush():
        name = f"part-{len({*files.values()})}.safetensors"
        save_file(shard, folder / name)
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for rule in tensor_rules(config_from_hf(values)):
        for name in rule.names(layers).values():
            noise = rng.integers(0, 2**14, rule.file_shape, np.uint16)
            shard[name] = noise.view(ml_dtypes.bfloat16)
            total += noise.nbytes
            if sum(x.nbytes for x in shard.values()) > SHARD:
                flush()
    flush()
    index = {"weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure(folder: str, devices: int) -> None:
    """Prints one JSON object; run in a process of its own."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from jaxrl_post import models
    from jaxrl_post.sharding import make_mesh

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))

    mesh = make_mesh(1, devices // 2, 2) if devices > 1 else None
    models.load("science_base", mesh)  # what is imported and started once
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start = time.perf_counter()
    _, params, _ = models.load(folder, mesh, dtype=jax.numpy.bfloat16)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(params)
    held = sum(s.data.nbytes for x in leaves for s in x.addressable_shards)
    row = {
        "devices": devices,
        "held": held,
        "largest": max(x.nbytes for x in leaves),
        "above": memory("VmHWM") - before,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], int(args.measure[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), args.layers)
        for devices in (8, 1):
            out = subprocess.run(
                [sys.executable, __file__, "--measure", folder, str(devices)],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            row = json.loads(out.stdout.splitlines()[-1])
            files = {"model": "Qwen3-8B", "layers": args.layers, "bytes": size}
            row = {"command": " ".join(["python", *sys.argv]), **files, **row}
            row["within"] = row["above"] <= row["held"] + row["largest"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
