"""What flows between data, judging and training before it becomes arrays.

This module imports neither jax nor anything else of the package: judge processes
import it, and they must start fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]
"""One turn of a conversation: ``{"role": "user", "content": "..."}``."""


@dataclass(frozen=True)
class Prompts:
    """Questions, as text, with all that their judge and their teacher need.

    The four fields are parallel: entry ``i`` of each belongs to question ``i``.

    Attributes:
      ids: a name per question, stable between runs and unique within its source.
      messages: the conversation up to the turn that the model is to write.
      columns: the data row of each question (``answer``, ``level``, ...). Judges see
        it whole; a user's reward function gets each key as a list.
      demonstrations: a worked solution per question, or None where there is none.
    """

    ids: tuple[str, ...]
    messages: tuple[tuple[Message, ...], ...]
    columns: tuple[Mapping[str, Any], ...]
    demonstrations: tuple[str | None, ...]

    def __post_init__(self) -> None:
        lengths = {
            "ids": len(self.ids),
            "messages": len(self.messages),
            "columns": len(self.columns),
            "demonstrations": len(self.demonstrations),
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Prompts needs fields of equal length, got {lengths}.")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> Prompts:
        """The questions at `indices`, in that order; an index may come twice.

        >>> prompts = Prompts(("a", "b"), ((), ()), ({}, {}), (None, None))
        >>> prompts.take([1, 1, 0]).ids
        ('b', 'b', 'a')
        """
        return Prompts(
            tuple(self.ids[i] for i in indices),
            tuple(self.messages[i] for i in indices),
            tuple(self.columns[i] for i in indices),
            tuple(self.demonstrations[i] for i in indices),
        )


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one completion.

    Attributes:
      reward: a finite number, or None where the completion could not be judged (a
        time-out, an unreadable gold answer). None takes no part in any mean; 0.0 is
        a judgement. NaN and infinities are refused: they are bugs of the judge.
      success: whether the completion solves the task. Not the same as ``reward > 0``
        (partial credit); None where the judge does not know.
      feedback: what went wrong, in words that may be shown to the self-teacher.
      extra: further columns for logs and tables, e.g. ``{"parsed": True}``.
      observation: what the task answers, for the model to read and go on, where turns
        are left: a text right behind its turn, or a message, after which the chat
        template opens a new turn. The verdict on the whole then takes this one's
        place. None: the answer is at its end.
    """

    reward: float | None
    success: bool | None = None
    feedback: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    observation: str | Message | None = None

    def __post_init__(self) -> None:
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(
                f"Verdict.reward is {self.reward}; it must be finite. A completion "
                "that cannot be judged has reward None."
            )


class Completion(str):
    """A completion's text that knows its tokens, for judges that read these too.

    Attributes:
      ids: token ids as sampled, the end token included.

    >>> Completion("four", [7, 2]), Completion("four", [7, 2]).ids
    ('four', [7, 2])
    """

    ids: Sequence[int]

    def __new__(cls, text: str, ids: Sequence[int]) -> Completion:
        self = super().__new__(cls, text)
        self.ids = ids
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.ids


Judge = Callable[[Prompts, Sequence[str]], list[Verdict]]
"""``judge(prompts, completions)``: one verdict per completion, in order; prompt ``i``
belongs to completion ``i``. Must be picklable: it runs in the judge pool."""
