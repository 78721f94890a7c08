"""Questions that come one after the other, of a data set too large to be held."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from jaxrl_post.errors import InputError
from jaxrl_post.tasks.base import Row, epoch_order, prompts_of
from jaxrl_post.types import Judge, Prompts

BLOCK = 1000
"""Rows that are held, and shuffled, at a time."""


class StreamTask:
    """A task over a stream of rows, which every epoch reads anew.

    Blocks of rows are taken as they come, each in an order of its own. What a block's
    order depends on is the seed, the epoch and its number, so that a checkpoint needs
    only the cursor; a resumed run reads the stream again up to there.

    >>> def rows():
    ...     return (Row(str(i), ()) for i in range(5))
    >>> task = StreamTask("digits", rows, judge=lambda prompts, completions: [])
    >>> first = task.prompts(seed=0, cursor=0, count=7).ids
    >>> sorted(first[:5]), task.prompts(seed=0, cursor=2, count=5).ids == first[2:]
    (['0', '1', '2', '3', '4'], True)
    """

    turns = 1

    def __init__(
        self,
        name: str,
        open_rows: Callable[[], Iterable[Row]],
        judge: Judge,
        *,
        block: int = BLOCK,
    ) -> None:
        """Opens nothing yet.

        Args:
          name: for logs and error messages.
          open_rows: called for every epoch; the same rows in the same order each time.
          judge: of answers.
          block: rows held at a time.
        """
        self.name, self.judge = name, judge
        self._open_rows, self._block = open_rows, block
        self._place = (-1, -1)
        self._walk: Iterator[Row] = iter(())

    def __len__(self) -> int:
        raise InputError(
            f"The data of task {self.name!r} is streamed, so that the number of its "
            "rows is not known; evaluation, demonstrations, task.questions, a "
            "curriculum and a replay need all of them: set streaming: false there, or "
            "name a source that can be held."
        )

    def rows(self, indices: Sequence[int]) -> Prompts:
        """No rows; of a stream none has a number.

        Raises:
          InputError: any are asked for.
        """
        if indices:
            len(self)  # raises
        return prompts_of([])

    def prompts(self, seed: int, cursor: int, count: int) -> Prompts:
        """The `count` questions that follow the first `cursor` ones of this seed."""
        if (seed, cursor) != self._place:
            self._walk = itertools.islice(self._shuffled(seed), cursor, None)
        found = list(itertools.islice(self._walk, count))
        self._place = (seed, cursor + count)
        return prompts_of(found)

    def _shuffled(self, seed: int) -> Iterator[Row]:
        for epoch in itertools.count():
            rows = iter(self._open_rows())
            for number in itertools.count():
                block = list(itertools.islice(rows, self._block))
                if not block:
                    break
                for i in epoch_order(len(block), seed, (epoch << 32) + number):
                    yield block[i]
            if not number:
                raise InputError(
                    f"Task {self.name!r} has no rows; check its split and filters."
                )
