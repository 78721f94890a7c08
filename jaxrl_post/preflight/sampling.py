"""The sampler's programs: the one place that knows how the sampler runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.generation import Sampler
from jaxrl_post.preflight.flops import ModelFlops
from jaxrl_post.preflight.programs import Program, compile_program
from jaxrl_post.preflight.shapes import Shapes, bytes_per_chip
from jaxrl_post.training.state import merge_params


def compile_sampling(shapes: Shapes) -> Iterator[Program]:
    """Preparation, prefill, first tokens and decoding of a step's rollouts.

    The cache has room for the longest responses. A program's operations are those of
    one run of it, decoding's those of one token for each slot.
    """
    config, mesh = shapes.config, shapes.mesh
    section, training = config.sampling, config.training
    sampler = Sampler(
        shapes.policy,
        max_new_tokens=section.max_new_tokens,
        slots=section.slots,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        stop_tokens=shapes.sizes.stop_token_ids,
    )
    params = merge_params(shapes.state.trainable, shapes.state.frozen)
    model = ModelFlops(shapes.sizes, params)
    with jax.set_mesh(mesh):
        waves = list(sampler._waves(training.prompts_per_step, training.group_size))
    groups, parts = waves[0]
    rows, width = len(groups), config.task.max_prompt_length
    key = jax.eval_shape(lambda: jax.random.key(0))
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    sequences = jax.ShapeDtypeStruct(parts[0].shape, jnp.int32)
    slots = sequences.size
    count = sum(len(parts) for _, parts in waves)
    state = bytes_per_chip(shapes.state)
    of_params = bytes_per_chip(params)

    def compiled(name, jitted, *arguments, beside, **options):
        return compile_program(
            name, jitted, *arguments, shapes=shapes, resident=beside, **options
        )

    program, narrow = compiled(
        "prepare", sampler._prepare, params, beside=state - of_params
    )
    yield program
    if narrow is None:
        return
    of_narrow = bytes_per_chip(narrow)
    program, contexts = compiled(
        "prefill",
        sampler._prefill,
        params,
        jax.ShapeDtypeStruct((rows, width), jnp.int32),
        jax.ShapeDtypeStruct((rows, width), bool),
        beside=state - of_params + of_narrow,
        model=model.forward(rows, width),
        times=len(waves),
    )
    yield program
    if contexts is None:
        return
    greedy: dict[str, Any] = {"greedy": False}
    program, wave = compiled(
        "start",
        sampler._start,
        narrow,
        contexts,
        key,
        sequences,
        temperature,
        beside=state,
        static=greedy,
        model=2.0 * model.head * slots,
        times=count,
    )
    yield program
    if wave is None:
        return
    program, _ = compiled(
        "decode",
        sampler._decode,
        narrow,
        contexts.prefix,
        wave,
        temperature,
        beside=state + bytes_per_chip((contexts.hidden, contexts.lengths)),
        static=greedy,
        model=model.decode(slots, width + section.max_new_tokens),
        times=count * (section.max_new_tokens - 1),
    )
    yield program


def kv_bytes(shapes: Shapes) -> int:
    """Bytes of the keys and values of one sequence at its longest, over all chips."""
    cache: chex.ArrayTree = jax.eval_shape(
        lambda: shapes.policy.init_cache(1, shapes.config.sampling.max_new_tokens)
    )
    return sum(x.size * x.dtype.itemsize for x in (cache.keys, cache.values))
