"""The training loop: steps, evaluations and checkpoints, in a folder of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.isolation import JudgePool
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.tasks import Task
from jaxrl_post.training import run_folder
from jaxrl_post.training.assembly import cut_batch, make_batch
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.config import Config
from jaxrl_post.training.demonstrations import DemonstrationStore
from jaxrl_post.training.evaluation import Evaluator
from jaxrl_post.training.metrics import MetricsWriter, replace_text
from jaxrl_post.training.optimizer import make_optimizer, make_schedule
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.rollout import Collector, Moment, completion_rows
from jaxrl_post.training.run_folder import Interrupted as Interrupted
from jaxrl_post.training.setup import open_mesh, open_model, open_sampler, open_task
from jaxrl_post.training.stages import Stage, make_stages, stage_of
from jaxrl_post.training.state import TrainState, init_state, merge_params
from jaxrl_post.training.teacher_accuracy import teacher_accuracy, teacher_params
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
      recipe: in place of the one that the config names, where it has no stages.
      progress: makes the display, called with the steps in all and those done.

    Raises:
      InputError: something in the config does not exist or does not fit.
      Interrupted: after SIGINT or SIGTERM, when everything is saved.
    """
    stages = make_stages(config, recipe)
    if config.run.dir is None:
        raise InputError("run.dir: a run needs a folder; name one.")
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        stack.enter_context(run_folder.owned(run_dir))
        run_folder.check_unchanged(run_dir, config)
        if row := run_folder.final_row(run_dir, stages[-1].last):
            return RunResult(run_dir, None, row)
        signals = stack.enter_context(run_folder.signals())
        timeout = max(stage.config.task.judge_timeout for stage in stages)
        pool = stack.enter_context(JudgePool(config.run.judge_workers, timeout=timeout))
        whole = _Run(config, stages, run_dir, pool)
        stack.callback(whole.checkpoints.close)
        return whole.train(signals, progress)


class _Run:
    """The model, the stages that train it one after the other, and the run's folder."""

    def __init__(
        self, config: Config, stages: Sequence[Stage], run_dir: Path, pool: JudgePool
    ) -> None:
        self.config, self.stages, self.dir = config, stages, run_dir
        # What costs nothing is opened first: a wrong name shows before weights load.
        tasks = [_open_task(stage) for stage in stages]
        meshes = [open_mesh(stage.config) for stage in stages]
        mesh = meshes[0]
        self.policy, self.params, self.tokenizer = open_model(config, mesh)
        self.trainers = [
            _Trainer(stage, task, self.policy, self.tokenizer, pool, mesh, run_dir)
            for stage, task in zip(stages, tasks, strict=True)
        ]
        self.evaluator = Evaluator(config, self.policy, self.tokenizer, pool, mesh=mesh)
        self.checkpoints = Checkpoints(run_dir, keep=config.training.keep_checkpoints)

    def train(
        self, signals: run_folder.Signals, progress: Callable[..., Progress]
    ) -> RunResult:
        """All steps that are not done yet."""
        steps = self.stages[-1].last
        state, current = self._open_state()
        first = int(state.step)
        replace_text(self.dir / "config.yaml", self.config.to_yaml())
        resumed = first if self.checkpoints.latest() is not None else -1
        with (
            MetricsWriter(self.dir, resumed_step=resumed) as writer,
            progress(steps, first) as display,
        ):
            row: dict[str, Any] = {"step": first}
            if resumed < 0:
                display.message("\n".join(map(str, self.stages)))
                for store in [t.store for t in self.trainers if t.store]:
                    display.message(str(store))
                    row |= store.metrics
                row |= self._evaluate(state)
                writer.write(row)
                display.update(0, row)
                self._stop_if_asked(signals, state)
            else:
                display.message(f"resuming after step {first}")
            for trainer in self.trainers[current:]:
                stage, training = trainer.stage, trainer.config.training
                if stage is not self.stages[current]:
                    state = stage.begin(state, trainer.optimizer, len(trainer.task))
                every = training.evaluate_every
                for step in range(int(state.step) + 1, stage.last + 1):
                    state, row = trainer.step(state, step)
                    last = step == stage.last
                    if last or (every and step % every == 0):
                        row |= self._evaluate(state)
                    # The row is on disk before the checkpoint that makes it final.
                    writer.write(row)
                    display.update(step, row)
                    trainer.check_skips(state, step)
                    if last or step % training.checkpoint_every == 0:
                        self.checkpoints.save(state)
                    if step != steps:
                        self._stop_if_asked(signals, state)
        models.save(
            self.policy,
            merge_params(state.trainable, state.frozen),
            self.tokenizer,
            self.dir / run_folder.MODEL,
            overwrite=True,
        )
        return RunResult(self.dir, state, row)

    def _open_state(self) -> tuple[TrainState, int]:
        """The state to go on from, and the index of the stage that it belongs to."""
        saved = self.checkpoints.latest()
        current = stage_of(self.stages, saved or 0)
        key = jax.random.key(self.config.run.seed)
        trainer = self.trainers[current]
        state = init_state(
            self.params,
            trainer.optimizer,
            trainer.recipe,
            key,
            questions=len(trainer.task),
        )
        del self.params  # updates donate them
        if saved is not None:
            state = self.checkpoints.restore(state)
        return state, current

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


_OF_TEACHER = 1 << 30
"""Folded into a step's key for the teacher's answers; sampling rounds count from 0."""


class _Trainer:
    """What makes the steps of one stage."""

    def __init__(
        self,
        stage: Stage,
        task: Task,
        policy: Policy,
        tokenizer: Any,
        pool: JudgePool,
        mesh: jax.sharding.Mesh | None,
        run_dir: Path,
    ) -> None:
        self.stage, self.config, self.recipe = stage, stage.config, stage.recipe
        self.task, self.policy, self.tokenizer = task, policy, tokenizer
        self.pool, self.mesh, self.dir = pool, mesh, run_dir
        config, recipe, training = stage.config, stage.recipe, stage.config.training
        self.sampler = sampler = open_sampler(
            self.policy, self.tokenizer, config.sampling, config.task.max_prompt_length
        )
        self.store = None
        if recipe.demonstrations:
            self.store = DemonstrationStore(
                task,
                tokenizer,
                pool,
                max_new_tokens=config.sampling.max_new_tokens,
                chat_template_arguments=config.model.chat_template_arguments,
                key=stage.key("task"),
            )
        self.collector = Collector(
            config,
            task,
            recipe,
            sampler,
            self.tokenizer,
            pool,
            demonstrations=self.store,
            mesh=self.mesh,
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

    def step(self, state: TrainState, step: int):
        """One rollout batch and its updates.

        The device's numbers are fetched after the host's own work of the step is done,
        so that neither waits while the other could go on.
        """
        training = self.config.training
        start = time.perf_counter()
        params = merge_params(state.trainable, state.frozen)
        collected = self.collector.collect(
            params,
            jax.random.fold_in(state.rng, step),
            Moment(
                step=step,
                progress=(step - 1 - self.stage.first) / training.steps,
                cursor=int(state.cursor),
                posterior=state.gate,
            ),
        )
        groups, row = collected.groups, collected.metrics
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
            row |= self._ask_teacher(state, step, groups, teacher)
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
        gate, state = state.gate, state.replace(gate=None)  # the host's
        updates = []
        for part in cut_batch(batch, training.updates_per_step):
            state, metrics = self.update(state, part)
            updates.append(metrics)
        self._write_completions(step, groups, batch.advantages)
        updates = jax.device_get(updates)
        learned = any(not u["update/skipped"] for u in updates)
        state = state.replace(
            step=jnp.asarray(step, jnp.int32),
            cursor=jnp.asarray(collected.cursor, jnp.int32),
            gate=collected.posterior if learned else gate,
        )
        update_time = time.perf_counter() - begun
        row = {
            "step": step,
            **self.stage.metrics,
            **row,
            **{name: np.mean([u[name] for u in updates]) for name in updates[0]},
            "time/update": update_time,
            "time/step": time.perf_counter() - start,
            "throughput/trained_tokens_per_second": float(
                batch.token_mask.sum() / update_time
            ),
        }
        return state, row

    def _ask_teacher(self, state: TrainState, step: int, groups, contexts):
        training, every = self.config.training, self.config.training.evaluate_every
        ends = (self.stage.first + 1, self.stage.last)
        due = step in ends or (every and step % every == 0)
        params = teacher_params(self.recipe, state)
        if not (training.teacher_samples and due) or params is None:
            return {}
        start = time.perf_counter()
        key = jax.random.fold_in(jax.random.fold_in(state.rng, step), _OF_TEACHER)
        metrics = teacher_accuracy(
            params,
            groups,
            contexts,
            self.sampler,
            self.tokenizer,
            self.task,
            self.pool,
            samples=training.teacher_samples,
            key=key,
            mesh=self.mesh,
        )
        return {**metrics, "time/teacher": time.perf_counter() - start}

    def check_skips(self, state: TrainState, step: int) -> None:
        """Ends a run that learns nothing any more."""
        skipped, limit = int(state.skipped), self.config.training.max_skipped_updates
        if skipped >= limit:
            raise RuntimeError(
                f"step {step}: the gradients of the last {skipped} updates were not "
                f"finite ({self.stage.key('training.max_skipped_updates')}={limit}). "
                "The parameters are those before them; lower optimizer.learning_rate "
                "and begin in another run.dir."
            )

    def _write_completions(self, step: int, groups, advantages) -> None:
        per_group = advantages.reshape(-1, groups.rewards.shape[1])[: len(groups)]
        folder = self.dir / "completions"
        folder.mkdir(exist_ok=True)
        rows = completion_rows(step, groups, per_group)
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        replace_text(folder / f"step_{step:06d}.jsonl", text)


def _open_task(stage: Stage) -> Task:
    section = stage.config.task
    return open_task(section.name, section.split, section.options, stage.key("task"))
