"""From judged groups to the batches that updates consume. Strings end here."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from jaxrl_post.generation import Rollouts
from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.groups import Demonstrations, Groups
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.training.teacher_contexts import TeacherContexts
from jaxrl_post.training.widths import fit_width, pad_left
from jaxrl_post.types import Prompts, Verdict


def make_groups(
    prompts: Prompts,
    contexts: np.ndarray,
    context_mask: np.ndarray,
    rollouts: Rollouts,
    completions: Sequence[str],
    verdicts: Sequence[Verdict],
    written: np.ndarray | None = None,
) -> Groups:
    """Rollouts and verdicts, both in rows ``p * G + g``, as groups."""
    count = len(prompts)
    size = len(completions) // count

    def grouped(x):
        return np.asarray(x).reshape(count, size, *np.shape(x)[1:])

    def rows(x):
        return tuple(tuple(x[p * size : (p + 1) * size]) for p in range(count))

    rewards = np.array([v.reward for v in verdicts], np.float32)  # None becomes NaN
    judged = ~np.isnan(rewards)
    return Groups(
        prompts=prompts,
        contexts=contexts,
        context_mask=context_mask,
        tokens=grouped(rollouts.tokens),
        mask=grouped(rollouts.mask),
        sampler_logps=grouped(rollouts.sampler_logps),
        stopped=grouped(rollouts.stopped),
        completions=rows(completions),
        verdicts=rows(verdicts),
        rewards=grouped(np.where(judged, rewards, 0.0)),
        judged=grouped(judged),
        observed=None if written is None else grouped(rollouts.mask & ~written),
    )


def demonstrated_groups(
    prompts: Prompts,
    contexts: np.ndarray,
    context_mask: np.ndarray,
    given: Demonstrations,
) -> Groups:
    """Groups of one: each prompt's demonstration alone, as SFT trains on it."""
    unknown = Verdict(None)
    return Groups(
        prompts=prompts,
        contexts=contexts,
        context_mask=context_mask,
        tokens=given.tokens[:, None],
        mask=given.mask[:, None],
        sampler_logps=given.sampler_logps[:, None],
        stopped=given.stopped[:, None],
        completions=tuple((text,) for text in given.texts),
        verdicts=tuple((verdict or unknown,) for verdict in given.verdicts),
        rewards=given.rewards[:, None],
        judged=given.available[:, None],
        is_teacher=given.is_teacher[:, None],
    )


def make_batch(
    groups: Groups,
    recipe: Recipe,
    *,
    count: int,
    context_limit: int,
    teacher: TeacherContexts | None = None,
) -> Batch:
    """The batch of a step.

    Observations, completions that were not judged, and truncated ones under
    `Recipe.mask_truncated`, are attended to but not trained on.

    Args:
      groups: after the recipe's group transforms.
      recipe: how rewards become advantages.
      count: groups that the batch holds; missing ones are filler that trains nothing.
      context_limit: longest context that a run may have, see `fit_width`.
      teacher: the teacher's contexts, where the recipe reprompts.
    """
    size = groups.rewards.shape[1]
    advantages = np.zeros_like(groups.rewards)
    if recipe.advantages is not None:
        with jax.default_device(_host()):  # an accelerator would have to be waited for
            given = recipe.advantages(groups.rewards, where=groups.judged)
            advantages = np.asarray(given)
    trained = groups.judged
    if recipe.mask_truncated:
        trained = trained & groups.stopped
    time = fit_width(int(groups.lengths.max(initial=1)), groups.mask.shape[2])
    longest = int(groups.context_mask.sum(1).max(initial=1))
    width = fit_width(longest, context_limit)

    def fill(x, pad=0):
        missing = count - len(groups)
        return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=pad)

    def rows(x):
        x = fill(x)[:, :, :time] if x.ndim == 3 else fill(x)
        return x.reshape(count * size, *x.shape[2:])

    context_mask = fill(pad_left(groups.context_mask, width))
    context_mask[len(groups) :, -1] = True  # every context has a token
    mask = rows(groups.mask)
    learnt = mask if groups.observed is None else mask & ~rows(groups.observed)
    of_teacher = {}
    extras = {name: rows(x) for name, x in groups.extras.items()}
    if teacher is not None:
        of_teacher = {
            "teacher_contexts": teacher.contexts.astype(np.int32),
            "teacher_context_mask": teacher.context_mask,
            "teacher_index": rows(teacher.index),
        }
        extras["distilled"] = rows(teacher.distilled)
        extras["distillation_weight"] = rows(teacher.weights)
    if groups.is_teacher is not None:
        of_teacher["is_teacher"] = rows(groups.is_teacher)
    return Batch(
        contexts=fill(pad_left(groups.contexts, width)).astype(np.int32),
        context_mask=context_mask,
        responses=rows(groups.tokens).astype(np.int32),
        token_mask=mask,
        loss_mask=learnt & rows(trained)[:, None],
        sequence_mask=rows(np.ones_like(groups.judged)),
        advantages=rows(advantages.astype(np.float32)),
        sampler_logps=rows(groups.sampler_logps),
        extras=extras,
        **of_teacher,
    )


@functools.cache
def _host() -> jax.Device | None:
    """The host as a device; None where `JAX_PLATFORMS` leaves it out.

    The last one: where a host counts as several devices the first are at work.
    """
    try:
        return jax.local_devices(backend="cpu")[-1]
    except RuntimeError:
        return None


def cut_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch as `parts` batches of adjacent whole groups, one for each update."""
    if parts == 1:
        return [batch]

    def part(x, i):
        size = x.shape[0] // parts
        return x[i * size : (i + 1) * size]

    # Sequences name their teacher contexts by number, so all of these go along.
    named = ("teacher_contexts", "teacher_context_mask")
    whole = {name: getattr(batch, name) for name in named}
    rows = batch.replace(**dict.fromkeys(named))
    return [
        jax.tree.map(lambda x, i=i: part(x, i), rows).replace(**whole)
        for i in range(parts)
    ]


def group_metrics(groups: Groups) -> dict[str, float]:
    """What a step's groups say of the policy: the judge's rewards, not shaped ones.

    Args:
      groups: all groups that were sampled, before any transform.
    """
    verdicts = [verdict for row in groups.verdicts for verdict in row]
    rewards = np.array([v.reward for v in verdicts if v.reward is not None], float)
    known = [v.success for v in verdicts if v.success is not None]
    alike = [len({v.reward for v in row}) < 2 for row in groups.verdicts]
    lengths = groups.lengths
    metrics = {
        "reward/mean": rewards.mean() if rewards.size else np.nan,
        "reward/std": rewards.std() if rewards.size else np.nan,
        "reward/zero_std_groups": np.mean(alike),
        "reward/unjudged": 1.0 - rewards.size / len(verdicts),
        "length/mean": lengths.mean(),
        "length/max": lengths.max(),
        "length/truncated": 1.0 - groups.stopped.mean(),
    }
    if known:
        metrics["reward/success"] = np.mean(known)
        solved = [[v.success for v in row] for row in groups.verdicts]
        metrics["reward/solved_groups"] = np.mean([all(row) for row in solved])
        metrics["reward/unsolved_groups"] = np.mean([not any(row) for row in solved])
    parsed = [v.extra["parsed"] for v in verdicts if "parsed" in v.extra]
    if parsed:
        metrics["reward/parsed"] = np.mean(parsed)
    metrics |= _by_level(groups) | _by_function(verdicts)
    return {name: float(value) for name, value in metrics.items()}


def _by_level(groups: Groups) -> dict[str, float]:
    """The mean reward of each level, where the rows have a column ``level``."""
    rewards: dict[str, list[float]] = {}
    for columns, row in zip(groups.prompts.columns, groups.verdicts, strict=True):
        if isinstance(level := columns.get("level"), int | str):
            of_level = rewards.setdefault(f"reward/level/{level}", [])
            of_level += [v.reward for v in row if v.reward is not None]
    if len(rewards) > _MOST_LEVELS:  # a column that happens to have this name
        return {}
    return {name: float(np.mean(x)) for name, x in sorted(rewards.items()) if x}


def _by_function(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Mean and spread of what each of several reward functions returned."""
    values: dict[str, list[float]] = {}
    for verdict in verdicts:
        for name, value in verdict.extra.items():
            if name.startswith("reward/") and isinstance(value, int | float):
                values.setdefault(name, []).append(value)
    metrics = {f"{name}/mean": float(np.mean(x)) for name, x in values.items()}
    return metrics | {f"{name}/std": float(np.std(x)) for name, x in values.items()}


_MOST_LEVELS = 20
