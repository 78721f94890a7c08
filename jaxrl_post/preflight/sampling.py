"""The sampler's programs: the one place that knows how the sampler runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.generation import Sampler
from jaxrl_post.generation.plan import capacity_for
from jaxrl_post.generation.slots import Queue
from jaxrl_post.preflight.programs import Program, compile_program
from jaxrl_post.preflight.shapes import Shapes, bytes_per_chip
from jaxrl_post.training.flops import ModelFlops
from jaxrl_post.training.setup import slots_bound
from jaxrl_post.training.state import merge_params


def compile_sampling(shapes: Shapes) -> Iterator[Program]:
    """Preparation, prefill, first tokens and decoding of a step's rollouts.

    The cache has room for the longest responses; where it gets that room by growing,
    that is a program too. A program's operations are those of one run of it,
    decoding's those of one token for each slot.
    """
    config, mesh = shapes.config, shapes.mesh
    section, training = config.sampling, config.training
    sampler = Sampler(
        shapes.policy,
        max_new_tokens=section.max_new_tokens,
        slots=slots_bound(section, mesh),
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        stop_tokens=shapes.sizes.stop_token_ids,
    )
    params = merge_params(shapes.state.trainable, shapes.state.frozen)
    model = ModelFlops(shapes.sizes, params)
    programs, width = sampler.programs, config.task.max_prompt_length
    with jax.set_mesh(mesh):
        plan = sampler.plan(training.prompts_per_step, width, training.group_size)
        waves = list(plan.waves())
    if plan.refilled is None:
        rows, slots = len(waves[0][0]), waves[0][1][0].size
        count = starts = sum(len(parts) for _, parts in waves)
        many, columns = plan.chunks(rows, rows)
    else:
        rows, slots = plan.resident(), plan.refilled
        count, starts = -(-plan.prompts * plan.group_size // slots), 1
        many, columns = plan.chunks(rows, plan.prompts)
    padded = width + -width % columns
    key = jax.eval_shape(lambda: jax.random.key(0))
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    of_slots = jax.ShapeDtypeStruct((slots,), jnp.int32)
    of_rows: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    choice: dict[str, Any] = {"greedy": False, "grouped": plan.refilled is None}
    state = bytes_per_chip(shapes.state)
    of_params = bytes_per_chip(params)

    def compiled(name, jitted, *arguments, beside, **options):
        return compile_program(
            name, jitted, *arguments, shapes=shapes, resident=beside, **options
        )

    program, narrow = compiled(
        "prepare", programs.prepare, params, beside=state - of_params
    )
    yield program
    if narrow is None:
        return
    of_narrow = bytes_per_chip(narrow)
    tokens = [jax.ShapeDtypeStruct((many, padded), kind) for kind in (jnp.int32, bool)]
    last = capacity_for(section.max_new_tokens, section.max_new_tokens)
    under_way = 0
    if rows != many:  # then there is one chip, and others are decoded meanwhile
        of_slot = jax.eval_shape(lambda: shapes.policy.init_cache(1, last))
        of_row = jax.eval_shape(lambda: shapes.policy.init_cache(1, padded))
        under_way = slots * _whole_bytes(of_slot) + rows * _whole_bytes(of_row)
    program, contexts = compiled(
        "prefill",
        programs.prefill,
        params,
        *tokens,
        static={"columns": columns},
        beside=state - of_params + of_narrow + under_way,
        model=model.forward(many, width),
        times=-(-plan.prompts // many),
    )
    yield program
    if contexts is None:
        return
    if rows != many:  # a prefill at a time becomes part of what is held
        contexts = jax.tree.map(lambda x: _placed((rows, *x.shape[1:]), x), contexts)
    begin = (narrow, contexts, of_slots, of_slots, number, key, temperature)
    program, begun = compiled(
        "start",
        programs.start,
        *begin,
        beside=state,
        static={**choice, "capacity": last},
        model=2.0 * model.head * slots,
        times=starts,
    )
    yield program
    if begun is None:
        return
    whole = begun[0]
    if (before := capacity_for(-(-last // 2), section.max_new_tokens)) < last:
        with jax.set_mesh(mesh):
            smaller = programs.start.trace(*begin, **choice, capacity=before)
        smaller = jax.tree.map(
            lambda x, y: _placed(x.shape, y), smaller.out_info[0], whole
        )
        program, _ = compiled(
            "resize",
            programs.resize,
            smaller,
            last,
            beside=state + of_narrow + bytes_per_chip(contexts),
            times=starts,
        )
        yield program
    program, _ = compiled(
        "decode",
        programs.decode,
        narrow,
        contexts,
        whole,
        Queue(of_rows, number, number),
        key,
        temperature,
        beside=state,
        static=choice,
        model=model.decode(slots, width + section.max_new_tokens),
        times=count * (section.max_new_tokens - 1),
    )
    yield program


def _placed(shape: tuple[int, ...], like: Any) -> jax.ShapeDtypeStruct:
    """Of another shape, of the same dtype and placed in the same way."""
    return jax.ShapeDtypeStruct(shape, like.dtype, sharding=like.sharding)


def _whole_bytes(tree: chex.ArrayTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
