"""The completions of one call of the judge pool, and what is known of them."""

from __future__ import annotations

import math
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jaxrl_post.types import Prompts, Verdict

PATIENCE = 8
"""Lost pieces after which a judge that loses more than it judges is given up on."""

Piece = Sequence[int]
"""Numbers of completions that are judged together."""


@dataclass
class PoolStats:
    """Completions since the pool was made, by what became of them."""

    judged: int = 0
    timeouts: int = 0
    crashes: int = 0
    errors: int = 0


class Batch:
    """Questions, of which the completions may come one after the other.

    What ends first is no sample of the whole: a judge that fails at it is not given up
    on before all completions are there. Until then no more of them are judged.

    Attributes:
      waiting: pieces that no worker has yet.
      failures: of each completion without a verdict, the kind and the reason.
      bell: a socket that can be read when more has come.
    """

    def __init__(
        self, prompts: Prompts, stats: PoolStats, *, workers: int, chunk_size: int
    ) -> None:
        self.waiting: deque[Piece] = deque()
        self.failures: list[tuple[str, str]] = []
        self._prompts, self._stats = prompts, stats
        self._workers, self._chunk_size = max(1, workers), chunk_size
        self._completions: dict[int, str] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._finished = self._lost = 0
        self._holds = self._cancelled = False
        self._lock = threading.Lock()
        self.bell, self._rope = socket.socketpair()
        self.bell.setblocking(False)

    def close(self) -> None:
        """Lets go of the bell."""
        self.bell.close()
        self._rope.close()

    @property
    def missing(self) -> int:
        """Completions that have not come yet."""
        return len(self._prompts) - len(self._completions)

    @property
    def unsettled(self) -> bool:
        """Whether there is something left to do."""
        return not self._cancelled and len(self._verdicts) < len(self._prompts)

    def give(self, rows: Sequence[int], completions: Sequence[str]) -> None:
        """Completions of these questions, each once."""
        # Few of them still go to every worker.
        spread = math.ceil(len(rows) / self._workers)
        size = max(1, min(self._chunk_size, spread))
        with self._lock:
            self._completions.update(zip(rows, completions, strict=True))
            self.waiting.extend(rows[i : i + size] for i in range(0, len(rows), size))
            if self._holds and not self.missing:
                self._holds, self._finished, self._lost = False, 0, 0
        self._ring()

    def cancel(self) -> None:
        """Nobody wants the verdicts any more."""
        self._cancelled = True
        self._ring()

    def _ring(self) -> None:
        self._rope.send(b"!")

    def heed(self) -> None:
        """Silences the bell."""
        with suppress(BlockingIOError):
            while self.bell.recv(4096):
                pass

    def next_piece(self) -> Piece | None:
        """The next piece for a worker, if any."""
        with self._lock:
            return self.waiting.popleft() if self.waiting and not self._holds else None

    def pieces(self) -> Iterator[Piece]:
        """All that waits."""
        while (piece := self.next_piece()) is not None:
            yield piece

    def part(self, piece: Piece) -> tuple[Prompts, list[str]]:
        """What a worker gets."""
        return self._prompts.take(piece), [self._completions[i] for i in piece]

    def result(self) -> list[Verdict]:
        """The verdicts, in the order of the questions."""
        return [self._verdicts[i] for i in range(len(self._prompts))]

    def settle(self, piece: Piece, outcome: list[Verdict] | str, kind: str) -> None:
        """Takes the verdicts of a piece, or the reason why it has none."""
        with self._lock:
            self._settle(piece, outcome, kind)

    def _settle(self, piece: Piece, outcome: list[Verdict] | str, kind: str) -> None:
        if piece[0] in self._verdicts:
            return  # given up in the meantime
        if not isinstance(outcome, str):
            self._finished += 1
            self._stats.judged += len(piece)
            self._verdicts.update(zip(piece, outcome, strict=True))
            return
        if kind != "errors":
            self._lost += 1
        if len(piece) > 1:
            self.waiting.extendleft([i] for i in reversed(piece))
        else:
            self._fail(piece[0], outcome, kind)
        if self._lost >= PATIENCE and self._lost > self._finished:
            if self.missing:
                self._holds = True
                return
            self.waiting.clear()
            for i in range(len(self._prompts)):
                if i not in self._verdicts:
                    self._fail(i, f"given up after this of others: {outcome}", kind)

    def warning(self, judge: str) -> str:
        """Who could not judge how many completions, and why not the first."""
        kinds = Counter(kind for kind, _ in self.failures)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        return (
            f"judge {judge}: {len(self.failures)} of {len(self._prompts)} "
            f"completions could not be judged ({counts}); the first: "
            f"{self.failures[0][1]}"
        )

    def _fail(self, i: int, reason: str, kind: str) -> None:
        self.failures.append((kind, reason))
        self._verdicts[i] = Verdict(None, None, extra={"error": reason})
        setattr(self._stats, kind, getattr(self._stats, kind) + 1)


class Judging:
    """A batch that is judged while its completions come."""

    def __init__(
        self, batch: Batch, work: Callable[[], None], *, apart: bool = True
    ) -> None:
        """
        Args:
          batch: whose completions are given to this.
          work: judges the batch: until nothing is left to do, or not apart, what there
            is.
          apart: in a thread of its own; else as completions are given.
        """
        self._batch, self._work, self._apart = batch, work, apart
        self._error: BaseException | None = None
        self._ended = threading.Event()
        if apart:
            threading.Thread(target=self._run, daemon=True).start()
        else:
            self._ended.set()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised where the verdicts are asked for
            self._error = error
        finally:
            self._ended.set()

    def give(self, rows: Sequence[int], completions: Sequence[str]) -> None:
        """Completions of some of the questions; of each question once.

        Raises:
          InputError, RuntimeError: as `JudgePool.judge`, for completions given before.
        """
        if self._error is not None:
            raise self._error
        self._batch.give(rows, completions)
        if not self._apart:
            self._work()

    def verdicts(self) -> list[Verdict]:
        """One for each question, in their order; waits for them.

        Raises:
          ValueError: not all completions were given.
          InputError, RuntimeError: as `JudgePool.judge`.
        """
        if self._error is None and self._batch.missing:
            raise ValueError(f"{self._batch.missing} completions were not given.")
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._batch.result()

    def stop(self) -> None:
        """Drops what is not judged yet."""
        self._batch.cancel()
        self._ended.wait()
