"""Training on the completions that another run has saved, without sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.generation import pad_contexts
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.tasks import Task
from jaxrl_post.training.assembly import group_metrics
from jaxrl_post.training.completions import completions_file
from jaxrl_post.training.config import Config
from jaxrl_post.training.moment import Collected, Moment
from jaxrl_post.types import Verdict


class Replay:
    """Stands in the place of a `Collector`: step k's groups are those saved of step k.

    A tool to debug with: what a changed loss makes of the very same completions shows
    in seconds. Verdicts are the saved ones; the recipe's group transforms are applied
    to them. With the config of the run that is replayed, and if none of its groups were
    dropped, the parameters become the same to the bit.
    """

    def __init__(self, config: Config, task: Task, recipe: Recipe) -> None:
        """Looks whether there is something to replay.

        Raises:
          InputError: `run.replay` names no run with completions, or the run's own
            folder, or the recipe trains on demonstrations.
        """
        assert config.run.replay is not None
        self._config, self._task, self._recipe = config, task, recipe
        self._source = Path(config.run.replay)
        self._key = f"run.replay={config.run.replay!r}"
        if recipe.demonstrations:
            raise InputError(
                f"{self._key}: recipe {recipe.name!r} puts demonstrations among the "
                "completions, and saved ones hold them already; replay recipes that "
                "train on rollouts alone."
            )
        if config.run.dir and self._source.resolve() == Path(config.run.dir).resolve():
            raise InputError(
                f"{self._key}: is this run's own folder, whose completions it would "
                "overwrite; choose another run.dir."
            )
        if not completions_file(self._source, 1).is_file():
            raise InputError(f"{self._key}: there are no completions of a step 1.")
        names = task.rows(range(len(task))).ids
        self._rows = {name: i for i, name in enumerate(names)}

    def collect(
        self, params: Any, key: Any, moment: Moment, meanwhile: Any = None
    ) -> Collected:
        """The groups of one step; nothing is sampled, so only `moment` is used.

        Raises:
          InputError: the step was not saved, or does not fit the config.
        """
        del params, key, meanwhile
        groups = self._read(moment.step)
        metrics = group_metrics(groups)
        seed = np.random.SeedSequence((self._config.run.seed, moment.step, 0))
        groups = replace(
            groups, progress=moment.progress, seed=int(seed.generate_state(1)[0])
        )
        last = groups
        for transform in self._recipe.group_transforms:
            if not len(groups):
                break
            last, groups = groups, transform(groups)
        groups = groups if len(groups) else last.take([0])
        metrics |= {name: float(np.mean(x)) for name, x in groups.metrics.items()}
        wanted = self._config.training.prompts_per_step
        return Collected(groups, moment.cursor + wanted, moment.posterior, metrics)

    def _read(self, step: int) -> Groups:
        path = completions_file(self._source, step)
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        except FileNotFoundError:
            raise InputError(
                f"{self._key}: step {step} was not saved; set training.steps to at "
                f"most {step - 1}."
            ) from None
        size, wanted = self._config.training.group_size, len(rows)
        ids = [row["prompt_id"] for row in rows[::size]]
        if wanted % size or any(
            row["prompt_id"] != ids[i // size] for i, row in enumerate(rows)
        ):
            raise InputError(
                f"{path}: its {wanted} completions are no groups of "
                f"training.group_size={size}."
            )
        if len(ids) > self._config.training.prompts_per_step:
            raise InputError(
                f"{path}: has {len(ids)} groups, more than training.prompts_per_step="
                f"{self._config.training.prompts_per_step}."
            )
        if unknown := [name for name in ids if name not in self._rows]:
            raise InputError(
                f"{path}: the task has no question {unknown[0]!r}; replay a run of the "
                "same task."
            )
        return self._groups(rows, [self._rows[name] for name in ids], size)

    def _groups(
        self, rows: Sequence[Mapping[str, Any]], questions: list[int], size: int
    ) -> Groups:
        contexts, context_mask = pad_contexts([r["prompt_ids"] for r in rows[::size]])
        width = self._config.sampling.max_new_tokens
        shape = (len(questions), size)
        rewards = np.array([row["reward"] for row in rows], np.float32)  # None: NaN
        judged = ~np.isnan(rewards)
        verdicts = [
            Verdict(row["reward"], row["success"], row["feedback"], row["extra"])
            for row in rows
        ]

        def tokens(key, dtype):
            padded = np.zeros((len(rows), width), dtype)
            for row, into in zip(rows, padded, strict=True):
                if len(row[key]) > width:
                    raise InputError(
                        f"{self._key}: a completion of {len(row[key])} tokens is "
                        f"longer than sampling.max_new_tokens={width}."
                    )
                into[: len(row[key])] = row[key]
            return padded.reshape(*shape, width)

        def grouped(values):
            return tuple(
                tuple(values[i : i + size]) for i in range(0, len(values), size)
            )

        return Groups(
            prompts=self._task.rows(questions),
            contexts=contexts,
            context_mask=context_mask,
            tokens=tokens("response_ids", np.int32),
            mask=tokens("mask", bool),
            sampler_logps=tokens("sampler_logps", np.float32),
            stopped=np.array([row["stopped"] for row in rows], bool).reshape(shape),
            completions=grouped([row["response"] for row in rows]),
            verdicts=grouped(verdicts),
            rewards=np.where(judged, rewards, 0.0).astype(np.float32).reshape(shape),
            judged=judged.reshape(shape),
            observed=tokens("observed", bool) if "observed" in rows[0] else None,
        )
