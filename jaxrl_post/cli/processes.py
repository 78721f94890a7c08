"""Several processes from the command line: their arguments, and who watches them.

jax ends a process at once when another one is lost, from within, whatever Python is
doing. So the command's own process stays small and does not compute: it starts the one
that does, hands signals and output on, and says at the end what the matter was.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from jaxrl_post.errors import InputError

_CHILD = "JAXRL_POST_CHILD"

_GRACE = 10.0
"""Seconds that a process gets to end after jax has given it up."""

_FATAL = re.compile(rb"[EF]\d{4} [\d:.]+ .*(coordination_service|JAX distributed)")
"""How the last words begin that jax's coordination service lets a process say."""

_NOISE = b"[Gloo] Rank "


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
      coordinator: ``host:port`` where process 0 listens; None: jax finds it.
      count: how many there are.
      index: of this one.
      start_timeout: seconds that they wait for each other.
      heartbeat_timeout: seconds of silence after which one is taken for lost.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    start_timeout: float
    heartbeat_timeout: float

    def name(self) -> str:
        """This process, for messages."""
        if self.index is None:
            return "this process"
        return f"process {self.index} of {self.count}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how processes find each other."""
    group = parser.add_argument_group(
        "several processes",
        "The same command in every process, on every host; docs/processes.md says "
        "more. Variables of the environment may stand for the first three.",
    )
    # argparse converts defaults that are text.
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default=os.getenv("JAX_COORDINATOR_ADDRESS"),
        help="where process 0 is to listen (JAX_COORDINATOR_ADDRESS)",
    )
    group.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=os.getenv("JAX_NUM_PROCESSES"),
        help="in all (JAX_NUM_PROCESSES)",
    )
    group.add_argument(
        "--process",
        metavar="I",
        type=int,
        default=os.getenv("JAX_PROCESS_ID"),
        help="this one, from 0 (JAX_PROCESS_ID)",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="what is not given is found by jax: on TPU pods, under Slurm and Open MPI",
    )
    group.add_argument(
        "--start-timeout",
        metavar="S",
        type=float,
        default=300.0,
        help="seconds that processes wait for each other (default: 300)",
    )
    group.add_argument(
        "--heartbeat-timeout",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds of silence after which one is lost and all end (default: 30)",
    )


def group_of(arguments: argparse.Namespace) -> Group | None:
    """The group that the arguments describe; None where there is one process.

    Raises:
      InputError: they are incomplete, or out of range.
    """
    given = {
        "--coordinator": arguments.coordinator,
        "--processes": arguments.processes,
        "--process": arguments.process,
    }
    if not arguments.distributed:
        missing = [flag for flag, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise InputError(
                f"{', '.join(missing)} must be given too: every process needs the "
                "coordinator's address, their number and its own. (--distributed lets "
                "jax find them, on TPU pods and under Slurm and Open MPI.)"
            )
    group = Group(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        arguments.start_timeout,
        arguments.heartbeat_timeout,
    )
    if group.coordinator and not re.fullmatch(r".+:\d{1,5}", group.coordinator):
        raise InputError(f"--coordinator={group.coordinator}: must be HOST:PORT.")
    if group.count is not None and group.count < 1:
        raise InputError(f"--processes={group.count}: there must be one at least.")
    if group.index is not None and not 0 <= group.index < (group.count or math.inf):
        raise InputError(
            f"--process={group.index}: must be from 0 to {(group.count or 1) - 1}, one "
            f"less than --processes={group.count}."
        )
    for flag in ("start_timeout", "heartbeat_timeout"):
        if not 1 <= getattr(group, flag) < math.inf:
            name = f"--{flag.replace('_', '-')}"
            raise InputError(f"{name}={getattr(group, flag):g}: must be 1 s at least.")
    return group


def run(
    arguments: argparse.Namespace, work: Callable[[], int], advice: Callable[[], str]
) -> int:
    """`work()`, in a watched process of its own where it is one of several.

    Args:
      arguments: of the command.
      work: what the command does; returns its exit code.
      advice: what to do when a process was lost.
    """
    group = group_of(arguments)
    if group is None:
        return work()
    if _CHILD not in os.environ:
        return _watch(group, arguments.argv, advice, arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    from jaxrl_post.sharding import processes

    processes.start(
        group.coordinator,
        group.count,
        group.index,
        start_timeout=group.start_timeout,
        heartbeat_timeout=group.heartbeat_timeout,
    )
    return work()


def leave(code: int) -> int:
    """The exit code; where it is not 0, one of several processes ends here and now.

    Threads that wait for what the others will not do any more would hold it up.
    """
    if code and _CHILD in os.environ and "jax" in sys.modules:
        import jax

        sys.stdout.flush()
        sys.stderr.flush()
        jax.distributed.shutdown()  # all are here, or one was lost, and jax ends it
        os._exit(code)
    return code


def _end_with_parent() -> None:
    """The parent never writes: what ends the reading is its end."""
    os.read(0, 1)
    os._exit(1)


def _watch(
    group: Group,
    argv: Sequence[str],
    advice: Callable[[], str],
    arguments: argparse.Namespace,
) -> int:
    debug = getattr(arguments, "debug", False)
    child = subprocess.Popen(
        [sys.executable, "-m", "jaxrl_post.cli", *argv],
        env={**os.environ, _CHILD: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches it through here, once
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: child.send_signal(number))
    out = _Pipe(child.stdout, sys.stdout.buffer, lambda: None, debug)
    err = _Pipe(child.stderr, sys.stderr.buffer, lambda: _kill_later(child), debug)
    code = child.wait()
    for pipe in (out, err):
        pipe.join(timeout=2)  # judge processes, ending, may hold it a moment longer
    if code in (-signal.SIGINT, -signal.SIGTERM):
        return 128 - code
    if err.fatal or code < 0:
        print(f"error: {_cause(group, err.fatal, code)} {advice()}", file=sys.stderr)
        return 1
    return code


class _Pipe(threading.Thread):
    """Hands lines on, and keeps the last words of jax to itself.

    Attributes:
      fatal: those words.
    """

    def __init__(
        self,
        source: IO[bytes] | None,
        sink: IO[bytes],
        on_fatal: Callable[[], None],
        debug: bool,
    ) -> None:
        super().__init__(daemon=True)
        assert source is not None
        self.fatal = b""
        self._source, self._sink = source, sink
        self._on_fatal, self._debug = on_fatal, debug
        self.start()

    def run(self) -> None:
        for line in self._source:
            if not self.fatal and _FATAL.match(line):
                self._on_fatal()
                self.fatal = line
            elif self.fatal:
                self.fatal += line
            if self._debug or not (self.fatal or line.startswith(_NOISE)):
                self._sink.write(line)
                self._sink.flush()


def _kill_later(child: subprocess.Popen) -> None:
    timer = threading.Timer(_GRACE, child.kill)
    timer.daemon = True
    timer.start()


def _cause(group: Group, fatal: bytes, code: int) -> str:
    """Why the processes ended, in one sentence."""
    words = fatal.decode(errors="replace")
    if not words:
        return f"{group.name()} was killed by {signal.Signals(-code).name}."
    if "RegisterTask" in words:
        return (
            f"after --start-timeout={group.start_timeout:g} s not all "
            f"{group.count or ''} processes had come."
        )
    if lost := re.search(r"(?:unhealthy|stopped sending)[^\n]*\n((?:.*\d\n)+)", words):
        tasks = re.findall(r"(\d+)$", lost[1], re.MULTILINE)
        indices = sorted(set(map(int, tasks)))
        names = ", ".join(map(str, indices))
        plural = "es" if len(indices) > 1 else ""
        verb = "were" if len(indices) > 1 else "was"
        return f"process{plural} {names} of {group.count} {verb} lost."
    if "leader" in words or "Failed to send RPC" in words:
        return f"process 0 of {group.count or 'all'} was lost."
    return "another process was lost."
