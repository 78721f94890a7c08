"""What to change where a config does not fit, cheapest first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jaxrl_post.preflight.shapes import Shapes
from jaxrl_post.sharding import batch_shards
from jaxrl_post.training.accumulation import smallest_part
from jaxrl_post.training.setup import micro_batch_bound, slots_bound

TRAINING = frozenset({"update", "score"})


def remedies(shapes: Shapes, failing: frozenset[str]) -> Iterator[dict[str, object]]:
    """Overrides of a config that may make the failing programs fit, in this order:
    micro-batches, slots, what the backward pass keeps, the mesh's split, offloading.

    Args:
      shapes: of the config as it is.
      failing: names of programs that do not fit.

    Yields:
      Values by key; each is to be put on top of those before.
    """
    config, mesh = shapes.config, shapes.mesh
    trains, samples = failing & TRAINING, failing - TRAINING
    if trains:
        least = smallest_part(shapes.batch, mesh)
        bound = micro_batch_bound(config.training, mesh)
        if bound is None or bound > least:
            yield {"training.micro_batch_tokens": least}
    if samples:
        shards = batch_shards(mesh)
        slots = slots_bound(config.sampling, mesh)
        whole = config.training.prompts_per_step * config.training.group_size
        slots = min(slots or whole, whole)
        for part in (slots // 2, slots // 4):
            if part and part % shards == 0:
                yield {"sampling.slots": part}
    if trains:
        order = ["none", "products", "attention_saveable", "full"]
        now = config.model.remat
        later = order[order.index(now) + 1 :] if now in order else ["full"]
        for policy in later:
            yield {"model.remat": policy}
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for factor in (2, 4):
        if shapes.sizes.num_kv_heads % (tensor * factor) == 0 == fsdp % factor:
            yield {"mesh.tensor": tensor * factor, "mesh.fsdp": fsdp // factor}
    offloaded: list[str] = [*config.training.offload]
    for name in ("optimizer", "teacher", "reference"):
        if name not in offloaded and name in shapes.resident:
            offloaded = [*offloaded, name]
            yield {"training.offload": offloaded}


def first_micro_batch(shapes: Shapes) -> dict[str, int]:
    """The least bounds on micro-batches, in place of the config's that are below."""
    training, shards = shapes.config.training, batch_shards(shapes.mesh)
    least = smallest_part(shapes.batch, shapes.mesh)
    bounds = {
        "micro_batch_tokens": least,
        "micro_batch_tokens_per_shard": math.ceil(least / shards),
    }
    set_to = {name: getattr(training, name) for name in bounds}
    return {
        f"training.{name}": least
        for name, least in bounds.items()
        if set_to[name] is not None and set_to[name] < least
    }


def splits(devices: int) -> Iterator[dict[str, object]]:
    """Meshes for a config that cannot be laid out as it is, the least split first.

    A step's groups may be too few for all devices: those of `tensor` share them.
    """
    for tensor in (2, 4, 8):
        if devices % tensor == 0:
            fsdp = devices // tensor
            yield {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
