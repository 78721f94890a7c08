"""How often the self-teacher is right, behind what it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np

from jaxrl_post.generation import EncodedPrompts, Sampler
from jaxrl_post.isolation import JudgePool
from jaxrl_post.models.memory import on_device
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.tasks import Task
from jaxrl_post.training.dialogue import Dialogue
from jaxrl_post.training.judging import read_and_judge
from jaxrl_post.training.state import TrainState, merge_params
from jaxrl_post.training.teacher_contexts import TeacherContexts
from jaxrl_post.training.turns import in_turns, turns_of


def teacher_params(recipe: Recipe, state: TrainState) -> chex.ArrayTree | None:
    """The parameters that the recipe's teacher is sampled with.

    None for no teacher, and for a trust region, whose logits are a mixture of two
    models: it scores tokens, but the sampler cannot draw them.
    """
    if recipe.teacher.kind in ("none", "trust_region"):
        return None
    own = state.trainable if state.teacher is None else on_device(state.teacher)
    return merge_params(own, state.frozen)


def teacher_accuracy(
    params: chex.ArrayTree,
    groups: Groups,
    contexts: TeacherContexts,
    sampler: Sampler,
    tokenizer: Any,
    task: Task,
    pool: JudgePool,
    *,
    samples: int,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    chat_template_arguments: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Answers of the teacher, judged, beside the student's to the same questions.

    They have as many turns as the student's.

    Of each question that is distilled, the context that most of its samples have is
    asked. The student's accuracy is that of its groups; where a sibling's success is
    what the teacher is shown, a group needs one to count here, which favours the
    student.

    Args:
      params: of the teacher.
      groups: the step's judged groups.
      contexts: what the teacher is shown.
      sampler: with the settings of the rollouts.
      tokenizer: a transformers tokenizer.
      task: whose judge is asked.
      pool: where it is asked.
      samples: answers to each question.
      key: a PRNG key.
      mesh: that the parameters lie on.
      chat_template_arguments: as for prompts.

    Returns:
      ``teacher/accuracy``, ``teacher/student_accuracy``, ``teacher/questions`` (that
      both are means over); nothing where no question is distilled.
    """
    asked = np.flatnonzero(contexts.distilled.any(1))
    if not asked.size:
        return {}
    rows = np.array(
        [np.bincount(contexts.index[p][contexts.distilled[p]]).argmax() for p in asked]
    )
    # As many rows at every step, so that the sampler is compiled once.
    filled = np.pad(rows, (0, len(groups) - len(rows)), mode="edge")
    dialogue = Dialogue(
        sampler,
        lambda: params,
        key=key,
        context_limit=contexts.contexts.shape[1],
        mesh=mesh,
        keeps=turns_of(task) > 1,
    )
    rollouts = dialogue.begin(
        contexts.contexts[filled], contexts.context_mask[filled], group_size=samples
    )
    count = len(asked) * samples
    rollouts = jax.tree.map(lambda x: x[:count], rollouts)
    prompts = groups.prompts.take(asked.tolist())
    each = prompts.take(np.repeat(np.arange(len(asked)), samples).tolist())
    texts, verdicts = read_and_judge(
        tokenizer, pool, task.judge, each, rollouts.tokens, rollouts.mask
    )
    shown = contexts.contexts[rows], contexts.context_mask[rows]
    answers = in_turns(
        rollouts,
        texts,
        verdicts,
        EncodedPrompts(prompts, *shown, ()),
        task=task,
        pool=pool,
        tokenizer=tokenizer,
        generate=dialogue.go_on,
        chat_template_arguments=chat_template_arguments,
    )
    own = [_own_accuracy(groups, int(p)) for p in asked]
    return {
        "teacher/accuracy": float(np.mean([bool(v.success) for v in answers.verdicts])),
        "teacher/student_accuracy": float(np.mean(own)),
        "teacher/questions": float(len(asked)),
    }


def _own_accuracy(groups: Groups, p: int) -> float:
    """Of the samples of group p that the student wrote."""
    given = groups.is_teacher
    wrote = [
        given is None or not given[p, g].any() for g in range(len(groups.judged[p]))
    ]
    right = [bool(verdict.success) for verdict in groups.verdicts[p]]
    return float(np.mean([r for r, own in zip(right, wrote, strict=True) if own]))
