"""The other side of the judge pool: a process that judges what it is sent.

Started by `jaxrl_post.isolation.pool`; imports neither jax nor the tasks until a judge
that needs them arrives.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import pickle
import resource
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxrl_post.isolation.channel import Channel
from jaxrl_post.types import Judge, Prompts, Verdict


def call(
    judge: Judge, prompts: Prompts, completions: Sequence[str]
) -> list[Verdict] | str:
    """The verdicts of a judge, or in words why there are none.

    Anything but one `Verdict` per completion is a bug of the judge and reported as one.
    """
    try:
        verdicts = list(judge(prompts, completions))
    except (Exception, SystemExit) as error:
        return describe(error)
    for i, verdict in enumerate(verdicts):
        if not isinstance(verdict, Verdict):
            return f"the judge returned {verdict!r:.200} where a Verdict belongs"
        try:
            verdicts[i] = _plain(verdict)
        except Exception as error:
            return describe(error)
    if len(verdicts) != len(completions):
        return (
            f"the judge returned {len(verdicts)} verdicts for {len(completions)} "
            "completions"
        )
    return verdicts


def _plain(verdict: Verdict) -> Verdict:
    """A verdict of Python's own numbers, whose parts are what they should be.

    What is wrong with one must show here, where it costs one completion, and not in
    the middle of a training step that makes means and votes of them.
    """
    reward, success, extra = verdict.reward, _python(verdict.success), verdict.extra
    if success is not None and not isinstance(success, bool):
        raise TypeError(f"Verdict.success is {success!r:.200}; it is a bool, or None")
    if verdict.feedback is not None and not isinstance(verdict.feedback, str):
        raise TypeError(f"Verdict.feedback is {verdict.feedback!r:.200}, no text")
    observation = verdict.observation
    said = observation["content"] if isinstance(observation, Mapping) else observation
    if said is not None and not isinstance(said, str):
        raise TypeError(f"Verdict.observation is {observation!r:.200}, no text")
    if not isinstance(extra, Mapping):
        raise TypeError(f"Verdict.extra is {extra!r:.200}; it is a mapping")
    hash(extra.get("answer"))  # answers are voted on
    if not isinstance(_python(extra.get("parsed", False)), bool | float | int):
        raise TypeError(f"Verdict.extra['parsed'] is {extra['parsed']!r:.200}, no bool")
    reward = None if reward is None else float(reward)
    return Verdict(reward, success, verdict.feedback, extra, observation)


def _python(value: Any) -> Any:
    """Numpy's scalars as Python's."""
    return value.item() if hasattr(value, "item") else value


def describe(error: BaseException) -> str:
    """Type and message of an error, short enough for a table.

    >>> describe(ValueError("no number"))
    'ValueError: no number'
    """
    return f"{type(error).__name__}: {error}"[:500]


def serve(descriptor: int, mark: str, parent: int, memory_limit: int) -> None:
    """Judges what comes through the channel until its other end is closed.

    Args:
      descriptor: of the channel's socket.
      mark: of its messages, in hexadecimal digits.
      parent: process id of the pool's owner; this process dies with it.
      memory_limit: bytes of address space, 0 for no limit.
    """
    # Judges may print: the owner's standard output is not theirs to write on.
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if memory_limit:
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    # When memory runs out, the kernel should take this process, not the trainer.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()

    own = os.getpid()
    channel = Channel(_hidden(descriptor), bytes.fromhex(mark))
    loaded, judge = b"", None
    with open(os.devnull, "w") as devnull:
        while True:
            try:
                pickled, prompts, completions, limit = channel.receive()
            except EOFError:
                return
            if pickled != loaded:
                try:
                    judge = pickle.loads(pickled)
                except Exception as error:
                    channel.send(("unloadable", describe(error)))
                    continue
                loaded = pickled
            assert judge is not None
            channel.send(("started", None))
            # The owner kills at the limit. This is for a dead owner and a judge that
            # never lets go of the interpreter lock, which `_die_with` would need.
            faulthandler.dump_traceback_later(limit + 5, exit=True, file=devnull)
            outcome = call(judge, prompts, completions)
            if os.getpid() != own:  # a fork of the judge's that returned from it
                os._exit(0)
            faulthandler.cancel_dump_traceback_later()
            channel.send_bytes(_pickled(outcome))


def _hidden(descriptor: int) -> socket.socket:
    """The socket, away from the low descriptors and from what a judge starts."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, min(most, 1024) // 2)
    os.close(descriptor)
    return socket.socket(fileno=high)


def _pickled(outcome: list[Verdict] | str) -> bytes:
    kind = "errors" if isinstance(outcome, str) else "done"
    try:
        return pickle.dumps((kind, outcome))
    except Exception as error:
        return pickle.dumps(("errors", f"unpicklable verdict: {describe(error)}"))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
