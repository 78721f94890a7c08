"""The training loop: steps, evaluations and checkpoints, in a folder of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import models, recipes
from jaxrl_post.errors import InputError
from jaxrl_post.isolation import JudgePool
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.training import run_folder
from jaxrl_post.training.assembly import cut_batch, make_batch
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.config import Config
from jaxrl_post.training.evaluation import Evaluator
from jaxrl_post.training.metrics import MetricsWriter, replace_text
from jaxrl_post.training.optimizer import make_optimizer, make_schedule
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.rollout import Collector, completion_rows
from jaxrl_post.training.run_folder import Interrupted as Interrupted
from jaxrl_post.training.setup import open_mesh, open_model, open_sampler, open_task
from jaxrl_post.training.state import TrainState, init_state, merge_params
from jaxrl_post.training.teacher_contexts import make_teacher_contexts
from jaxrl_post.training.update import make_score_step, make_update_step


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
      dir: its folder.
      state: the last state; None where the run had been finished before.
      last_row: the last row of its metrics.
    """

    dir: Path
    state: TrainState | None
    last_row: Mapping[str, Any]


def run(
    config: Config,
    *,
    recipe: Recipe | None = None,
    progress: Callable[..., Progress] = Progress,
) -> RunResult:
    """Trains as a config says, or resumes its folder; does nothing if that is finished.

    Args:
      config: with `run.dir` set, as `load_config` returns it.
      recipe: in place of the one that the config names.
      progress: makes the display, called with the steps in all and those done.

    Raises:
      InputError: something in the config does not exist or does not fit.
      Interrupted: after SIGINT or SIGTERM, when everything is saved.
    """
    if config.stages:
        raise InputError("stages: this version trains configs of one stage.")
    recipe = recipe or recipes.make(config.recipe.name, **config.recipe.arguments)
    if "teacher" in recipe.needs and recipe.reprompt is None:
        raise InputError(
            f"recipe {recipe.name!r} has a term that needs a teacher, but no reprompt "
            "that says what the teacher sees; give it one, such as Reprompt()."
        )
    if config.run.dir is None:
        raise InputError("run.dir: a run needs a folder; name one.")
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        stack.enter_context(run_folder.owned(run_dir))
        run_folder.check_unchanged(run_dir, config)
        if row := run_folder.final_row(run_dir, config.training.steps):
            return RunResult(run_dir, None, row)
        signals = stack.enter_context(run_folder.signals())
        pool = stack.enter_context(
            JudgePool(config.run.judge_workers, timeout=config.task.judge_timeout)
        )
        trainer = _Trainer(config, recipe, run_dir, pool)
        stack.callback(trainer.checkpoints.close)
        return trainer.run(signals, progress)


class _Trainer:
    """The parts of a run, and the loop over its steps."""

    def __init__(
        self, config: Config, recipe: Recipe, run_dir: Path, pool: JudgePool
    ) -> None:
        self.config, self.recipe, self.dir = config, recipe, run_dir
        training = config.training
        # What costs nothing is opened first: a wrong name shows before weights load.
        task = open_task(
            config.task.name, config.task.split, config.task.options, "task"
        )
        self.mesh = open_mesh(config)
        self.policy, self.params, self.tokenizer = open_model(config, self.mesh)
        sampler = open_sampler(
            self.policy, self.tokenizer, config.sampling, config.task.max_prompt_length
        )
        self.collector = Collector(
            config, task, recipe, sampler, self.tokenizer, pool, mesh=self.mesh
        )
        self.evaluator = Evaluator(
            config, self.policy, self.tokenizer, pool, mesh=self.mesh
        )
        updates = training.steps * training.updates_per_step
        self.schedule = make_schedule(config.optimizer, updates)
        self.optimizer = make_optimizer(config.optimizer, updates, recipe.information)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "micro_batch_tokens": training.micro_batch_tokens,
            "chunk_size": training.chunk_size,
            "temperature": config.sampling.temperature,
        }
        self.update = make_update_step(self.policy, recipe, self.optimizer, **options)
        self.score = make_score_step(self.policy, **options)
        self.checkpoints = Checkpoints(run_dir, keep=training.keep_checkpoints)

    def run(
        self, signals: run_folder.Signals, progress: Callable[..., Progress]
    ) -> RunResult:
        """All steps that are not done yet."""
        steps, every = self.config.training.steps, self.config.training.evaluate_every
        state = self._open_state()
        first = int(state.step)
        replace_text(self.dir / "config.yaml", self.config.to_yaml())
        resumed = first if self.checkpoints.latest() is not None else -1
        with (
            MetricsWriter(self.dir, resumed_step=resumed) as writer,
            progress(steps, first) as display,
        ):
            row: dict[str, Any] = {"step": first}
            if resumed < 0:
                display.message(str(self.recipe))
                row |= self._evaluate(state)
                writer.write(row)
                display.update(0, row)
                self._stop_if_asked(signals, state)
            else:
                display.message(f"resuming after step {first}")
            for step in range(first + 1, steps + 1):
                state, row = self._step(state, step)
                last = step == steps
                if last or (every and step % every == 0):
                    row |= self._evaluate(state)
                # The row is on disk before the checkpoint that makes it final.
                writer.write(row)
                display.update(step, row)
                self._check_skips(state, step)
                if last or step % self.config.training.checkpoint_every == 0:
                    self.checkpoints.save(state)
                if not last:
                    self._stop_if_asked(signals, state)
        models.save(
            self.policy,
            merge_params(state.trainable, state.frozen),
            self.tokenizer,
            self.dir / run_folder.MODEL,
            overwrite=True,
        )
        return RunResult(self.dir, state, row)

    def _open_state(self) -> TrainState:
        key = jax.random.key(self.config.run.seed)
        state = init_state(self.params, self.optimizer, self.recipe, key)
        del self.params  # updates donate them
        if self.checkpoints.latest() is not None:
            state = self.checkpoints.restore(state)
        return state

    def _step(self, state: TrainState, step: int):
        """One rollout batch and its updates.

        The device's numbers are fetched after the host's own work of the step is done,
        so that neither waits while the other could go on.
        """
        training = self.config.training
        start = time.perf_counter()
        params = merge_params(state.trainable, state.frozen)
        groups, cursor, row = self.collector.collect(
            params, jax.random.fold_in(state.rng, step), int(state.cursor)
        )
        teacher = None
        if self.recipe.reprompt is not None:
            teacher = make_teacher_contexts(
                groups,
                self.recipe.reprompt,
                self.tokenizer,
                np.random.default_rng((self.config.run.seed, step)),
                chat_template_arguments=self.config.model.chat_template_arguments,
            )
            row |= teacher.metrics
        batch = make_batch(
            groups,
            self.recipe,
            count=training.prompts_per_step,
            context_limit=self.config.task.max_prompt_length,
            teacher=teacher,
        )
        begun = time.perf_counter()
        if training.updates_per_step > 1:
            batch = batch.replace(old_logps=self.score(params, batch))
        row["learning_rate"] = float(self.schedule(int(state.update)))
        updates = []
        for part in cut_batch(batch, training.updates_per_step):
            state, metrics = self.update(state, part)
            updates.append(metrics)
        state = state.replace(
            step=jnp.asarray(step, jnp.int32), cursor=jnp.asarray(cursor, jnp.int32)
        )
        self._write_completions(step, groups, batch.advantages)
        updates = jax.device_get(updates)
        update_time = time.perf_counter() - begun
        row = {
            "step": step,
            **row,
            **{name: np.mean([u[name] for u in updates]) for name in updates[0]},
            "time/update": update_time,
            "time/step": time.perf_counter() - start,
            "throughput/trained_tokens_per_second": float(
                batch.token_mask.sum() / update_time
            ),
        }
        return state, row

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        if not self.config.evaluation:
            return {}
        start = time.perf_counter()
        metrics = self.evaluator(merge_params(state.trainable, state.frozen))
        return {**metrics, "time/evaluate": time.perf_counter() - start}

    def _stop_if_asked(self, signals: run_folder.Signals, state: TrainState) -> None:
        if signals.received:
            self.checkpoints.save(state)
            self.checkpoints.wait()
            raise Interrupted(signals.received)

    def _check_skips(self, state: TrainState, step: int) -> None:
        skipped, limit = int(state.skipped), self.config.training.max_skipped_updates
        if skipped >= limit:
            raise RuntimeError(
                f"step {step}: the gradients of the last {skipped} updates were not "
                f"finite (training.max_skipped_updates={limit}). The parameters are "
                "those before them; lower optimizer.learning_rate and begin in another "
                "run.dir."
            )

    def _write_completions(self, step: int, groups, advantages) -> None:
        per_group = advantages.reshape(-1, groups.rewards.shape[1])[: len(groups)]
        folder = self.dir / "completions"
        folder.mkdir(exist_ok=True)
        rows = completion_rows(step, groups, per_group)
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        replace_text(folder / f"step_{step:06d}.jsonl", text)
