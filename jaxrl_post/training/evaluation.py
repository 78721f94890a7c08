"""How good a policy is: sampled answers to held-out questions, judged and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from jaxrl_post.generation import EncodedPrompts, Sampler, encode_prompts
from jaxrl_post.isolation import JudgePool
from jaxrl_post.models.policy import Policy
from jaxrl_post.tasks import Task
from jaxrl_post.tasks.rewards import TrainerState
from jaxrl_post.training.config import Config, EvaluationConfig
from jaxrl_post.training.dialogue import Dialogue
from jaxrl_post.training.judging import read_and_judge, rehearse, tell
from jaxrl_post.training.own_model import check_model_name
from jaxrl_post.training.setup import (
    open_mesh,
    open_model,
    open_sampler,
    open_task,
    slots_bound,
)
from jaxrl_post.training.statistics import evaluation_metrics
from jaxrl_post.training.turns import in_turns, turns_of
from jaxrl_post.training.widths import fit_width, pad_left
from jaxrl_post.types import Prompts

_SLOTS = 512
"""Answers decoded at a time, where the section `sampling` does not say."""


@dataclass(frozen=True)
class _Block:
    config: EvaluationConfig
    task: Task
    prompts: Prompts
    contexts: np.ndarray
    mask: np.ndarray
    sampler: Sampler


class Evaluator:
    """The evaluation blocks of a config, ready to be run on any parameters.

    Questions are tokenised once; samplers keep their compiled programs. Blocks draw
    from random streams of their own, the same at every evaluation: curves over
    training compare like with like.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        tokenizer: Any,
        pool: JudgePool,
        *,
        mesh: jax.sharding.Mesh | None = None,
        tasks: Mapping[str, Task] | None = None,
    ) -> None:
        """Tokenises every block's questions.

        Args:
          config: names the blocks.
          policy: whose answers are measured.
          tokenizer: of the policy.
          pool: where answers are judged.
          mesh: that the parameters are spread over, if any.
          tasks: the blocks' tasks, as `open_tasks` opens them here where they are not
            given.

        Raises:
          InputError: a block names a task or an option that does not exist.
        """
        tasks = open_tasks(config) if tasks is None else tasks
        self._tokenizer, self._pool, self._mesh = tokenizer, pool, mesh
        self._seed = config.run.seed
        self._template_arguments = config.model.chat_template_arguments
        self._blocks: dict[str, _Block] = {}
        samplers: dict[tuple, Sampler] = {}
        slots = slots_bound(config.sampling, mesh) or _SLOTS
        for name, block in config.evaluation.items():
            task = tasks[name]
            encoded = encode_prompts(
                tokenizer,
                task.rows(range(min(block.rows or len(task), len(task)))),
                max_prompt_length=block.max_prompt_length,
                max_dropped_share=config.task.max_dropped_share,
                multiple=1,
                chat_template_arguments=config.model.chat_template_arguments,
                key=f"evaluation.{name}",
            )
            longest = block.max_prompt_length
            if turns_of(task) > 1:  # the turns before are context too
                longest += block.max_new_tokens
            sampler = open_sampler(policy, tokenizer, block, longest, slots=slots)
            # Blocks that differ in nothing but temperature share compiled programs.
            cuts = (block.top_k, block.top_p, block.min_p)
            alike = (block.max_new_tokens, *cuts, block.stop)
            sampler = samplers.setdefault(alike, sampler)
            width = fit_width(encoded.contexts.shape[1], block.max_prompt_length)
            self._blocks[name] = _Block(
                config=block,
                task=task,
                prompts=encoded.prompts,
                contexts=pad_left(encoded.contexts, width),
                mask=pad_left(encoded.context_mask, width),
                sampler=sampler,
            )

    def __call__(
        self, params: chex.ArrayTree, now: TrainerState | None = None
    ) -> dict[str, float]:
        """``eval/<block>/...`` for every block.

        Args:
          params: of the policy.
          now: how far training is, for reward functions that want to know.
        """
        metrics: dict[str, float] = {}
        for index, (name, block) in enumerate(self._blocks.items()):
            if now is not None:
                tell(block.task, now)
            key = jax.random.fold_in(jax.random.key(self._seed), index)
            for metric, value in self._run(block, params, key).items():
                metrics[f"eval/{name}/{metric}"] = value
        return metrics

    def _run(self, block: _Block, params, key) -> Mapping[str, float]:
        samples, prompts = block.config.samples, block.prompts
        temperature = 0.0 if block.config.greedy else block.config.temperature
        dialogue = Dialogue(
            block.sampler,
            lambda: params,
            key=key,
            context_limit=block.config.max_prompt_length,
            temperature=temperature,
            mesh=self._mesh,
            keeps=turns_of(block.task) > 1,
        )
        rollouts = dialogue.begin(block.contexts, block.mask, group_size=samples)
        repeated = prompts.take(np.repeat(np.arange(len(prompts)), samples).tolist())
        texts, verdicts = read_and_judge(
            self._tokenizer,
            self._pool,
            block.task.judge,
            repeated,
            rollouts.tokens,
            rollouts.mask,
        )

        answers = in_turns(
            rollouts,
            texts,
            verdicts,
            EncodedPrompts(prompts, block.contexts, block.mask, ()),
            task=block.task,
            pool=self._pool,
            tokenizer=self._tokenizer,
            generate=dialogue.go_on,
            chat_template_arguments=self._template_arguments,
        )
        rollouts, verdicts = answers.rollouts, list(answers.verdicts)

        def grouped(values):
            return [values[i : i + samples] for i in range(0, len(values), samples)]

        given = None
        if all("answer" in v.extra for v in verdicts if v.reward is not None):
            given = grouped([v.extra.get("answer") for v in verdicts])
        metrics = evaluation_metrics(grouped([v.success for v in verdicts]), given)
        parsed = [v.extra["parsed"] for v in verdicts if "parsed" in v.extra]
        if parsed:
            metrics["parsed"] = float(np.mean(parsed))
        metrics["length"] = float(rollouts.lengths.mean())
        metrics["truncated"] = float(1 - rollouts.stopped.mean())
        metrics["questions"] = float(len(prompts))
        return metrics


def open_tasks(config: Config) -> dict[str, Task]:
    """The task of each evaluation block, by the block's name.

    Blocks that ask the same questions share one: making a task may take seconds.

    Raises:
      InputError: a block names a task or an option that does not exist, or data that
        cannot be read.
    """
    opened: list[tuple[tuple, Task]] = []
    tasks = {}
    for name, block in config.evaluation.items():
        what = (block.task or config.task.name, block.split, block.options)
        task = next((task for known, task in opened if known == what), None)
        if task is None:
            task = open_task(*what, f"evaluation.{name}")
            opened.append((what, task))
        tasks[name] = task
    return tasks


def evaluate_run(config: Config, run_dir: Path | None = None) -> dict[str, float]:
    """The metrics of a config's blocks, for its model or a run's newest checkpoint.

    Args:
      config: names model and blocks.
      run_dir: a run's folder; None for the model itself.

    Raises:
      InputError: something in the config does not exist or does not fit.
    """
    from jaxrl_post.training.checkpoints import load_policy, newest_step

    check_model_name(config)  # first: a wrong name shows before weights load
    tasks = open_tasks(config)
    done = 0 if run_dir is None else newest_step(run_dir)
    now = TrainerState(done, config.total_steps)
    with JudgePool(config.run.judge_workers, timeout=config.task.judge_timeout) as pool:
        rehearse(pool, {f"evaluation.{n}": task for n, task in tasks.items()}, now)
        mesh = open_mesh(config, trains=False)
        if run_dir is None:
            policy, params, tokenizer = open_model(config, mesh)
        else:
            policy, params, tokenizer = load_policy(run_dir, mesh)
        evaluator = Evaluator(config, policy, tokenizer, pool, mesh=mesh, tasks=tasks)
        return evaluator(params, now)
