"""One step: a rollout batch, its updates, and what is written of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.isolation import JudgePool
from jaxrl_post.models.policy import Policy
from jaxrl_post.recipes.batch import Batch
from jaxrl_post.recipes.groups import Groups
from jaxrl_post.sharding import processes
from jaxrl_post.tasks import Task
from jaxrl_post.tasks.rewards import TrainerState
from jaxrl_post.training import faults
from jaxrl_post.training.assembly import cut_batch, make_batch
from jaxrl_post.training.completions import completion_rows, completions_file
from jaxrl_post.training.demonstrations import DemonstrationStore
from jaxrl_post.training.flops import Utilisation
from jaxrl_post.training.judging import tell
from jaxrl_post.training.loss import Metrics
from jaxrl_post.training.memory import peak_memory
from jaxrl_post.training.metrics import replace_text
from jaxrl_post.training.moment import Collected, Moment
from jaxrl_post.training.optimizer import make_schedule, takes
from jaxrl_post.training.replay import Replay
from jaxrl_post.training.rollout import Collector
from jaxrl_post.training.setup import micro_batch_bound, open_sampler, slots_bound
from jaxrl_post.training.stages import Stage
from jaxrl_post.training.state import TrainState, copy_params, merge_params
from jaxrl_post.training.teacher_accuracy import teacher_accuracy, teacher_params
from jaxrl_post.training.teacher_contexts import make_teacher_contexts
from jaxrl_post.training.token_scores import TokenScores, token_texts
from jaxrl_post.training.turns import turns_of
from jaxrl_post.training.update import make_score_step, make_update_step


@dataclass(frozen=True)
class _Counts:
    """Numbers of a state that the host knows without asking the device.

    Attributes:
      cursor, update, skipped: as in `TrainState`.
    """

    cursor: int
    update: int
    skipped: int


@dataclass(frozen=True)
class _Updates:
    """A step's updates, under way on the device.

    Attributes:
      state: after them.
      parts: of the batch, one for each update.
      metrics: of each.
      begun: when, by `time.perf_counter`.
    """

    state: TrainState
    parts: list[Batch]
    metrics: list[Metrics]
    begun: float


_OF_TEACHER = 1 << 30
"""Folded into a step's key for the teacher's answers; sampling rounds count from 0."""


class Trainer:
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
        self._counts: _Counts | None = None  # of the state after the step before
        self._ahead: dict[int, Collected] = {}  # by the step that they are for
        config, recipe, training = stage.config, stage.recipe, stage.config.training
        longest = config.task.max_prompt_length
        if turns_of(task) > 1:  # the turns before are context too
            longest += config.sampling.max_new_tokens
        self.sampler = sampler = open_sampler(
            self.policy,
            self.tokenizer,
            config.sampling,
            longest,
            slots=slots_bound(config.sampling, mesh),
        )
        self.store = None
        if recipe.demonstrations:
            tell(task, TrainerState(stage.first, stage.last))
            self.store = DemonstrationStore(
                task,
                tokenizer,
                pool,
                max_new_tokens=config.sampling.max_new_tokens,
                chat_template_arguments=config.model.chat_template_arguments,
                key=stage.key("task"),
            )
        self.collector: Collector | Replay
        if config.run.replay is not None:
            self.collector = Replay(config, task, recipe)
        else:
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
        self.optimizer = stage.optimizer
        if not recipe.learns:
            return
        updates = training.steps * training.updates_per_step
        self.schedule = None
        if takes(config.optimizer, "learning_rate"):
            self.schedule = make_schedule(config.optimizer, updates)
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "micro_batch_tokens": micro_batch_bound(training, mesh),
            "chunk_size": training.chunk_size,
            "temperature": config.sampling.temperature,
        }
        self.update = make_update_step(
            self.policy,
            recipe,
            self.optimizer,
            spike_deviations=training.spike_deviations,
            router_aux_loss_coef=config.model.router_aux_loss_coef,
            **options,
        )
        self.score = make_score_step(self.policy, **options)
        self.utilisation = Utilisation(config, policy, recipe, mesh)
        self.token_scores = None
        if training.teacher_tokens and recipe.reprompt and "teacher" in recipe.needs:
            del options["micro_batch_tokens"]  # it scores a handful
            self.token_scores = TokenScores(self.policy, recipe, **options)

    @property
    def questions(self) -> int | None:
        """How many the task has, where the recipe remembers each of them."""
        return None if self.recipe.posterior_discount is None else len(self.task)

    def step(self, state: TrainState, step: int):
        """One rollout batch and its updates.

        The device's numbers are fetched after the host's own work of the step is done,
        so that neither waits while the other could go on: once, and the host waits for
        the device nowhere else but in sampling.

        With `training.steps_off_policy` the next step's completions are sampled first,
        from the parameters before the updates, and judged while the device makes these.
        (Behind the updates the sampling would gain nothing: a device runs one program
        at a time.) They are not saved: a run that goes on from a checkpoint samples
        them again, from `TrainState.previous`, and so comes to the same bits.
        """
        training = self.config.training
        start = time.perf_counter()
        if self._counts is None:
            counts = jax.device_get((state.cursor, state.update, state.skipped))
            self._counts = _Counts(*map(int, counts))
        collected = self._ahead.pop(step, None)
        if collected is None:
            params, cursor = state.sampled_from, self._counts.cursor
            collected = self._collect(params, state, step, cursor)
        groups, row = collected.groups, collected.metrics
        if step == self.stage.first + 1 and row.get("reward/unjudged") == 1:
            raise _nothing_judged(step, groups)
        row = {"step": step, **self.stage.metrics, **row}
        if self.stage.off_policy:
            row["sampling/staleness"] = float(step > self.stage.first + 1)
        if not self.recipe.learns:
            unread = np.zeros_like(groups.rewards)
            processes.on_main(
                partial(self._write_completions, step, groups, unread, {})
            )
            state = self._count(state, step, collected.cursor)
            self._counts = replace(self._counts, cursor=collected.cursor)
            return state, {**row, "time/step": time.perf_counter() - start}
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
        rate = {}
        if self.schedule is not None:
            rate["learning_rate"] = self.schedule(self._counts.update)
        shown: Mapping[int, Mapping[str, Any]] = {}
        if self.token_scores and self._is_shown(step):
            shown = self.token_scores(state, batch, groups.rewards)
        begun: list[_Updates] = []

        def begin() -> chex.ArrayTree:
            begun.append(self._begin_updates(state, batch))
            return begun[0].state.sampled_from

        if self.stage.off_policy and step < self.stage.last:
            params = merge_params(state.trainable, state.frozen)
            self._ahead[step + 1] = self._collect(
                params, state, step + 1, collected.cursor, begin
            )
        else:
            begin()
        (work,) = begun
        # Written while the devices work.
        written = partial(
            self._write_completions, step, groups, batch.advantages, shown
        )
        processes.on_main(written)
        updates, rate, skipped = jax.device_get(
            (work.metrics, rate, work.state.skipped)
        )
        of_parts = zip(work.parts, updates, strict=True)
        for number, (part, metrics) in enumerate(of_parts, start=1):
            if metrics["update/skipped"]:
                processes.on_main(
                    partial(faults.save_batch, self.dir, step, number, part, metrics)
                )
        learned = any(not u["update/skipped"] for u in updates)
        gate = collected.posterior if learned else state.gate
        state = self._count(work.state, step, collected.cursor).replace(gate=gate)
        done = self._counts.update + len(updates)
        self._counts = _Counts(collected.cursor, done, int(skipped))
        now = time.perf_counter()
        update_time, step_time = now - work.begun, now - start
        row = {
            **row,
            **{name: float(value) for name, value in rate.items()},
            **{name: np.mean([u[name] for u in updates]) for name in updates[0]},
            "time/update": update_time,
            "time/step": step_time,
            "throughput/trained_tokens_per_second": float(
                batch.token_mask.sum() / update_time
            ),
            **self.utilisation(state, batch, update_time, step_time),
            **peak_memory(),
        }
        return state, row

    def _collect(
        self,
        params: chex.ArrayTree,
        state: TrainState,
        step: int,
        cursor: int,
        meanwhile: Callable[[], chex.ArrayTree] | None = None,
    ) -> Collected:
        """The groups of a step, whose prompts begin at the cursor."""
        tell(self.task, TrainerState(step - 1, self.stage.last))
        moment = Moment(
            step=step,
            progress=(step - 1 - self.stage.first) / self.config.training.steps,
            cursor=cursor,
            posterior=state.gate,
        )
        key = jax.random.fold_in(state.rng, step)
        return self.collector.collect(params, key, moment, meanwhile)

    def _begin_updates(self, state: TrainState, batch: Batch) -> _Updates:
        """Has the device make the updates; does not wait for it."""
        begun = time.perf_counter()
        count = self.config.training.updates_per_step
        if count > 1:
            params = merge_params(state.trainable, state.frozen)
            old = processes.fetch(self.score(params, batch))
            batch = batch.replace(old_logps=old)
        previous = None
        if self.stage.off_policy:
            jax.tree.map(lambda x: x.delete(), state.previous)  # room for the next
            previous = copy_params(state.trainable)
        state = state.replace(previous=None, gate=None)  # no update reads them
        parts, metrics = cut_batch(batch, count), []
        for part in parts:
            state, of_part = self.update(state, part)
            metrics.append(of_part)
        return _Updates(state.replace(previous=previous), parts, metrics, begun)

    def has_succeeded(self, row: Mapping[str, Any]) -> bool:
        """Whether a step's row counts a success.

        Raises:
          InputError: the judge does not say what is one.
        """
        if "reward/success" not in row and row["reward/unjudged"] < 1:
            key = self.stage.key("training.stop_at_success")
            raise InputError(
                f"{key}: the judge of task {self.task.name!r} gives rewards but does "
                "not say what a success is; have it set Verdict.success."
            )
        return row.get("reward/success", 0.0) > 0

    def _count(self, state: TrainState, step: int, cursor: int) -> TrainState:
        counts = [jnp.asarray(n, jnp.int32) for n in (step, cursor)]
        now, drawn = processes.replicate(counts, self.mesh)
        return state.replace(step=now, cursor=drawn)

    def _is_shown(self, step: int) -> bool:
        """Whether the step is the stage's first or last, or one that is evaluated."""
        every = self.config.training.evaluate_every
        ends = (self.stage.first + 1, self.stage.last)
        return step in ends or bool(every and step % every == 0)

    def _ask_teacher(self, state: TrainState, step: int, groups, contexts):
        training = self.config.training
        params = teacher_params(self.recipe, state)
        if not (training.teacher_samples and self._is_shown(step)) or params is None:
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
            chat_template_arguments=self.config.model.chat_template_arguments,
        )
        return {**metrics, "time/teacher": time.perf_counter() - start}

    def check_skips(self, step: int) -> None:
        """Ends a run that learns nothing any more, after this step."""
        limit = self.config.training.max_skipped_updates
        key = self.stage.key("training.max_skipped_updates")
        assert self._counts is not None  # a step was made
        faults.stop_if_stuck(self._counts.skipped, step, limit, key)

    def _write_completions(self, step: int, groups, advantages, shown) -> None:
        per_group = advantages.reshape(-1, groups.rewards.shape[1])[: len(groups)]
        path = completions_file(self.dir, step)
        path.parent.mkdir(exist_ok=True)
        rows = completion_rows(step, groups, per_group)
        for row, scores in shown.items():
            pieces = token_texts(self.tokenizer, rows[row]["response_ids"])
            rows[row] |= {"pieces": pieces, **scores}
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        replace_text(path, text)


def _nothing_judged(step: int, groups: Groups) -> InputError:
    """A judge that fails at all of the first completions is wrong, not unlucky."""
    reasons = [v.extra.get("error") for row in groups.verdicts for v in row]
    reason = next(filter(None, reasons), "it gave none a reward")
    return InputError(
        f"The judge could judge none of the {len(reasons)} completions of step {step}: "
        f"{reason}. Try it on a few answers of your own first."
    )
