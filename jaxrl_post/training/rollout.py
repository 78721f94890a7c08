"""Drawing prompts until a step has its groups: sample, judge, transform."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.generation import Sampler, decode_responses, encode_prompts
from jaxrl_post.isolation import JudgePool
from jaxrl_post.recipes.groups import Groups, concatenate
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.tasks import Task
from jaxrl_post.training.assembly import group_metrics, make_groups
from jaxrl_post.training.config import Config
from jaxrl_post.training.widths import fit_width, pad_left


class Collector:
    """Makes the groups of a step.

    A round draws as many prompts as groups are missing, samples and judges them and
    applies the recipe's group transforms. Prompts that are too long, and groups that a
    transform drops, leave places that the next round fills.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        recipe: Recipe,
        sampler: Sampler,
        tokenizer: Any,
        pool: JudgePool,
        *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self._config, self._task, self._recipe = config, task, recipe
        self._sampler, self._tokenizer, self._pool = sampler, tokenizer, pool
        self._mesh = mesh

    def collect(
        self, params: chex.ArrayTree, key: jax.Array, cursor: int
    ) -> tuple[Groups, int, dict[str, float]]:
        """The groups of one step.

        Args:
          params: to sample from.
          key: of this step.
          cursor: prompts drawn before.

        Returns:
          At most `prompts_per_step` groups (fewer only where the recipe's rounds are
          used up), the new cursor, and metrics of everything that was sampled.

        Raises:
          InputError: too many prompts are too long, or none fits.
        """
        wanted = self._config.training.prompts_per_step
        rounds = self._recipe.max_sampling_rounds
        kept: list[Groups] = []
        sampled: list[Groups] = []
        times = {"time/generate": 0.0, "time/judge": 0.0}
        dropped = round_ = 0
        while True:
            missing = wanted - sum(map(len, kept))
            prompts = self._task.prompts(self._config.run.seed, cursor, missing)
            cursor += missing
            encoded = self._encode(prompts)
            dropped += len(encoded.dropped)
            if len(encoded.prompts):
                groups = self._sample(
                    params, jax.random.fold_in(key, round_), encoded, missing, times
                )
                sampled.append(groups)
                for transform in self._recipe.group_transforms:
                    groups = transform(groups)
                if len(groups):
                    kept.append(groups)
            round_ += 1
            if sum(map(len, kept)) == wanted or round_ == rounds:
                break
        if not sampled:
            raise InputError(
                f"All {dropped} prompts drawn for a step are longer than "
                f"task.max_prompt_length={self._config.task.max_prompt_length} tokens."
            )
        everything = concatenate(sampled)
        tokens = int(everything.lengths.sum())
        metrics = {
            **group_metrics(everything),
            **times,
            "sampling/rounds": float(round_),
            "sampling/dropped_prompts": float(dropped),
            "sampling/kept_groups": float(sum(map(len, kept))),
            "throughput/generated_tokens_per_second": tokens / times["time/generate"],
        }
        # Where every group was dropped one of them stays, to give the batch its form;
        # without variance it trains nothing.
        groups = concatenate(kept) if kept else sampled[0].take([0])
        return groups, cursor, metrics

    def _encode(self, prompts):
        task = self._config.task
        return encode_prompts(
            self._tokenizer,
            prompts,
            max_prompt_length=task.max_prompt_length,
            max_dropped_share=task.max_dropped_share,
            multiple=1,
            chat_template_arguments=self._config.model.chat_template_arguments,
        )

    def _sample(self, params, key, encoded, count: int, times) -> Groups:
        start = time.perf_counter()
        limit, size = (
            self._config.task.max_prompt_length,
            self._config.training.group_size,
        )
        width = fit_width(encoded.contexts.shape[1], limit)
        contexts = pad_left(encoded.contexts, width)
        mask = pad_left(encoded.context_mask, width)
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            rollouts = self._sampler.generate(
                params, contexts, mask, group_size=size, key=key
            )
        times["time/generate"] += time.perf_counter() - start

        start = time.perf_counter()
        texts = decode_responses(self._tokenizer, rollouts.tokens, rollouts.mask)
        rows = np.repeat(np.arange(len(encoded.prompts)), size).tolist()
        verdicts = self._pool.judge(self._task.judge, encoded.prompts.take(rows), texts)
        times["time/judge"] += time.perf_counter() - start
        return make_groups(encoded.prompts, contexts, mask, rollouts, texts, verdicts)


def completion_rows(
    step: int, groups: Groups, advantages: np.ndarray
) -> list[Mapping[str, Any]]:
    """What ``completions/`` keeps of a step: one row per sequence.

    Args:
      step: its number.
      groups: as the batch was made of them.
      advantages: ``[P, G]``.
    """
    rows: list[Mapping[str, Any]] = []
    for p, verdicts in enumerate(groups.verdicts):
        prompt_ids = groups.contexts[p][groups.context_mask[p]].tolist()
        for g, verdict in enumerate(verdicts):
            length = int(groups.mask[p, g].sum())
            rows.append(
                {
                    "step": step,
                    "prompt_id": groups.prompts.ids[p],
                    "prompt": groups.prompts.messages[p][-1]["content"],
                    "response": groups.completions[p][g],
                    "prompt_ids": prompt_ids,
                    "response_ids": groups.tokens[p, g, :length].tolist(),
                    "mask": groups.mask[p, g, :length].astype(int).tolist(),
                    "sampler_logps": [
                        round(float(x), 6) for x in groups.sampler_logps[p, g, :length]
                    ],
                    "reward": verdict.reward,
                    "success": verdict.success,
                    "feedback": verdict.feedback,
                    "advantage": float(advantages[p, g]),
                    "extra": dict(verdict.extra),
                }
            )
    return rows
