"""What a task is: questions drawn in a reproducible order, and a judge of answers.

Anything with a list of rows becomes a task with `RowsTask`; a source that makes its
questions on the fly implements the `Task` protocol itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from jaxrl_post.errors import InputError, nearest
from jaxrl_post.types import Judge, Message, Prompts, Verdict


@runtime_checkable
class Task(Protocol):
    """Where prompts come from and how completions are judged.

    Attributes:
      name: for logs and error messages.
      judge: one verdict per completion; picklable, because it runs in the judge pool.
    """

    name: str
    judge: Judge

    def __len__(self) -> int:
        """Number of distinct questions."""
        ...

    def rows(self, indices: Sequence[int]) -> Prompts:
        """The questions with these row numbers, in that order."""
        ...

    def prompts(self, seed: int, cursor: int, count: int) -> Prompts:
        """The `count` questions that follow the first `cursor` ones of this seed."""
        ...


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
      id: a name, stable between runs and unique within the task.
      messages: the conversation up to the turn that the model is to write.
      columns: what the judge needs (``answer``) and what tables may show.
      demonstration: a worked solution in the answer format, or None.
    """

    id: str
    messages: tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    demonstration: str | None = None


def epoch_order(rows: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """The order in which one epoch visits the rows: a pure function of its arguments.

    Philox is counter-based: the key (seed, epoch) opens an independent stream, so an
    order can be had without those before it. Sorting raw 64-bit words instead of
    calling ``Generator.permutation`` keeps the order when numpy changes its methods
    (NEP 19 fixes the bit streams only).

    Args:
      rows: number of rows.
      seed: of the run, not negative.
      epoch: counted from 0.

    Returns:
      `[rows]` integers, a permutation of ``0 .. rows - 1``.

    >>> epoch_order(5, seed=0, epoch=0).tolist()
    [0, 2, 1, 4, 3]
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(stream.random_raw(rows), kind="stable")


def select(task: Task, questions: Sequence[str | int], key: str = "questions") -> Task:
    """The task of some of its questions alone.

    Args:
      task: of all.
      questions: ids or row numbers, each once.
      key: the config's, for messages.

    Raises:
      InputError: there is no such question.

    >>> rows = [Row(name, ()) for name in ("sum", "product")]
    >>> select(RowsTask("t", rows, nobody), ["product"]).rows([0]).ids
    ('product',)
    """
    ids = task.rows(range(len(task))).ids
    chosen = []
    for wanted in questions:
        if isinstance(wanted, str) and wanted not in ids:
            raise InputError(f"{key}: no question {wanted!r}; {nearest(wanted, ids)}")
        index = ids.index(wanted) if isinstance(wanted, str) else wanted
        if not 0 <= index < len(ids):
            raise InputError(
                f"{key}: no row {index}; the task has {len(ids)}, counted from 0."
            )
        chosen.append(index)
    found = task.rows(chosen)
    fields = (found.ids, found.messages, found.columns, found.demonstrations)
    rows = [Row(*row) for row in zip(*fields, strict=True)]
    return RowsTask(task.name, rows, task.judge, getattr(task, "turns", 1))


def prompts_of(rows: Sequence[Row]) -> Prompts:
    """The questions of some rows."""
    return Prompts(
        ids=tuple(row.id for row in rows),
        messages=tuple(row.messages for row in rows),
        columns=tuple(row.columns for row in rows),
        demonstrations=tuple(row.demonstration for row in rows),
    )


def nobody(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
    """The judge of rows without answers, until a reward function takes its place.

    Raises:
      InputError: whenever it is asked.
    """
    raise InputError(
        "Nothing says what completions are worth: the rows have no answers. Name a "
        "reward function (reward=module:function), a judge, or the column of answers."
    )


class RowsTask:
    """A task over a list of rows, each epoch in an order of its own.

    Question number ``p`` since the start is row
    ``epoch_order(len(rows), seed, p // len(rows))[p % len(rows)]``: a checkpoint needs
    only the cursor, and changing the batch size doesn't change the order.

    >>> rows = [Row(str(i), ({"role": "user", "content": f"{i}?"},)) for i in range(3)]
    >>> task = RowsTask("digits", rows, judge=lambda prompts, completions: [])
    >>> first = task.prompts(seed=0, cursor=0, count=7).ids
    >>> sorted(first[:3]), sorted(first[3:6])
    (['0', '1', '2'], ['0', '1', '2'])
    >>> task.prompts(seed=0, cursor=2, count=5).ids == first[2:]
    True
    """

    def __init__(
        self, name: str, rows: Sequence[Row], judge: Judge, turns: int = 1
    ) -> None:
        """Raises InputError for no rows at all and for an id that comes twice.

        Args:
          name: for logs and error messages.
          rows: the questions.
          judge: of answers; may answer with `Verdict.observation`.
          turns: of an answer at most, observations between them.
        """
        if turns < 1:
            raise InputError(f"Task {name!r}: turns={turns}; it must be at least 1.")
        self.turns = turns
        if not rows:
            raise InputError(f"Task {name!r} has no rows; check its split and filters.")
        seen: set[str] = set()
        for row in rows:
            if row.id in seen:
                raise InputError(f"Task {name!r} has two rows with the id {row.id!r}.")
            seen.add(row.id)
        self.name = name
        self.judge = judge
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int]) -> Prompts:
        """The questions with these row numbers, in that order; one may come twice."""
        return prompts_of([self._rows[i] for i in indices])

    def prompts(self, seed: int, cursor: int, count: int) -> Prompts:
        """The `count` questions that follow the first `cursor` ones of this seed.

        Args:
          seed: of the run; another seed visits the rows in another order.
          cursor: questions drawn since the start of the run.
          count: questions wanted; may cross epoch borders, several even.
        """
        if cursor < 0 or count < 0:
            raise ValueError(
                f"cursor and count must not be negative, got {cursor} and {count}."
            )
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, start = divmod(cursor + len(chosen), len(self))
            order = epoch_order(len(self), seed, epoch)
            chosen.extend(order[start : start + count - len(chosen)].tolist())
        return self.rows(chosen)
