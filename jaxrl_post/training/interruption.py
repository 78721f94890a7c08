"""What may end a run before its last step: signals, and the notice of a preemption."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax


class Interrupted(Exception):
    """A signal ended the run; what is to be resumed is saved.

    Attributes:
      signum: which signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StepGivenUp(BaseException):
    """The step under way takes longer than a signal left it.

    No `Exception`: nothing on the way may take it for a fault of a judge's.
    """


class Signals:
    """Whether the run was asked to stop, and what becomes of the step under way.

    Attributes:
      received: the signal's number, or None.
      grace_seconds: from the signal until the process is gone.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.received: int | None = None
        self.grace_seconds = grace_seconds
        self._end: threading.Timer | None = None
        self._in_step = False
        # Others would wait for one that gives up what they are about.
        self._alone = jax.process_count() == 1

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """Handles the first signal."""
        del frame
        if self.received is not None:
            return
        self.received = signum
        # The system's own handling ends the process whatever it is doing, inside a
        # compiled program too. Files are whole at every instant.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._alone:
            signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, self.grace_seconds / 2)
        self._end = threading.Timer(self.grace_seconds, self._leave)
        self._end.daemon = True
        self._end.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around what may be given up: a step, the preparation of a run.

        Raises:
          StepGivenUp: half of the grace time is over; or nothing should be begun any
            more.
        """
        if self.received is not None and self._alone:
            raise StepGivenUp
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def over(self) -> None:
        """All is saved."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._end is not None:
            self._end.cancel()

    def _give_up(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if self._in_step:
            raise StepGivenUp

    def _leave(self) -> None:
        print(
            f"run.grace_seconds={self.grace_seconds:g} are over and the run is not "
            "saved; the last checkpoint stands.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + (self.received or 0))


@contextmanager
def signals(grace_seconds: float) -> Iterator[Signals]:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT kills.

    In a thread other than the main one, where Python allows no handlers, it does
    nothing. Of several processes one may get a signal alone: they agree on it after the
    step, which none of them gives up.
    """
    noted = Signals(grace_seconds)
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    alarm = signal.getsignal(signal.SIGALRM)
    before = {signum: signal.signal(signum, noted.note) for signum in handled}
    try:
        yield noted
    finally:
        noted.over()
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.signal(signal.SIGALRM, alarm)
