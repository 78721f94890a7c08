"""Who is decoded when: the host's side of a call of the sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_post.generation.decoding import Programs
from jaxrl_post.generation.kept import Kept
from jaxrl_post.generation.plan import Plan, capacity_for, slot_sizes
from jaxrl_post.generation.slots import Contexts, Log, Queue, Slots


class _Pool:
    """The contexts that sequences are decoded from, R at a time.

    A context stays until all its sequences have ended; then the next prompts take its
    place, as many at a time as one prefill computes.

    Attributes:
      contexts: the R contexts.
      total: number of the last sequence, and one.
    """

    contexts: Contexts

    def __init__(
        self,
        programs: Programs,
        prefill: Callable[[range], Contexts],
        prompts: range,
        *,
        rows: int,
        many: int,
        group_size: int,
    ) -> None:
        self._programs, self._prefill, self._many = programs, prefill, many
        self._waiting, self._group_size = prompts, group_size
        self._group = np.array(group_size, np.int32)
        self.total = prompts.stop * group_size
        self._free = list(range(rows))
        self._table = np.zeros(rows, np.int32)
        self._row: dict[int, int] = {}
        self._left = np.full(prompts.stop, group_size)
        self._admit()

    @property
    def queue(self) -> Queue:
        """What slots may take by now."""
        limit = self._waiting.start * self._group_size
        return Queue(self._table.copy(), np.array(limit, np.int32), self._group)

    def release(self, ended: np.ndarray) -> None:
        """These sequences have ended, so that some contexts may be replaced."""
        prompts = ended // self._group_size
        np.subtract.at(self._left, prompts, 1)
        over = {p for p in prompts.tolist() if not self._left[p]}
        self._free += [self._row.pop(p) for p in sorted(over)]
        self._admit()

    def _admit(self) -> None:
        """Prefills what there is room for."""
        while chunk := self._waiting[: self._many]:
            if len(chunk) > len(self._free):
                return
            self._waiting = self._waiting[len(chunk) :]
            rows, self._free = self._free[: len(chunk)], self._free[len(chunk) :]
            self._row |= zip(chunk, rows, strict=True)
            # Of a prompt that these entries belonged to, every sequence was taken.
            self._table[np.array(chunk) % len(self._table)] = rows
            part = self._prefill(chunk)
            if self._many == len(self._table):
                self.contexts = part
                continue
            if not hasattr(self, "contexts"):
                self.contexts = self._programs.widen(part, len(self._table))
            # Rows beyond the last are those of fillers.
            rows += [len(self._table)] * (self._many - len(rows))
            self.contexts = self._programs.install(
                self.contexts, part, np.array(rows, np.int32)
            )


class Call:
    """The sampling of G sequences to each of P contexts, dispatch by dispatch.

    Attributes:
      kept: once all is decoded, the keys and values, where they were to be kept.
    """

    def __init__(
        self,
        programs: Programs,
        params: chex.ArrayTree,
        prefill: Callable[[range, int, int], Contexts],
        plan: Plan,
        *,
        choice: Mapping[str, Any],
        keeps: bool = False,
    ) -> None:
        """
        Args:
          programs: what runs on the device.
          params: the policy's parameters, as training holds them.
          prefill: ``prefill(prompts, many, columns)`` computes the contexts of some
            prompts, as many as `plan` says.
          plan: of their sizes.
          choice: arguments `key`, `temperature` and `greedy` of the programs.
          keeps: whether the keys and values are kept, for which `Plan.at_once` has to
            be true.
        """
        self._programs, self._prefill, self._plan = programs, prefill, plan
        self._decoding_params = programs.prepare(params)
        self._choice, self._keeps = choice, keeps
        self._seen: list[Slots] = []
        self.kept: Kept | None = None

    def run(self) -> Iterator[Log]:
        """Decodes all.

        Yields:
          The `Log` of each dispatch, on the host, while the device works on the next.

        Raises:
          ValueError: fewer slots than shards.
        """
        plan = self._plan
        if (slots := plan.refilled) is None:
            for prompts, parts in plan.waves():
                pool = self._pool(prompts, len(prompts))
                for sequences in parts:
                    row = np.repeat(np.arange(len(prompts)), sequences.shape[1])
                    yield from self._decode(pool, sequences.ravel(), row, True)
                if self._keeps:
                    self.kept = self._keep(pool.contexts)
            return
        pool = self._pool(range(plan.prompts), plan.resident())
        sequences = np.arange(slots, dtype=np.int32)
        yield from self._decode(pool, sequences, sequences // plan.group_size, False)

    def _pool(self, prompts: range, rows: int) -> _Pool:
        """A pool of so many rows for these prompts; beyond the last they are empty."""
        many, columns = self._plan.chunks(rows, len(prompts))

        def prefill(prompts: range) -> Contexts:
            return self._prefill(prompts, many, columns)

        return _Pool(
            self._programs,
            prefill,
            prompts,
            rows=rows,
            many=many,
            group_size=self._plan.group_size,
        )

    def _decode(
        self, pool: _Pool, sequences: np.ndarray, row: np.ndarray, grouped: bool
    ) -> Iterator[Log]:
        """Decodes these sequences and, unless grouped, all that follow them."""
        programs, limit = self._programs, self._programs.max_new_tokens
        capacity = capacity_for(1, limit)
        sizes = slot_sizes(len(sequences)) if self._plan.shrinks else [len(sequences)]
        slots, log, status = programs.start(
            self._decoding_params,
            pool.contexts,
            sequences,
            row.astype(np.int32),
            np.int32(pool.total if grouped else len(sequences)),
            **self._choice,
            grouped=grouped,
            capacity=capacity,
        )
        if limit == 1 and grouped:
            self._seen.append(slots)
            yield _to_host(log)
            return
        while True:
            # The look at the dispatch before the one just made: the device has work
            # while the host waits. Of what has ended a dispatch makes nothing.
            slots, next_log, next_status = programs.decode(
                self._decoding_params,
                pool.contexts,
                slots,
                pool.queue,
                **self._choice,
                grouped=grouped,
            )
            alive, following, longest = (int(x) for x in _to_host(status))
            log = _to_host(log)
            yield log
            if not alive and following >= pool.total:
                if self._keeps:
                    self._seen.append(slots)
                return
            if not grouped:
                pool.release(log.sequence[log.ended])
            log, status = next_log, next_status
            # Room for what the dispatch under way may add. One that fills the cache all
            # the same ends early.
            wanted = capacity_for(longest + programs.steps, limit)
            if wanted > capacity or 2 * wanted <= capacity:
                capacity = wanted
                slots = programs.resize(slots, capacity)
            fitting = [n for n in sizes if n >= alive]
            if following >= pool.total and len(fitting) > 1:
                sizes = sizes[len(fitting) - 1 :]
                grouped = False
                if self._keeps:
                    self._seen.append(slots)
                slots = programs.compact(slots, sizes[0])

    def _keep(self, contexts: Contexts) -> Kept:
        """What slots hold, those too that were given up since."""
        whole, *later = self._seen
        for others in later:
            whole = self._programs.restore(whole, others)
        return Kept(contexts, whole.cache)


def cut(
    prompts: range, many: int, columns: int, *arrays: np.ndarray
) -> list[np.ndarray]:
    """Rows of ``[P, S]`` for a prefill; zeros fill `many` rows and whole `columns`."""
    chunk = [x[prompts.start : prompts.stop] for x in arrays]
    width = -chunk[0].shape[1] % columns
    return [np.pad(x, ((0, many - len(x)), (0, width))) for x in chunk]


def _to_host(tree: chex.ArrayTree) -> Any:
    """Whole numpy arrays, in every process."""

    def fetch(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)
