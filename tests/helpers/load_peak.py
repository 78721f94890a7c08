"""Loads a model spread over devices and prints what memory that took.

    load_peak.py MODEL SIZES [PROCESS PROCESSES ADDRESS]

One JSON object of bytes: what this process had before (``base``) and at most
(``peak``), its devices' parts (``held``) and the largest leaf (``leaf``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))


def main(model: str, sizes: str, *processes: str) -> None:
    if processes:
        rank, count, address = processes
        jax.config.update("jax_num_cpu_devices", 1)
        jax.distributed.initialize(address, int(count), int(rank))
    else:
        jax.config.update("jax_num_cpu_devices", 8)

    # After the devices are set.
    from jaxrl_post import models
    from jaxrl_post.sharding import make_mesh

    mesh = make_mesh(*json.loads(sizes))
    models.load("science_base", mesh)  # what is imported and started once
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    _, params, _ = models.load(model, mesh)
    peak = memory("VmHWM")
    leaves = jax.tree.leaves(params)
    parts = [shard.data for x in leaves for shard in x.addressable_shards]
    print(
        json.dumps(
            {
                "base": base,
                "peak": peak,
                "held": sum(part.nbytes for part in parts),
                "leaf": max(x.nbytes for x in leaves),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
