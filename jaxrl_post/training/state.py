"""Everything that training changes, in one pytree."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.sharding.processes import replicate
from jaxrl_post.training.spikes import empty_window


class TrainState(struct.PyTreeNode):
    """What an update reads and writes, and what a checkpoint holds.

    Attributes:
      step: int32, rollout batches finished.
      update: int32, optimizer updates made, skipped ones included.
      skipped: int32, updates in a row that were skipped.
      trainable: the parameters that are trained.
      frozen: the others, a nested dict of disjoint paths; ``{}`` where all are trained.
      opt_state: of the optax transformation.
      teacher: the self-teacher's parameters, shaped like `trainable`; None where the
        recipe has none of its own (no teacher, or a live one).
      reference: the parameters that training began with, where a term asks for them;
        ``{}`` where those are the frozen ones alone.
      gate: ``[R, 2]`` float64 on the host, the posteriors of the success rates of the
        task's R questions, for recipes that remember them; else None. No update reads
        or writes it.
      rng: the run's key. Nothing consumes it: step ``k`` draws from
        ``fold_in(rng, k)``, so that a resumed run repeats it exactly.
      cursor: int32, prompts drawn since the start.
      previous: `trainable` before the updates of the last step, which the next step's
        completions are sampled from; None where they are sampled from `trainable`.
      norms: ``[W]`` float32, gradient norms of the last updates, for the guard against
        spikes; None without one.
    """

    step: jax.Array
    update: jax.Array
    skipped: jax.Array
    trainable: chex.ArrayTree
    frozen: chex.ArrayTree
    opt_state: optax.OptState
    teacher: chex.ArrayTree | None
    reference: chex.ArrayTree | None
    gate: chex.ArrayTree | None
    rng: jax.Array
    cursor: jax.Array
    norms: jax.Array | None = None
    previous: chex.ArrayTree | None = None

    @property
    def sampled_from(self) -> Any:
        """The whole parameters that the next step's completions are sampled from."""
        own = self.trainable if self.previous is None else self.previous
        return merge_params(own, self.frozen)


def init_state(
    params: chex.ArrayTree,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    key: jax.Array,
    *,
    frozen: chex.ArrayTree | None = None,
    reference: chex.ArrayTree | None = None,
    questions: int | None = None,
    spike_window: int | None = None,
    off_policy: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: parameters to train. The state owns them from now on: updates donate it.
      optimizer: as given to `make_update_step`.
      recipe: decides whether copies for a teacher or a reference are kept.
      key: a typed PRNG key, ``jax.random.key(seed)``.
      frozen: parameters that complete `params` but are not trained.
      reference: completes `frozen` to the reference policy, where that is not a copy of
        `params`; ``{}``: the frozen ones alone, the base of a fresh adapter.
      questions: R, of the task, for recipes with a `posterior_discount`.
      spike_window: updates that the guard against spikes looks back on; None: no guard.
      off_policy: keep `TrainState.previous`.
      mesh: that `params` lie on, if any.
    """
    if reference is None:
        reference = copy_params(params) if "reference" in recipe.needs else None
    own_teacher = recipe.teacher.keeps_parameters
    remembers = recipe.posterior_discount is not None and questions is not None

    def zero():  # arrays of one's own: a donated buffer must not appear twice
        return jnp.zeros((), jnp.int32)

    state = TrainState(
        step=zero(),
        update=zero(),
        skipped=zero(),
        trainable=params,
        frozen={} if frozen is None else frozen,
        opt_state=optimizer.init(params),
        teacher=copy_params(params, jnp.float32) if own_teacher else None,
        reference=reference if "reference" in recipe.needs else None,
        gate=np.ones((questions, 2)) if remembers else None,
        rng=key,
        cursor=zero(),
        norms=None if spike_window is None else empty_window(spike_window),
        previous=copy_params(params) if off_policy else None,
    )
    return replicate(state, mesh)


def merge_params(trainable: Any, frozen: Any) -> Any:
    """One parameter tree from its trained and its frozen part.

    >>> merge_params({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
    {'a': {'y': 2, 'x': 1}, 'b': 3}

    Raises:
      ValueError: where both parts hold a value for one path.
    """
    if not isinstance(trainable, dict) or not isinstance(frozen, dict):
        raise ValueError("A parameter is both trainable and frozen.")
    merged = dict(frozen)
    for name, value in trainable.items():
        merged[name] = merge_params(value, frozen[name]) if name in frozen else value
    return merged


def copy_params(params: chex.ArrayTree, at_least: Any = None) -> chex.ArrayTree:
    """A copy, in at least that precision: a moving average in half would not move."""

    def copy(x):
        dtype = x.dtype if at_least is None else jnp.promote_types(x.dtype, at_least)
        return jnp.array(x, dtype, copy=True)

    return jax.tree.map(copy, params)
