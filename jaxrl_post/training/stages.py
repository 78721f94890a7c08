"""The parts of a run, each with an algorithm of its own: SFT, then RL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.recipes.injection import Injection
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.training.config import Config
from jaxrl_post.training.curriculum import remembering
from jaxrl_post.training.offload import offload
from jaxrl_post.training.optimizer import make_optimizer
from jaxrl_post.training.state import TrainState, init_state


@dataclass(frozen=True)
class Stage:
    """Some of a run's steps, and how they are made.

    Attributes:
      name: in the config; None for a run without stages.
      number: counted from 1.
      config: the run's config with the stage's keys laid over it.
      recipe: the algorithm.
      first: the run's steps before this stage.
      last: its last step, counted from the run's beginning; `first` where it has none.
      own_task: whether its task is another than that of the stage before.
      optimizer: its optax chain.
    """

    name: str | None
    number: int
    config: Config
    recipe: Recipe
    first: int
    last: int
    own_task: bool
    optimizer: optax.GradientTransformationExtraArgs

    def __str__(self) -> str:
        if self.name is None:
            return str(self.recipe)
        steps = f"steps {self.first + 1} to {self.last}"
        return f"stage {self.number}, {self.name}: {steps}\n{self.recipe}"

    def key(self, key: str) -> str:
        """A config key as the user wrote it, for messages."""
        return f"stages.{self.name}.{key}" if self.name else key

    @property
    def metrics(self) -> dict[str, int]:
        """What the rows of its steps say of it."""
        return {"stage": self.number} if self.name else {}

    @property
    def spike_window(self) -> int | None:
        """Updates that its guard against spikes looks back on; None: it has none."""
        training = self.config.training
        return None if training.spike_deviations is None else training.spike_window

    @property
    def off_policy(self) -> bool:
        """Whether completions are sampled from the parameters of one step before."""
        return self.config.training.steps_off_policy > 0

    def begin(
        self,
        before: TrainState,
        optimizer: optax.GradientTransformation,
        questions: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> TrainState:
        """The state before the stage's first step.

        Parameters, steps and the run's random key are those of the stage before. The
        optimizer, its schedule and the count of updates, the teacher, the reference
        policy and the posteriors of a gate begin anew: teacher and reference are the
        policy as it now is. Prompts go on where the stage before ended, unless the
        stage has another task.

        Args:
          before: the last state of the stage before; not to be used any more.
          optimizer: of this stage.
          questions: of its task.
          mesh: that the state lies on, if any.
        """
        state = init_state(
            before.trainable,
            optimizer,
            self.recipe,
            before.rng,
            frozen=before.frozen,
            questions=questions,
            spike_window=self.spike_window,
            off_policy=self.off_policy,
            mesh=mesh,
        )
        cursor = jnp.zeros_like(before.cursor) if self.own_task else before.cursor
        state = state.replace(step=before.step, cursor=cursor)
        return offload(state, self.config.training.offload)


def make_stages(config: Config, recipe: Recipe | None = None) -> tuple[Stage, ...]:
    """The stages of a config, in order; a config without any is one stage.

    Args:
      config: of the run.
      recipe: in place of the one that the config names.

    Raises:
      InputError: a recipe does not exist or is incomplete, or `recipe` is given for a
        config with stages, which name theirs.
    """
    if recipe is not None and config.stages:
        raise InputError(
            "a recipe was given for a config with stages; name each one's in the "
            f"config: {', '.join(f'stages.{name}.recipe' for name in config.stages)}"
        )
    stages: list[Stage] = []
    for number, name in enumerate(config.stages or (None,), start=1):
        part = config.stage(name) if name else config
        first = stages[-1].last if stages else 0
        made = _make_recipe(name, part, recipe)
        stages.append(
            Stage(
                name=name,
                number=number,
                config=part,
                recipe=made,
                first=first,
                last=first + part.training.steps,
                own_task=bool(stages) and part.task != stages[-1].config.task,
                optimizer=_make_optimizer(name, part, made),
            )
        )
    return tuple(stages)


def stage_of(stages: Sequence[Stage], step: int) -> int:
    """The index of the stage that a checkpoint after `step` belongs to.

    At a boundary it is the stage that ends there: what the next one begins anew is
    made when it begins.
    """
    found = (index for index, stage in enumerate(stages) if step <= stage.last)
    return next(found, len(stages) - 1)


def _make_recipe(name: str | None, config: Config, recipe: Recipe | None) -> Recipe:
    section = config.recipe
    try:
        recipe = recipe or recipes.make(section.name, **section.arguments)
        if "teacher" in recipe.needs and recipe.reprompt is None:
            raise InputError(
                f"recipe {recipe.name!r} has a term that needs a teacher, but no "
                "reprompt that says what the teacher sees; give it one, such as "
                "Reprompt()."
            )
        _check_groups(recipe, config.training.group_size)
        recipe = remembering(recipe, config.task.curriculum)
        if config.training.steps_off_policy:
            _check_off_policy(recipe, config.training.steps_off_policy)
    except InputError as error:
        raise InputError(f"stages.{name}: {error}") if name else error from None
    return recipe


def _make_optimizer(
    name: str | None, config: Config, recipe: Recipe
) -> optax.GradientTransformationExtraArgs:
    if not recipe.learns:
        return optax.with_extra_args_support(optax.identity())
    updates = config.training.steps * config.training.updates_per_step
    try:
        return make_optimizer(config.optimizer, updates, recipe.information)
    except InputError as error:
        raise InputError(f"stages.{name}: {error}") if name else error from None


def _check_groups(recipe: Recipe, group_size: int) -> None:
    """Refuses a group size that the recipe cannot work with."""
    if not recipe.rollouts and group_size != 1:
        raise InputError(
            f"training.group_size={group_size}: recipe {recipe.name!r} samples "
            "nothing, a group is one demonstration; set training.group_size=1."
        )
    if group_size < recipe.min_group_size:
        raise InputError(
            f"training.group_size={group_size}: recipe {recipe.name!r} compares the "
            f"rollouts of a group and learns nothing from fewer than "
            f"{recipe.min_group_size}; raise it."
        )
    for transform in recipe.group_transforms:
        if isinstance(transform, Injection):
            try:
                transform.check_group_size(group_size)
            except ValueError as error:
                raise InputError(f"recipe {recipe.name!r}: {error}") from None


def _check_off_policy(recipe: Recipe, steps: int) -> None:
    """Refuses recipes to which completions of an earlier policy mean something else."""
    key = f"training.steps_off_policy={steps}: recipe {recipe.name!r}"
    remedy = "set training.steps_off_policy=0."
    if not recipe.rollouts or not recipe.learns:
        lacks = "learns nothing" if recipe.rollouts else "samples nothing"
        raise InputError(f"{key} {lacks}, so there is nothing to overlap; {remedy}")
    if recipe.history is not None:
        raise InputError(
            f"{key} shows prompts with what came of the step before, which is not "
            f"known yet; {remedy}"
        )
    if recipe.posterior_discount is not None:
        raise InputError(
            f"{key} remembers success rates of steps that learned something, and "
            "whether the step before does is not known yet; leave out task.curriculum "
            "and recipe.posterior_discount, or set training.steps_off_policy=0."
        )
    for term in recipe.terms:
        if not term.off_policy:
            raise InputError(
                f"{key} has a term, {term.name!r}, that takes all completions for the "
                "policy's own: it does not weight tokens by importance. Set "
                "recipe.truncated_importance=2.0 where the recipe has it for this "
                "term, or training.steps_off_policy=0."
            )
