"""Sections of a config that say what is learnt: task, recipe, optimizer, training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxrl_post.training.configfile import number, rest

Offloaded = Literal["teacher", "reference", "optimizer"]


@dataclass(frozen=True)
class CurriculumConfig:
    """Questions that all answers of a group solve, or none, are asked less often.

    Attributes:
      floor: chance of a question that is always solved, or never, to be asked when its
        turn comes; one of which half the answers succeed has 1.
      discount: how much of what earlier visits of a question showed still counts at
        the next; recipes that remember by themselves have their own.
    """

    floor: float = number(0.1, above=0, at_most=1)
    discount: float = number(0.5, at_least=0, at_most=1)


@dataclass(frozen=True)
class TaskConfig:
    """What is asked, and how answers are judged.

    Attributes:
      name: a built-in task, or ``my_module:my_task``.
      split: the part of the data to train on.
      questions: those to train on, by id or by row number from 0; null: all.
      curriculum: ask questions by how often they are solved; null: all alike.
      max_prompt_length: tokens; longer prompts are dropped and counted, never cut.
      max_dropped_share: of the first 256 prompts, or of an evaluation block's; when
        more are too long, that is an error.
      judge_timeout: seconds that the judging of one completion may take.
      options: every other key of the section, arguments of the task.
    """

    name: str
    split: str = "train"
    questions: tuple[Any, ...] | None = None
    curriculum: CurriculumConfig | None = None
    max_prompt_length: int = number(1024, at_least=1)
    max_dropped_share: float = number(0.1, at_least=0, at_most=1)
    judge_timeout: float = number(10.0, above=0)
    options: Mapping[str, Any] = rest()


@dataclass(frozen=True)
class RecipeConfig:
    """The algorithm.

    Attributes:
      name: a built-in recipe, or ``my_module:my_recipe``.
      arguments: every other key of the section, arguments of the recipe.
    """

    name: str
    arguments: Mapping[str, Any] = rest()


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates. Schedules count updates, not steps.

    Attributes:
      name: ``adamw``, ``sgd``, or ``my_module:my_chain``, a function that returns an
        optax transformation. It gets ``learning_rate`` (a number, or optax's schedule)
        and ``updates``, those of the stage, where it names them, and the section's
        other keys, those from `weight_decay` on among them: clipping is its own too.
      learning_rate: at its peak, after the warm-up.
      schedule: of the learning rate after the warm-up; ``linear`` and ``cosine``
        reach 0 at the last update.
      warmup_updates: over which the learning rate rises linearly from 0.
      weight_decay: decoupled, multiplied by the learning rate (adamw).
      b1: decay of the first moment (adamw), or the momentum (sgd).
      b2: decay of the second moment (adamw).
      eps: added to the root of the second moment (adamw).
      max_grad_norm: global norm to which gradients are clipped; null for no clipping.
      arguments: every other key of the section, arguments of a function of one's own.
    """

    name: str = "adamw"
    learning_rate: float = number(1e-6, at_least=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: int = number(0, at_least=0)
    weight_decay: float = number(0.0, at_least=0, built_in=True)
    b1: float = number(0.9, at_least=0, below=1, built_in=True)
    b2: float = number(0.999, at_least=0, below=1, built_in=True)
    eps: float = number(1e-8, above=0, built_in=True)
    max_grad_norm: float | None = number(1.0, above=0, built_in=True)
    arguments: Mapping[str, Any] = rest(own="name")


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at once, and what is saved. A step is one rollout batch.

    Attributes:
      steps: rollout batches in the whole run.
      prompts_per_step: prompts drawn for one step, over all processes.
      group_size: completions sampled per prompt.
      updates_per_step: equal parts that a step's groups are split into, one optimizer
        update for each.
      micro_batch_tokens: bound on the tokens (contexts and responses, padding
        included) of one forward and backward pass, over all devices; null: a whole
        update at once. Holds at least one sequence of the greatest length.
      micro_batch_tokens_per_shard: the same for each of the data x fsdp shards of a
        batch, so that it suits any number of devices; where both are set, both hold.
      chunk_size: tokens whose logits exist at one time; null: chosen for the memory.
      steps_off_policy: by how many steps the parameters that completions are sampled
        from lag behind, 0 or 1. With 1 a step's completions are sampled before the
        updates of the step before and judged during them. A copy more of the trained
        parameters is kept, and the recipe must weight tokens by importance.
      offload: parts of the state that lie in the host's memory between their uses, of
        ``teacher``, ``reference`` and ``optimizer``; slower, for memory on the device.
      max_skipped_updates: updates in a row that may be skipped, for a loss or a
        gradient that is not finite or for a spike, before the run stops.
      spike_deviations: skips updates whose gradient norm lies more than so many robust
        deviations above the median of those before; null: none are skipped for that.
      spike_window: updates that this median is taken over; the first ones only fill it.
      evaluate_every: steps between evaluations; null: only the base, and the end.
      teacher_samples: answers per question that the self-teacher is asked for in the
        first step and in those that are evaluated, to measure its accuracy beside the
        student's; null: none.
      teacher_tokens: whether the self-teacher's log-probs of a few completions' tokens
        are kept with them in the same steps, for the report to show what it would
        change; one more program to compile.
      checkpoint_every: steps between checkpoints; one more is made at the end and on
        a signal.
      keep_checkpoints: how many of the last checkpoints stay.
      stop_at_success: ends the run with the first step in which the judge calls a
        completion a success.
      keep_best: a metric, such as ``eval/science/avg@16``: of the checkpoints of steps
        that have it, the one where it is greatest stays as well; null: none.
    """

    steps: int = number(at_least=0)
    prompts_per_step: int = number(16, at_least=1)
    group_size: int = number(8, at_least=1)
    updates_per_step: int = number(1, at_least=1)
    micro_batch_tokens: int | None = number(None, at_least=1)
    micro_batch_tokens_per_shard: int | None = number(None, at_least=1)
    chunk_size: int | None = number(None, at_least=1)
    steps_off_policy: int = number(0, at_least=0, at_most=1)
    offload: tuple[Offloaded, ...] = ()
    max_skipped_updates: int = number(10, at_least=1)
    spike_deviations: float | None = number(None, above=0)
    spike_window: int = number(50, at_least=2)
    evaluate_every: int | None = number(None, at_least=1)
    teacher_samples: int | None = number(None, at_least=1)
    teacher_tokens: bool = False
    checkpoint_every: int = number(50, at_least=1)
    keep_checkpoints: int = number(2, at_least=1)
    stop_at_success: bool = False
    keep_best: str | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled for training.

    Attributes:
      temperature: that logits are divided by, in sampling and in every loss.
      top_k: keep the k likeliest tokens.
      top_p: keep the likeliest tokens that together reach this probability.
      min_p: keep tokens at least this share as likely as the likeliest.
      max_new_tokens: per completion; a completion that reaches it counts as truncated.
      slots: completions decoded at the same time, over all devices; null: all of a
        step.
      slots_per_shard: the same for each of the data x fsdp shards of a batch; where
        both are set, both hold.
      stop: texts that end a completion, besides the tokenizer's end tokens.
      allow_truncated_sampling: permits top_k, top_p and min_p here, although the loss
        is that of the untruncated policy.
    """

    temperature: float = number(1.0, above=0)
    top_k: int | None = number(None, at_least=1)
    top_p: float | None = number(None, above=0, at_most=1)
    min_p: float | None = number(None, above=0, at_most=1)
    max_new_tokens: int = number(256, at_least=1)
    slots: int | None = number(None, at_least=1)
    slots_per_shard: int | None = number(None, at_least=1)
    stop: tuple[str, ...] = ()
    allow_truncated_sampling: bool = False
