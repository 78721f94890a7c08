"""One of several processes that agree, and fail, together: see test_processes.

    python agreeing.py FOLDER PORT COUNT INDEX

Prints one JSON object of what it saw.
"""

from __future__ import annotations

import json
import os
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post.errors import InputError
from jaxrl_post.recipes import make
from jaxrl_post.sharding import make_mesh, processes
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.fingerprints import SHA256, SUMS, checksums, kind_for
from jaxrl_post.training.state import init_state


def main(folder: str, port: str, count: int, index: int) -> dict:
    processes.start(
        f"127.0.0.1:{port}", count, index, start_timeout=60, heartbeat_timeout=10
    )
    seen: dict = {"main": processes.is_main()}
    seen["gather"] = processes.gather(lambda: index * 10)
    # More than fits the first exchange, and not the same everywhere.
    long = processes.gather(lambda: "x" * (5000 * index))
    seen["long"] = [len(text) for text in long]
    seen["on_main"] = processes.on_main(lambda: f"of {index}")
    seen["in_shares"] = processes.in_shares(5, lambda rows: list("abcde")[rows])
    seen["few"] = processes.in_shares(1, lambda rows: list("a")[rows])
    seen["together"] = processes.together(lambda: object) is object

    def fails(error):
        if index == 1:
            raise error
        return index

    seen["bad input"] = raised(lambda: processes.gather(lambda: fails(InputError("?"))))
    seen["bug"] = raised(lambda: processes.gather(lambda: fails(KeyError("k"))))
    # The inner call fails in both, so the outer one must not wait for either.
    seen["nested"] = raised(
        lambda: processes.together(
            lambda: processes.gather(lambda: fails(InputError("inside")))
        )
    )
    # One fails before the inner call that the other makes.

    def begins():
        fails(InputError("before"))
        return processes.gather(lambda: 1)

    seen["crossed"] = raised(lambda: processes.together(begins))
    seen["after"] = processes.gather(lambda: index)

    mesh = make_mesh(data=1, fsdp=count)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    spread = {"a": processes.place(whole, sharding)}
    seen["kinds"] = [kind_for(spread), kind_for({"a": whole})]
    seen["fetched"] = processes.fetch(spread["a"]).tolist() == whole.tolist()
    for kind in (SUMS, SHA256):
        seen[kind] = checksums(spread, kind)["a"]

    def state(step, spec):
        layout = jax.sharding.NamedSharding(mesh, spec)
        params = {"w": processes.place(large, layout)}
        key = jax.random.key(0)
        begun = init_state(params, optax.sgd(1.0), make("grpo"), key, mesh=mesh)
        now = processes.replicate(jnp.asarray(step, jnp.int32), mesh)
        return begun.replace(step=now)

    large = np.random.default_rng(0).random((64, 64), np.float32)
    rows = jax.sharding.PartitionSpec("fsdp")
    columns = jax.sharding.PartitionSpec(None, "fsdp")
    checkpoints = Checkpoints(folder)
    checkpoints.save(state(1, rows))
    checkpoints.wait()
    restored = checkpoints.restore(state(0, columns)).trainable["w"]
    seen["restored"] = [
        restored.sharding.spec == columns,
        (processes.fetch(restored) == large).all().item(),
    ]
    if index == 1:  # its disk is full: no file of more than 3000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    checkpoints.save(state(2, rows))
    kind, text = raised(checkpoints.wait)
    seen["full"] = [kind, "File too large" in text]
    return seen


def raised(do) -> list[str]:
    try:
        do()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3], *map(int, sys.argv[3:]))), flush=True)
    jax.distributed.shutdown()
    os._exit(0)  # Orbax's threads wait for the one that failed
