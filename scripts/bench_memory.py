"""What each remedy saves of a device's memory, in the compiled update of SDPO.

    JAX_PLATFORMS=cpu python scripts/bench_memory.py --topology v5p:2x2x2 \
        --log memory.jsonl

Each row adds one remedy to those before it. The update is compiled for the devices that
are named and not run; bytes are XLA's own account, per device. The model is Llama's
layout with 16 layers of width 2048 (0.9 billion parameters, float32, AdamW), computing
in bfloat16; a device has two responses to a prompt, and a teacher's context for each.
For GPUs: `--topology 1x1x8 --target-config FILE`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from bench_attention import open_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_post import models, recipes
from jaxrl_post.recipes import Batch
from jaxrl_post.sharding import batch_sharding, batch_shards, param_shardings
from jaxrl_post.training import init_state, make_update_step

LADDER: dict[str, dict[str, Any]] = {
    "as it is, all scores at once": {"attention": "plain"},
    "model.attention=auto": {"attention": "auto"},
    "model.remat=attention_saveable": {"remat": "attention_saveable"},
    "model.remat=full": {"remat": "full"},
    "micro_batch_tokens: one sequence": {"micro": True},
    "training.offload=[optimizer]": {"offload": ("opt_state",)},
    "training.offload=[optimizer, teacher]": {"offload": ("opt_state", "teacher")},
}
CONFIG = models.DecoderConfig(
    vocab_size=32_768,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=16,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
)
RECIPE, OPTIMIZER = recipes.sdpo(), optax.adamw(1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="of TPU, or slices x hosts x GPUs")
    parser.add_argument("--target-config", type=Path, help="XLA's, of the GPU")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=1536)
    parser.add_argument("--rungs", type=int, nargs="+", default=range(len(LADDER)))
    parser.add_argument("--log", type=Path, help="appends a row for each rung")
    args = parser.parse_args()
    mesh = open_mesh(args)
    settings: dict[str, Any] = {"remat": "none", "micro": False, "offload": ()}
    for number, (name, change) in enumerate(LADDER.items()):
        settings |= change
        if number not in args.rungs:
            continue
        row = {
            "remedy": name,
            "device": mesh.devices.flat[0].device_kind,
            "mesh": dict(mesh.shape),
            "tokens": [args.prompt, args.response],
            **measure(mesh, args.prompt, args.response, **settings),
            "jax": jax.__version__,
        }
        print(
            f"{name:40s} state {row['argument_gib']:6.2f} GiB, temp "
            f"{row['temp_gib']:6.2f} GiB, on the host {row['host_gib']:6.2f} GiB",
            flush=True,
        )
        if args.log is not None:
            with args.log.open("a") as file:
                file.write(json.dumps(row) + "\n")


def measure(mesh, prompt, response, *, attention, remat, micro, offload):
    """GiB per device of the compiled update: arguments, temporary, on the host."""
    policy = models.decoder(
        CONFIG, compute_dtype=jnp.bfloat16, remat=remat, attention=attention
    )
    bound = 2 * batch_shards(mesh) * (prompt + response) if micro else None
    update = make_update_step(
        policy, RECIPE, OPTIMIZER, mesh=mesh, micro_batch_tokens=bound
    )
    state = abstract_state(policy, mesh, offload)
    batch = abstract_batch(mesh, prompt, response)
    with jax.set_mesh(mesh):
        program = update.__wrapped__.lower(state, batch).compile()
    stats = program.memory_analysis()
    gib = 2.0**30
    return {
        "argument_gib": round(stats.argument_size_in_bytes / gib, 3),
        "temp_gib": round(stats.temp_size_in_bytes / gib, 3),
        "host_gib": round(stats.host_argument_size_in_bytes / gib, 3),
    }


def abstract_state(policy, mesh, offload):
    """Shapes, shardings and memory kinds of a state."""

    def begin(key):
        return init_state(policy.init(key), OPTIMIZER, RECIPE, key)

    state = jax.eval_shape(begin, jax.random.key(0))
    shardings = param_shardings(state.trainable, policy.logical_axes, mesh)
    by_shape = dict(
        zip(
            (x.shape for x in jax.tree.leaves(state.trainable)),
            jax.tree.leaves(shardings),
            strict=True,
        )
    )

    def place(path, x):
        sharding = by_shape.get(x.shape, NamedSharding(mesh, P()))
        if x.ndim and path[0].name in offload:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def abstract_batch(mesh, prompt, response):
    """A prompt and two responses for each device of the batch axes."""
    groups, rows = batch_shards(mesh), batch_sharding(mesh)
    count = 2 * groups

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    return Batch(
        contexts=array(jnp.int32, groups, prompt),
        context_mask=array(bool, groups, prompt),
        responses=array(jnp.int32, count, response),
        token_mask=array(bool, count, response),
        loss_mask=array(bool, count, response),
        sequence_mask=array(bool, count),
        advantages=array(jnp.float32, count),
        sampler_logps=array(jnp.float32, count, response),
        teacher_contexts=array(jnp.int32, count, prompt),
        teacher_context_mask=array(bool, count, prompt),
        teacher_index=array(jnp.int32, count),
        extras={
            "distilled": array(bool, count),
            "distillation_weight": array(jnp.float32, count),
        },
    )


if __name__ == "__main__":
    main()
