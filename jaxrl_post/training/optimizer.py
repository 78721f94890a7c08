"""The optax chain that a config describes."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import optax

from jaxrl_post.errors import InputError, shown
from jaxrl_post.recipes.recipe import Information
from jaxrl_post.tasks.lookup import call_own, is_own, resolve
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

    Raises:
      InputError: the section names a function of the user's that does not exist, does
        not fit the section, or returns something else.
    """
    schedule = make_schedule(config, updates)
    if is_own(config.name):
        return _own(config, updates, schedule, information)
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


def takes(config: OptimizerConfig, argument: str) -> bool:
    """Whether a section's own function takes an argument; the built-in ones take all.

    Args:
      config: the section.
      argument: ``learning_rate`` or ``updates``.
    """
    if not is_own(config.name):
        return True
    return argument in inspect.signature(resolve(config.name)).parameters


def _own(
    config: OptimizerConfig,
    updates: int,
    schedule: optax.Schedule,
    information: Information | None,
) -> optax.GradientTransformationExtraArgs:
    """The chain of a user's function, modulated behind it."""
    constant = config.schedule == "constant" and not config.warmup_updates
    rate = config.learning_rate if constant else schedule
    offered = {"learning_rate": rate, "updates": updates}
    chain = call_own(config.name, config.arguments, offered, section="optimizer")
    if not isinstance(chain, optax.GradientTransformation):
        raise InputError(
            f"optimizer.name={config.name!r} returned {shown(chain)}, no optax chain "
            "(optax.GradientTransformation)."
        )
    usual = OptimizerConfig()
    for name in ("learning_rate", "schedule", "warmup_updates"):
        if getattr(config, name) != getattr(usual, name):
            if not takes(config, "learning_rate"):
                raise InputError(
                    f"optimizer.{name}={getattr(config, name)!r}: {config.name!r} has "
                    "no argument learning_rate; leave it out."
                )
    if information is not None:
        if not information.scale_decay:
            raise InputError(
                f"optimizer.name={config.name!r}: where a chain of one's own decays "
                "weights is not known; set recipe.scale_decay=true."
            )
        chain = optax.chain(chain, information.transform())
    return optax.with_extra_args_support(chain)
