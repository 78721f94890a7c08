"""The optax chain that a config describes."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxrl_post.recipes.recipe import Information
from jaxrl_post.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """The learning rate of each update, counted from 0.

    Args:
      config: peak, form and warm-up.
      updates: of the whole run; "linear" and "cosine" reach 0 there.

    >>> config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_updates=2)
    >>> [float(make_schedule(config, 4)(i)) for i in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    peak, warmup = config.learning_rate, config.warmup_updates
    left = max(updates - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, left),
        "cosine": lambda: optax.cosine_decay_schedule(peak, left),
    }[config.schedule]()
    if not warmup:
        return after
    rising = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, updates: int, information: Information | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping, the optimizer, its schedule, the modulation; moments are float32.

    Args:
      config: the section `optimizer`.
      updates: of the whole run, for the schedule.
      information: of the recipe, where it modulates steps.
    """
    schedule = make_schedule(config, updates)
    chain = []
    if config.max_grad_norm is not None:
        chain.append(optax.clip_by_global_norm(config.max_grad_norm))
    if config.name == "adamw":
        chain.append(
            optax.scale_by_adam(
                b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32
            )
        )
    elif config.b1:
        chain.append(optax.trace(decay=config.b1, accumulator_dtype=jnp.float32))
    if information is not None and not information.scale_decay:
        chain.append(information.transform())
    if config.name == "adamw":
        chain.append(optax.add_decayed_weights(config.weight_decay))
    if information is not None and information.scale_decay:
        chain.append(information.transform())
    chain.append(optax.scale_by_learning_rate(schedule))
    return optax.with_extra_args_support(optax.chain(*chain))
