"""What runs of one process share: tasks, weights and compiled programs.

A short run spends most of its time on what it has in common with the run before: making
questions, tracing and compiling. `kept` lets it have them from there. The learning rate
and PGPO's numbers are arguments of the kept programs, so that runs may differ in them
and in the seed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from jaxrl_post.recipes.recipe import Information
from jaxrl_post.training import (
    evaluation,
    loop,
    optimizer,
    setup,
    stages,
    trainer,
    update,
)
from jaxrl_post.transforms import scale_by_information

_KEPT: dict[Hashable, Any] = {}


def _once(key: Hashable, make: Callable[[], Any]) -> Any:
    if key not in _KEPT:
        _KEPT[key] = make()
    return _KEPT[key]


@contextlib.contextmanager
def kept(*method: Hashable) -> Iterator[None]:
    """Within it `loop.run` shares all that can be with earlier runs of this process.

    Args:
      *method: runs with equal ones have equal configs, but for the run's seed and
        folder, the learning rate, sensitivity and bounds of the multiplier, and what a
        recipe keeps in the optimizer's state.
    """
    number = itertools.count()  # of an update step in a run: stages have their own

    def make_update_step(*arguments: Any, **options: Any) -> Any:
        key = ("update", *method, next(number))
        return _once(key, lambda: update.make_update_step(*arguments, **options))

    with (
        mock.patch.object(loop, "open_model", _open_model),
        mock.patch.object(loop, "open_task", _open_task),
        mock.patch.object(evaluation, "open_task", _open_task),
        mock.patch.object(trainer, "open_sampler", _open_sampler),
        mock.patch.object(evaluation, "open_sampler", _open_sampler),
        mock.patch.object(stages, "make_optimizer", _make_optimizer),
        mock.patch.object(trainer, "make_update_step", make_update_step),
    ):
        yield


def _open_task(name: str, split: str, options: Any, key: str) -> Any:
    what = ("task", name, split, repr(sorted(options.items())))
    return _once(what, lambda: setup.open_task(name, split, options, key))


def _open_model(config: Any, mesh: Any) -> Any:
    seed = config.model.lora and config.run.seed  # an adapter is drawn
    what = ("model", repr(config.model), seed, mesh)
    policy, params, tokenizer = _once(what, lambda: setup.open_model(config, mesh))
    return policy, jax.tree.map(jnp.copy, params), tokenizer  # updates donate them


def _open_sampler(policy: Any, tokenizer: Any, section: Any, *rest: Any, **more: Any):
    what = ("sampler", id(policy), repr(section), rest, tuple(sorted(more.items())))
    return _once(
        what, lambda: setup.open_sampler(policy, tokenizer, section, *rest, **more)
    )


def _make_optimizer(config: Any, updates: int, information: Any = None) -> Any:
    """That of the config, its constant learning rate in the state."""
    if config.schedule != "constant" or config.warmup_updates:
        raise ValueError(
            f"optimizer.schedule={config.schedule}, warmup_updates="
            f"{config.warmup_updates}: kept programs have a constant rate alone."
        )
    unit = replace(config, learning_rate=1.0)

    def times(updates, rate, params=None, **extra):
        return jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates), rate

    rate = optax.GradientTransformationExtraArgs(
        lambda params: jnp.asarray(config.learning_rate, jnp.float32), times
    )
    if type(information) is Information and information.adapt is None:
        same = {f.name: getattr(information, f.name) for f in fields(information)}
        information = _Traced(**same)
    plain = optimizer.make_optimizer(unit, updates, information)
    return optax.with_extra_args_support(optax.chain(plain, rate))


@dataclass(frozen=True)
class _Traced(Information):
    """Its numbers in the state."""

    def transform(self) -> optax.GradientTransformationExtraArgs:
        fixed = ("smoothing", "delay", "adapt")
        make = optax.inject_hyperparams(scale_by_information, static_args=fixed)
        return make(
            self.sensitivity,
            max_multiplier=self.max_multiplier,
            min_multiplier=self.min_multiplier,
            smoothing=self.smoothing,
            delay=self.delay,
        )
