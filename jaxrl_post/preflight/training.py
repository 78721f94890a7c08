"""The programs of an update: scoring a batch, and the update itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxrl_post.preflight.programs import Program, compile_program
from jaxrl_post.preflight.shapes import Shapes, bytes_per_chip
from jaxrl_post.training.flops import Lengths, ModelFlops
from jaxrl_post.training.setup import micro_batch_bound
from jaxrl_post.training.state import merge_params
from jaxrl_post.training.update import make_score_step, make_update_step


def compile_training(shapes: Shapes) -> Iterator[Program]:
    """The update, and the scoring before it where a step has several updates.

    The teacher's scoring is a part of the update.

    Raises:
      InputError: the batch cannot be cut as the config says.
    """
    if not shapes.recipe.learns:
        return
    config, batch = shapes.config, shapes.batch
    training = config.training
    state = shapes.state.replace(gate=None)  # the host's
    options: dict[str, Any] = {
        "mesh": shapes.mesh,
        "micro_batch_tokens": micro_batch_bound(training, shapes.mesh),
        "chunk_size": training.chunk_size,
        "temperature": config.sampling.temperature,
    }
    update = make_update_step(
        shapes.policy,
        shapes.recipe,
        shapes.optimizer,
        spike_deviations=training.spike_deviations,
        router_aux_loss_coef=config.model.router_aux_loss_coef,
        **options,
    )
    model = ModelFlops(shapes.sizes, state.trainable, state.frozen)
    seen = Lengths.full(batch.contexts.shape, batch.responses.shape)
    of_teacher = None
    if batch.teacher_contexts is not None:
        of_teacher = Lengths.full(batch.teacher_contexts.shape, batch.responses.shape)
    times = training.updates_per_step
    program, _ = compile_program(
        "update",
        _jitted(update),
        state,
        batch,
        shapes=shapes,
        resident=0,
        model=model.update(shapes.recipe, seen, of_teacher),
        times=times,
    )
    yield program
    if times == 1:
        return
    params = merge_params(state.trainable, state.frozen)
    batch = batch.replace(old_logps=None)
    program, _ = compile_program(
        "score",
        _jitted(make_score_step(shapes.policy, **options)),
        params,
        batch,
        shapes=shapes,
        resident=bytes_per_chip(state) - bytes_per_chip(params),
        model=model.view(seen),
        times=times,
    )
    yield program


def _jitted(program: Any) -> Any:
    """What is jitted inside a program that sets its mesh and spreads its batch."""
    return program if hasattr(program, "trace") else program.__wrapped__
