"""A pool of processes that judge completions and can be killed.

A judge is somebody's code run on whatever a model wrote: it may raise, hang, eat the
memory or crash the interpreter. None of that may stop or skew a training step, so the
verdict of a completion that could not be judged is ``Verdict(None, None)`` with the
reason in ``extra["error"]``, for this completion only.

Why not `multiprocessing`: forking a process that runs jax deadlocks, and its spawn and
forkserver methods re-import the user's main script in every worker, which imports jax
there and re-runs a script without a ``__main__`` guard. ``concurrent.futures`` cannot
kill one worker. Here each worker is a fresh interpreter, started by exec, that speaks
pickles through a socket: the pool may be made before or after jax starts its threads,
and a worker is killed together with all processes that its judge started.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from jaxrl_post.errors import InputError
from jaxrl_post.isolation.batch import Batch, Judging, Piece, PoolStats
from jaxrl_post.isolation.channel import MARK_SIZE, Channel, ForeignBytes
from jaxrl_post.isolation.worker import call, describe
from jaxrl_post.types import Judge, Prompts, Verdict

_log = logging.getLogger(__name__)

START_LIMIT = 120.0
"""Seconds in which a worker must have started and imported the judge."""

LOOK_EVERY = 0.5
"""Seconds between two looks at how much memory busy workers have."""

_COMMAND = (
    "import sys; descriptor, mark, parent, limit, *sys.path[:] = sys.argv[1:]; "
    "from jaxrl_post.isolation.worker import serve; "
    "serve(int(descriptor), mark, int(parent), int(limit))"
)


class JudgePool:
    """Judges batches of completions in worker processes.

    A batch is cut into chunks. A chunk that raises, crashes its worker or exceeds the
    time-out is judged again, one completion at a time, so that one bad completion does
    not spoil its neighbours. When at least `PATIENCE` pieces were lost to time-outs
    and crashes, and more than were judged, the rest of the batch is given up: a judge
    that hangs on everything costs minutes, not hours.

    Use it as a context manager, or call `close`. One call runs at a time; a second
    thread waits.

    >>> from jaxrl_post.tasks.rows import exact_match
    >>> prompts = Prompts(("q",), ((),), ({"answer": "4"},), (None,))
    >>> with JudgePool(workers=0) as pool:
    ...     pool.judge(exact_match, prompts, ["4"])[0].reward
    1.0
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        timeout: float = 30.0,
        chunk_size: int = 16,
        memory_limit: int | None = None,
        warn: bool = True,
    ) -> None:
        """Starts the workers; they import the judge when the first batch comes.

        Args:
          workers: processes; None: half of the processors, at most 8; 0: judge in this
            process, where nothing can be timed out (for debugging).
          timeout: seconds that a chunk, or a completion judged alone, may take.
          chunk_size: completions per chunk at most.
          memory_limit: address space of a worker in bytes; None: no limit. A judge that
            loads torch or jax needs far more address space than memory. Whatever it
            is, a worker that holds more than half of the machine's memory is killed.
          warn: log a line for each batch of which something could not be judged.
        """
        if workers is None:
            workers = max(1, min(8, (os.cpu_count() or 2) // 2))
        if workers < 0 or timeout <= 0 or chunk_size < 1:
            raise ValueError(
                "JudgePool needs workers >= 0, timeout > 0 and chunk_size >= 1, got "
                f"{workers}, {timeout} and {chunk_size}."
            )
        self.timeout = timeout
        self.chunk_size = chunk_size
        self.stats = PoolStats()
        self._warn = warn
        self._lock = threading.Lock()
        self._memory_limit = memory_limit or 0
        self._most_memory = _machine_memory() // 2
        self._workers = [_Worker(self._memory_limit) for _ in range(workers)]
        self._in_process = workers == 0

    def __enter__(self) -> JudgePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers and whatever they started. May be called twice."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def judge(
        self, judge: Judge, prompts: Prompts, completions: Sequence[str]
    ) -> list[Verdict]:
        """One verdict per completion, in order.

        Args:
          judge: picklable, from a module that the workers can import (they get this
            process's ``sys.path``).
          prompts: N questions; question i belongs to completion i.
          completions: N texts.

        Raises:
          ValueError: lengths differ.
          InputError: the judge cannot be sent to a worker.
          RuntimeError: the pool is closed, or workers cannot be started.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"Got {len(prompts)} prompts for {len(completions)} completions."
            )
        with self._batch(judge, prompts) as (batch, work):
            batch.give(range(len(prompts)), completions)
            work()
            return batch.result()

    @contextmanager
    def judging(self, judge: Judge, prompts: Prompts) -> Iterator[Judging]:
        """Judges completions as they come, while the caller is about other things.

        Args:
          judge: as in `judge`.
          prompts: N questions, to which the completions will be given in any order.

        Yields:
          A `Judging`. Until it is left other batches wait; what is not judged when it
          is left is dropped.

        Raises:
          InputError, RuntimeError: as `judge`.
        """
        with self._batch(judge, prompts) as (batch, work):
            judging = Judging(batch, work, apart=not self._in_process)
            try:
                yield judging
            finally:
                judging.stop()

    @contextmanager
    def _batch(
        self, judge: Judge, prompts: Prompts
    ) -> Iterator[tuple[Batch, Callable[[], None]]]:
        """An empty batch, and what judges all that it will be given."""
        with self._lock:
            if not self._workers and not self._in_process:
                raise RuntimeError("This JudgePool is closed.")
            batch = Batch(
                prompts,
                self.stats,
                workers=len(self._workers),
                chunk_size=self.chunk_size,
            )
            try:
                if self._in_process:
                    yield batch, partial(self._run_here, judge, batch)
                else:
                    yield batch, partial(self._run, _dumps(judge), batch)
            finally:
                batch.close()
        if batch.failures and self._warn:
            _log.warning("%s", batch.warning(name_of(judge)))

    def _run_here(self, judge: Judge, batch: Batch) -> None:
        for piece in batch.pieces():
            batch.settle(piece, call(judge, *batch.part(piece)), "errors")

    def _run(self, pickled: bytes, batch: Batch) -> None:
        starts = 0
        try:
            while batch.unsettled:
                for worker in self._workers:
                    if worker.piece is None and (piece := batch.next_piece()):
                        worker.assign(pickled, piece, batch.part(piece), self.timeout)
                for worker in self._next_events(batch):
                    kind, content = worker.receive()
                    if kind == "started":
                        worker.deadline = time.monotonic() + self.timeout
                        worker.started = True
                        continue
                    if kind == "unloadable":
                        raise InputError(
                            f"A judge worker cannot load the judge ({content}). "
                            "Define it in a module that can be imported (not in the "
                            "script itself), or use JudgePool(workers=0)."
                        )
                    given, was_started = worker.piece, worker.started
                    assert given is not None
                    worker.piece = None
                    if kind in ("timeouts", "crashes"):
                        self._replace(worker)
                    if was_started:
                        starts = 0
                        batch.settle(given, content, kind)
                        continue
                    # The worker was dead or could not start: not the piece's fault.
                    starts += 1
                    if starts > 2 + len(self._workers):
                        raise RuntimeError(f"Judge workers do not start: {content}.")
                    batch.waiting.appendleft(given)
        finally:
            # After an exception (Ctrl-C) the verdicts under way belong to nobody. A
            # batch given up has workers that still hang.
            for worker in self._workers:
                if worker.piece is not None:
                    self._replace(worker)

    def _next_events(self, batch: Batch) -> list[_Worker]:
        """Waits until a busy worker has something to say, is too late or too large, or
        there is more to judge."""
        busy = [worker for worker in self._workers if worker.piece is not None]
        while True:
            for worker in busy:
                worker.look(self._most_memory)
            # Before the wait: what has come already would not end it.
            if events := [worker for worker in busy if worker.has_event()]:
                return events
            first = min((worker.deadline for worker in busy), default=math.inf)
            patience = min(LOOK_EVERY, max(0.0, first - time.monotonic()))
            channels = [worker.channel.fileno() for worker in busy]
            if batch.bell in wait([*channels, batch.bell], patience):
                batch.heed()
                return []

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._memory_limit)


class _Worker:
    """A judging process and the piece of work that it has."""

    def __init__(self, memory_limit: int) -> None:
        ours, theirs = socket.socketpair()
        # A worker that does not read, such as one that was stopped, is one that does
        # not start.
        limit = struct.pack("ll", int(START_LIMIT), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        mark = secrets.token_bytes(MARK_SIZE)
        self.channel = Channel(ours, mark)
        arguments = (theirs.fileno(), mark.hex(), os.getpid(), memory_limit)
        path = [entry or os.getcwd() for entry in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *map(str, arguments), *path],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            # A session of its own: Ctrl-C passes it by, and a kill takes all of it.
            start_new_session=True,
            # A judge that imports jax must not take the accelerator.
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        theirs.close()
        self.piece: Piece | None = None
        self.started = False
        self.deadline = math.inf
        self.excess = ""

    def assign(
        self,
        pickled: bytes,
        piece: Piece,
        part: tuple[Prompts, list[str]],
        limit: float,
    ) -> None:
        self.piece = piece
        self.started = False
        self.deadline = time.monotonic() + START_LIMIT
        # A worker that died while idle shows as a closed channel in `receive`.
        with suppress(OSError):
            self.channel.send((pickled, *part, limit))

    def look(self, most_memory: int) -> None:
        """Notes whether it holds too much memory (where the system says so)."""
        with suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
            if (size := pages * os.sysconf("SC_PAGE_SIZE")) > most_memory:
                self.excess = f"the judge's process took {size / 2**30:.1f} GiB"

    def has_event(self) -> bool:
        late = time.monotonic() >= self.deadline
        return bool(self.excess) or late or self.channel.ready()

    def receive(self) -> tuple[str, Any]:
        """What happened: ("done" | "errors" | ..., verdicts or reason)."""
        if self.excess:
            return "crashes", self.excess
        if not self.channel.ready():
            what = "judging" if self.started else "starting"
            return "timeouts", f"time-out while {what}"
        try:
            return self.channel.receive()
        except ForeignBytes:
            return "crashes", "the judge wrote into the socket of its verdicts"
        except (EOFError, OSError):
            # A judge may also have closed the socket and live on.
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            status = self.process.returncode
            return "crashes", f"the judge's process died (exit status {status})"
        except Exception as error:
            return "errors", f"unreadable verdict: {describe(error)}"

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()


def name_of(judge: Judge) -> str:
    """What logs call a judge: its own `name`, or module and name of the function.

    >>> from jaxrl_post.tasks.rows import exact_match
    >>> name_of(exact_match)
    'jaxrl_post.tasks.rows.exact_match'
    """
    if isinstance(name := getattr(judge, "name", None), str):
        return name
    named = judge if hasattr(judge, "__qualname__") else type(judge)
    return f"{named.__module__}.{named.__qualname__}"


def _machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that this is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max" where there is no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def _dumps(judge: Judge) -> bytes:
    try:
        return pickle.dumps(judge)
    except Exception as error:
        raise InputError(
            f"The judge cannot be pickled ({describe(error)}). Make it a function of a "
            "module, or an instance of a class of a module, not a lambda or closure."
        ) from error
