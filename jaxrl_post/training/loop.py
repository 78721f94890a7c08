"""The training loop: steps, evaluations and checkpoints, in a folder of their own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.isolation import JudgePool
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.sharding.processes import fetch, gather, is_main, on_main, together
from jaxrl_post.tasks import Task, select
from jaxrl_post.tasks.lookup import is_own
from jaxrl_post.tasks.rewards import TrainerState
from jaxrl_post.training import faults, run_folder
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.config import Config
from jaxrl_post.training.configfile import flat_keys
from jaxrl_post.training.evaluation import Evaluator, open_tasks
from jaxrl_post.training.interruption import Interrupted as Interrupted
from jaxrl_post.training.interruption import Signals, StepGivenUp, signals
from jaxrl_post.training.judging import rehearse
from jaxrl_post.training.metrics import MetricsWriter, replace_text
from jaxrl_post.training.offload import offload
from jaxrl_post.training.own_model import check_model_name, save_own_model
from jaxrl_post.training.progress import Progress
from jaxrl_post.training.provenance import code_version
from jaxrl_post.training.setup import open_mesh, open_model, open_task
from jaxrl_post.training.stages import Stage, make_stages, stage_of
from jaxrl_post.training.state import TrainState, init_state, merge_params
from jaxrl_post.training.trackers import Trackers, check_trackers
from jaxrl_post.training.trainer import Trainer


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
    allow_changes: bool = False,
) -> RunResult:
    """Trains as a config says, or resumes its folder; does nothing if that is finished.

    Args:
      config: with `run.dir` set, as `load_config` returns it.
      recipe: in place of the one that the config names, where it has no stages.
      progress: makes the display, called with the steps in all and those done.
      allow_changes: resume although the config alters the mathematics.

    Raises:
      InputError: something in the config does not exist or does not fit, or the disk
        is full.
      Interrupted: after SIGINT or SIGTERM, when everything is saved.
    """
    stages = make_stages(config, recipe)
    if config.run.dir is None:
        raise InputError("run.dir: a run needs a folder; name one.")
    run_dir = Path(config.run.dir)
    check_trackers(config.tracking)
    with ExitStack() as stack:
        stack.enter_context(run_folder.disk_errors(run_dir))
        _check_alike(config)
        owned = run_folder.owned(run_dir)
        on_main(lambda: stack.enter_context(owned))
        run_folder.check_shared(run_dir)
        changes = on_main(
            lambda: run_folder.check_unchanged(
                run_dir, config, allow_changes=allow_changes
            )
        )
        steps, early = stages[-1].last, config.training.stop_at_success
        if row := on_main(lambda: run_folder.final_row(run_dir, steps, early)):
            return RunResult(run_dir, None, row)
        on_main(lambda: run_folder.clean(run_dir))
        noted = stack.enter_context(signals(config.run.grace_seconds))
        timeout = max(stage.config.task.judge_timeout for stage in stages)
        pool = stack.enter_context(JudgePool(config.run.judge_workers, timeout=timeout))
        try:
            with noted.step():
                whole = together(lambda: _Run(config, stages, run_dir, pool))
        except StepGivenUp:
            raise Interrupted(noted.received or signal.SIGTERM) from None
        stack.push(whole.close)
        return whole.train(noted, progress, changes)


class _Run:
    """The model, the stages that train it one after the other, and the run's folder."""

    def __init__(
        self, config: Config, stages: Sequence[Stage], run_dir: Path, pool: JudgePool
    ) -> None:
        self.config, self.stages, self.dir = config, stages, run_dir
        # What costs nothing is opened first: a wrong name shows before weights load.
        check_model_name(config)
        tasks = [_open_task(stage) for stage in stages]
        measured = open_tasks(config)
        sections = [stage.key("task") for stage in stages]
        rehearse(
            pool,
            dict(zip(sections, tasks, strict=True))
            | {f"evaluation.{name}": task for name, task in measured.items()},
            TrainerState(0, stages[-1].last),
        )
        meshes = [open_mesh(s.config, trains=s.recipe.learns) for s in stages]
        mesh = meshes[0]
        self.policy, self.params, self.tokenizer = open_model(config, mesh)
        self.trainers = [
            Trainer(stage, task, self.policy, self.tokenizer, pool, mesh, run_dir)
            for stage, task in zip(stages, tasks, strict=True)
        ]
        self.evaluator = Evaluator(
            config, self.policy, self.tokenizer, pool, mesh=mesh, tasks=measured
        )
        self.checkpoints = Checkpoints(
            run_dir,
            keep=config.training.keep_checkpoints,
            best=config.training.keep_best,
            about={"code": code_version(), "config": config.to_dict()},
        )

    def train(
        self,
        noted: Signals,
        progress: Callable[..., Progress],
        changes: Sequence[str] = (),
    ) -> RunResult:
        """All steps that are not done yet."""
        steps = self.stages[-1].last
        messages = [f"changed: {line}" for line in changes]
        state, current = self._open_state(messages.append)
        first = int(state.step)
        text = self.config.to_yaml()
        on_main(lambda: replace_text(self.dir / "config.yaml", text))
        saved = self.checkpoints.latest()
        resumed = -1 if saved is None else first
        with (
            _of_main(lambda: MetricsWriter(self.dir, resumed_step=resumed)) as writer,
            _of_main(lambda: progress(steps, first)) as display,
            _of_main(
                lambda: Trackers(self.config, self.dir, first, display.message)
            ) as trackers,
        ):
            row: dict[str, Any] = {"step": first}
            for message in messages:
                display.message(message)
            if saved is None:
                display.message("\n".join(map(str, self.stages)))
                for store in [t.store for t in self.trainers if t.store]:
                    display.message(str(store))
                    row |= store.metrics
                try:
                    with noted.step():
                        row |= self._evaluate(state)
                except StepGivenUp:  # there is no step to save; it is begun anew
                    self._stop(noted.received, state, row, after=-1)
                on_main(partial(writer.write, row))
                trackers.log(row)
                display.update(0, row)
                self._stop_if_asked(noted, state, row)
            else:
                display.message(f"resuming after step {first}")
                code = self.checkpoints.about(saved).get("about", {}).get("code")
                if code != code_version():
                    display.message(f"changed: code: {code} -> {code_version()}")
            early = self.config.training.stop_at_success
            found = early and on_main(lambda: run_folder.succeeded(self.dir))
            for trainer in self.trainers[current:]:
                if found:
                    break
                stage, training = trainer.stage, trainer.config.training
                if stage is not self.stages[current]:
                    state = stage.begin(
                        state, trainer.optimizer, trainer.questions, trainer.mesh
                    )
                every = training.evaluate_every
                for step in range(int(state.step) + 1, stage.last + 1):
                    try:
                        with noted.step():
                            state, row = trainer.step(state, step)
                            found = early and trainer.has_succeeded(row)
                            last = found or step == stage.last
                            if last or (every and step % every == 0):
                                row |= self._evaluate(state)
                    except StepGivenUp:
                        self._stop(noted.received, state, row, after=step - 1)
                    # The row is on disk before the checkpoint that makes it final.
                    on_main(partial(writer.write, row))
                    trackers.log(row)
                    display.update(step, row)
                    if skipped := row.get("update/skipped"):
                        display.message(
                            f"step {step}: {skipped:.0%} of the updates skipped; see "
                            f"{self.dir / faults.FOLDER}"
                        )
                    trainer.check_skips(step)
                    if last or step % training.checkpoint_every == 0:
                        self.checkpoints.save(state, row)
                    if found:
                        break
                    if step != steps:
                        self._stop_if_asked(noted, state, row)
        # The model says that the run is finished: all else is on disk before it.
        self.checkpoints.wait()
        params = merge_params(state.trainable, state.frozen)
        params = jax.tree.map(fetch, params)
        on_main(lambda: self._save_model(params))
        return RunResult(self.dir, state, row)

    def _save_model(self, params: Any) -> None:
        folder = self.dir / run_folder.MODEL
        if is_own(self.config.model.path):
            save_own_model(self.config, params, self.tokenizer, folder)
        else:
            models.save(self.policy, params, self.tokenizer, folder, overwrite=True)

    def close(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Finishes saving, unless it would wait for a process that cannot."""
        if error is None or jax.process_count() == 1:
            self.checkpoints.close()

    def _open_state(self, report: Callable[[str], None]) -> tuple[TrainState, int]:
        """The state to go on from, and the index of the stage that it belongs to."""

        def begun(step: int) -> TrainState:
            number = stage_of(self.stages, step)
            trainer = self.trainers[number]
            trainable, frozen = models.split_adapter(self.params)
            state = init_state(
                trainable,
                trainer.optimizer,
                trainer.recipe,
                jax.random.key(self.config.run.seed),
                frozen=frozen,
                reference={} if frozen and not number else None,
                questions=trainer.questions,
                spike_window=trainer.stage.spike_window,
                off_policy=trainer.stage.off_policy,
                mesh=trainer.mesh,
            )
            return offload(state, trainer.config.training.offload)

        state = self.checkpoints.resume(begun, report)
        state = begun(0) if state is None else state
        del self.params  # updates donate them
        return state, stage_of(self.stages, int(state.step))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        if not self.config.evaluation:
            return {}
        start = time.perf_counter()
        now = TrainerState(int(state.step), self.stages[-1].last)
        metrics = self.evaluator(merge_params(state.trainable, state.frozen), now)
        return {**metrics, "time/evaluate": time.perf_counter() - start}

    def _stop_if_asked(self, noted: Signals, state: TrainState, row: Mapping) -> None:
        step = row["step"]
        preempted = self.checkpoints.preempted(step)
        own = noted.received or (signal.SIGTERM if preempted else 0)
        if signum := max(gather(lambda: own)):
            self._stop(signum, state, row, after=step)

    def _stop(
        self, signum: int | None, state: TrainState, row: Mapping, *, after: int
    ) -> NoReturn:
        """Saves the state after a step and ends the run.

        Where the state is gone, for an update has begun to change it, or is not that
        of the last row, the last checkpoint stands.
        """
        own = jax.tree.leaves((state.trainable, state.previous))
        there = not any(x.is_deleted() for x in own)
        if there and int(state.step) == after:
            self.checkpoints.save(state, row)
        self.checkpoints.wait()
        raise Interrupted(signum or signal.SIGTERM)


def _open_task(stage: Stage) -> Task:
    section, key = stage.config.task, stage.key("task")
    task = open_task(section.name, section.split, section.options, key)
    if section.questions is None:
        return task
    return select(task, section.questions, f"{key}.questions")


def _check_alike(config: Config) -> None:
    """Refuses processes that were not told the same: they would wait for ever."""
    trees = [flat_keys(tree) for tree in gather(config.to_dict)]
    for index, tree in enumerate(trees):
        names = sorted({*tree, *trees[0]})
        if wrong := [n for n in names if tree.get(n) != trees[0].get(n)]:
            told = "".join(
                f"\n  {n}: {trees[0].get(n)!r} and {tree.get(n)!r}" for n in wrong
            )
            raise InputError(
                f"processes 0 and {index} were given different configs:{told}"
            )


def _of_main(make: Callable[[], Any]) -> Any:
    """What process 0 alone opens; the others have something deaf in its place."""
    return together(lambda: make() if is_main() else _Deaf())


class _Deaf:
    """Stands where process 0 has its metrics and its display."""

    def __enter__(self) -> _Deaf:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
