"""Drawing prompts until a step has its groups: sample, judge, transform."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import numpy as np

from jaxrl_post.errors import InputError
from jaxrl_post.generation import (
    Rollouts,
    Sampler,
    encode_prompts,
    pad_contexts,
)
from jaxrl_post.isolation import JudgePool
from jaxrl_post.recipes.groups import Demonstrations, Groups, concatenate
from jaxrl_post.recipes.recipe import Recipe
from jaxrl_post.tasks import Task
from jaxrl_post.training.assembly import (
    demonstrated_groups,
    group_metrics,
    make_groups,
)
from jaxrl_post.training.config import Config
from jaxrl_post.training.curriculum import draw
from jaxrl_post.training.demonstrations import DemonstrationStore
from jaxrl_post.training.dialogue import Dialogue
from jaxrl_post.training.history import History
from jaxrl_post.training.judging import judging_early, read_and_judge
from jaxrl_post.training.moment import Collected, Moment, Source
from jaxrl_post.training.posteriors import Posteriors
from jaxrl_post.training.prefixes import continue_prefixes
from jaxrl_post.training.turns import in_turns, turns_of
from jaxrl_post.training.widths import fit_width, pad_left
from jaxrl_post.types import Prompts, Verdict

_LOOKED_AT = 256
"""Prompts whose lengths are looked at before the first step."""

_OF_PREFIX = 1 << 20
"""Folded into a round's key for the policy's continuations of demonstrations."""


class Collector:
    """Makes the groups of a step.

    A round draws as many prompts as groups are missing, samples and judges them and
    applies the recipe's group transforms. Prompts that are too long, and groups that a
    transform drops, leave places that the next round fills. Recipes without rollouts
    take their prompts' demonstrations instead; prompts without one are passed over.
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
        demonstrations: DemonstrationStore | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self._config, self._task, self._recipe = config, task, recipe
        self._sampler, self._tokenizer, self._pool = sampler, tokenizer, pool
        self._store, self._mesh = demonstrations, mesh
        self._history = None
        if recipe.history is not None:
            self._history = History(config, recipe.history, tokenizer)
        self._rows: Mapping[str, int] = {}
        if recipe.posterior_discount is not None:
            names = task.rows(range(len(task))).ids
            self._rows = {name: i for i, name in enumerate(names)}
        # A step's few prompts are no sample: one long one may be half of them.
        first = task.prompts(config.run.seed, 0, _LOOKED_AT)
        self._encode(first, config.task.max_dropped_share)

    def collect(
        self,
        params: chex.ArrayTree,
        key: jax.Array,
        moment: Moment,
        meanwhile: Callable[[], chex.ArrayTree] | None = None,
    ) -> Collected:
        """The groups of one step.

        Args:
          params: to sample from.
          key: of this step.
          moment: when it is.
          meanwhile: called once, when the first round is sampled: gives the device
            something to do while it is judged, and returns the same parameters, for
            further rounds.

        Raises:
          InputError: too many prompts are too long, or none fits.
        """
        source = Source(params, meanwhile)
        cursor = moment.cursor
        wanted = self._config.training.prompts_per_step
        rounds = self._recipe.max_sampling_rounds
        kept: list[Groups] = []
        sampled: list[Groups] = []
        posteriors = Posteriors(
            moment.posterior, self._rows, self._recipe.posterior_discount
        )
        last: Groups | None = None
        times = {"time/generate": 0.0, "time/judge": 0.0}
        dropped = drawn = round_ = 0
        while True:
            missing = wanted - sum(map(len, kept))
            prompts, cursor = self._draw(cursor, missing, posteriors.after)
            if self._history is not None:
                prompts = self._history.show(prompts, moment.step)
            drawn += missing
            encoded = self._encode(prompts)
            dropped += len(encoded.dropped)
            if len(encoded.prompts):
                of_round = jax.random.fold_in(key, round_)
                groups = self._make(source, of_round, encoded, times)
                if len(groups):
                    sampled.append(groups)
                seed = np.random.SeedSequence(
                    (self._config.run.seed, moment.step, round_)
                )
                start = time.perf_counter()
                given = self._demonstrate(source, of_round, groups, moment)
                times["time/generate"] += time.perf_counter() - start
                groups = replace(
                    groups,
                    demonstrations=given,
                    posterior=posteriors.before(groups.prompts.ids),
                    progress=moment.progress,
                    seed=int(seed.generate_state(1)[0]),
                )
                for transform in self._recipe.group_transforms:
                    if not len(groups):
                        break
                    last, groups = groups, transform(groups)
                    posteriors.keep(groups)
                if len(groups):
                    kept.append(groups)
            round_ += 1
            if sum(map(len, kept)) == wanted or round_ == rounds:
                break
        if not sampled:
            length = self._config.task.max_prompt_length
            raise InputError(
                f"None of the {drawn} prompts drawn for step "
                f"{moment.step} can be used: {dropped} are longer than "
                f"task.max_prompt_length={length} tokens, the others have no verified "
                "demonstration."
                if self._store
                else f"All {dropped} prompts drawn for step {moment.step} are longer "
                f"than task.max_prompt_length={length} tokens."
            )
        # Where every group was dropped one of them stays, to give the batch its form;
        # without variance it trains nothing.
        groups = concatenate(kept) if kept else (last or sampled[0]).take([0])
        if self._history is not None:
            self._history.add(groups)
        metrics = {
            **self._sampling_metrics(concatenate(sampled), times),
            **{name: float(np.mean(x)) for name, x in groups.metrics.items()},
            "sampling/rounds": float(round_),
            "sampling/dropped_prompts": float(dropped),
            "sampling/kept_groups": float(sum(map(len, kept))),
        }
        if self._config.task.curriculum is not None:
            passed_over = cursor - moment.cursor - drawn
            metrics["sampling/passed_over"] = float(passed_over)
        if groups.is_teacher is not None and self._recipe.rollouts:
            metrics["injection/count"] = float(groups.is_teacher.any(2).sum())
        return Collected(groups, cursor, posteriors.after, metrics)

    def _draw(
        self, cursor: int, count: int, posterior: np.ndarray | None
    ) -> tuple[Prompts, int]:
        """The next questions, and the cursor behind them."""
        seed, curriculum = self._config.run.seed, self._config.task.curriculum
        if curriculum is None or posterior is None:
            return self._task.prompts(seed, cursor, count), cursor + count
        return draw(
            self._task,
            self._rows,
            posterior,
            floor=curriculum.floor,
            seed=seed,
            cursor=cursor,
            count=count,
        )

    def _sampling_metrics(self, groups: Groups, times) -> dict[str, float]:
        if not self._recipe.rollouts:
            return {"length/mean": float(groups.lengths.mean())}
        return {
            **group_metrics(groups),
            **times,
            "throughput/generated_tokens_per_second": float(
                groups.lengths.sum() / times["time/generate"]
            ),
        }

    def _encode(self, prompts: Prompts, max_dropped_share: float = 1.0):
        task = self._config.task
        return encode_prompts(
            self._tokenizer,
            prompts,
            max_prompt_length=task.max_prompt_length,
            max_dropped_share=max_dropped_share,
            multiple=1,
            chat_template_arguments=self._config.model.chat_template_arguments,
        )

    def _make(self, source, key, encoded, times) -> Groups:
        """Judged groups: rollouts, or the demonstrations alone."""
        limit = self._config.task.max_prompt_length
        width = fit_width(encoded.contexts.shape[1], limit)
        contexts = pad_left(encoded.contexts, width)
        mask = pad_left(encoded.context_mask, width)
        if not self._recipe.rollouts:
            assert self._store is not None
            given = self._store.take(encoded.prompts.ids)
            groups = demonstrated_groups(encoded.prompts, contexts, mask, given)
            return groups.take(np.flatnonzero(given.available).tolist())
        start, before = time.perf_counter(), times["time/generate"]
        dialogue = Dialogue(
            self._sampler,
            lambda: source.params,
            key=key,
            context_limit=limit,
            mesh=self._mesh,
            # Beside an update there is no room for caches.
            keeps=turns_of(self._task) > 1 and not source.shared,
        )
        sample = partial(dialogue.begin, contexts, mask)
        answered = self._sample(source, sample, encoded.prompts, times)
        answers = in_turns(
            *answered,
            encoded,
            task=self._task,
            pool=self._pool,
            tokenizer=self._tokenizer,
            generate=dialogue.go_on,
            chat_template_arguments=self._config.model.chat_template_arguments,
        )
        generated = times["time/generate"] - before
        times["time/judge"] += time.perf_counter() - start - generated
        return make_groups(
            encoded.prompts,
            contexts,
            mask,
            answers.rollouts,
            answers.texts,
            answers.verdicts,
            answers.written,
        )

    def _sample(
        self, source, begin, prompts, times
    ) -> tuple[Rollouts, list[str], list[Verdict]]:
        """First turns, their texts and verdicts.

        On one device what has ended is judged while others are decoded; on a mesh each
        process judges its share of the whole.
        """
        start, size = time.perf_counter(), self._config.training.group_size

        def sample(ended=None):
            rollouts = begin(group_size=size, ended=ended)
            times["time/generate"] += time.perf_counter() - start
            source.sampled()
            return rollouts

        if self._mesh is not None:
            rollouts = sample()
            return rollouts, *self._judge(prompts, rollouts.tokens, rollouts.mask)
        asked = prompts.take(np.repeat(np.arange(len(prompts)), size).tolist())
        with judging_early(
            self._tokenizer, self._pool, self._task.judge, asked
        ) as early:
            return sample(early.add), *early.answers()

    def _judge(self, prompts, tokens, mask):
        """Texts and verdicts of G answers to each prompt, in rows ``p * G + g``."""
        rows = np.repeat(np.arange(len(prompts)), len(tokens) // len(prompts))
        asked = prompts.take(rows.tolist())
        return read_and_judge(
            self._tokenizer, self._pool, self._task.judge, asked, tokens, mask
        )

    def _demonstrate(
        self, source, key, groups: Groups, moment: Moment
    ) -> Demonstrations | None:
        """The groups' demonstrations, or their beginnings and what the policy makes of
        them."""
        if self._store is None or not self._recipe.rollouts:
            return None
        given = self._store.take(groups.prompts.ids)
        if self._recipe.prefix is None:
            return given
        rng = np.random.default_rng(jax.random.key_data(key).tolist())  # the round's
        shares = self._recipe.prefix.shares(len(groups), moment.progress, rng)
        lengths = given.mask.sum(1)
        kept = np.floor(shares * lengths + 1e-9).astype(int)
        goes_on = given.available & (kept < lengths)
        if not goes_on.any():
            return given
        return self._continue(source, key, groups, given, kept, goes_on)

    def _continue(self, source, key, groups, given, kept, goes_on) -> Demonstrations:
        rows = [
            [*ids[mask], *tokens[:k]]
            for ids, mask, tokens, k in zip(
                groups.contexts, groups.context_mask, given.tokens, kept, strict=True
            )
        ]
        contexts, mask = pad_contexts(rows)
        # One width for all of a run's prefixes: a program each would cost more.
        width = self._config.task.max_prompt_length + given.tokens.shape[1]
        width = fit_width(contexts.shape[1], width)
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            rollouts = self._sampler.generate(
                source.params,
                pad_left(contexts, width),
                pad_left(mask, width),
                key=jax.random.fold_in(key, _OF_PREFIX),
            )
        whole = continue_prefixes(given, kept, goes_on, rollouts)
        texts, verdicts = self._judge(groups.prompts, whole.tokens, whole.mask)
        judged = np.array([v.reward is not None for v in verdicts])
        rewards = np.array([v.reward or 0.0 for v in verdicts], np.float32)
        return replace(
            whole,
            rewards=np.where(goes_on, rewards, given.rewards),
            available=np.where(goes_on, judged, given.available),
            texts=_chosen(goes_on, texts, given.texts),
            verdicts=_chosen(goes_on, verdicts, given.verdicts),
        )


def _chosen(where: np.ndarray, new: Sequence[Any], old: Sequence[Any]) -> tuple:
    return tuple(n if on else o for on, n, o in zip(where, new, old, strict=True))
