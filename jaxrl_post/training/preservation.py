"""What Orbax is told of a run: which checkpoints stay, whom a failure reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def watch(handler: Any, report: Callable[[Exception], None]) -> Any:
    """The handler; tells at once what keeps this process's arrays from being written.

    Orbax tells when the other processes have written theirs, or have waited in vain.
    """
    save = handler.async_save

    async def async_save(*args: Any, **kwargs: Any) -> list[Any]:
        futures = await save(*args, **kwargs) or []
        return [_Watched(future, report) for future in futures]

    handler.async_save = async_save
    return handler


class _Watched:
    """A future of Orbax's that reports its failure."""

    def __init__(self, future: Any, report: Callable[[Exception], None]) -> None:
        self._future, self._report = future, report

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout=timeout)
        except Exception as error:
            self._report(error)
            raise


class Preservation:
    """Which checkpoints stay: the newest, and the one with the greatest score.

    Orbax asks when it begins to save, and deletes when the new one is on disk.
    """

    def __init__(self, keep: int, scores: Mapping[int, float]) -> None:
        self._keep, self._scores = keep, scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        del context
        steps = sorted(info.step for info in checkpoints)
        stay = set(steps[-self._keep :])
        # Of equal ones the first: it was reached with less.
        scored = [step for step in steps if step in self._scores]
        stay |= {max(scored, key=lambda step: self._scores[step])} if scored else set()
        return [info.step in stay for info in checkpoints]
