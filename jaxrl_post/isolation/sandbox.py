"""Runs programs that a model wrote, where they can do no harm.

Levels, from strong to weak:

- ``"required"``: bubblewrap. New namespaces (no network, no other processes), a file
  system that holds an interpreter and nothing else, limits, and a filter of system
  calls. Where it does not work nothing is run.
- ``"kernel"``: landlock and a seccomp filter, on the machine's own file system and
  network stack, and limits. Nothing to install; files outside cannot be opened, but
  their names and sizes can be seen.
- ``"limits"``: limits alone, and another user where the caller is root. Programs read
  what everybody may read and reach the network: for programs that you trust.

What each contains is measured: docs/sandbox.md.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jaxrl_post.errors import InputError, nearest, one_line
from jaxrl_post.isolation import guest

LEVELS = ("required", "kernel", "limits")

_GUEST = Path(guest.__file__).read_text(encoding="utf-8")
_USERS = 61184, 65519
"""User ids that belong to nobody (systemd's dynamic users). Each run has its own, so
that what is counted per user is counted per run."""


class SandboxError(RuntimeError):
    """The sandbox failed, and says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one run may take.

    Attributes:
      seconds: of wall time, start included; processor time is limited to a second more.
      memory: bytes of address space, of which an interpreter needs 30 MB.
      output: bytes of standard output and error together.
      files: open at once.
      threads: at once. A program has one process.
      space: bytes of a file, and of all files; they are in memory.
    """

    seconds: float = 6.0
    memory: int = 2**30
    output: int = 2**22
    files: int = 64
    threads: int = 32
    space: int = 2**24


@dataclass(frozen=True)
class Result:
    """What became of a program.

    Attributes:
      code: it ended with; 128 + n after signal n.
      output: what it wrote to standard output; of a call, the JSON of what the function
        returned. Cut at the limit.
      error: what it wrote to standard error.
      stopped: ``"time"`` or ``"output"`` where that limit ended it, else None.
      seconds: wall time.
    """

    code: int
    output: str
    error: str
    stopped: str | None
    seconds: float


def run(
    program: str,
    *,
    stdin: str = "",
    call: tuple[str, Sequence[Any]] | None = None,
    level: str = "required",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Result:
    """Runs a Python program by itself, with the standard library and nothing else.

    Args:
      program: its text.
      stdin: what it may read.
      call: name and arguments (JSON values) of a function to call in the end, of the
        class ``Solution`` where there is one. What the program prints is dropped then.
      level: one of `LEVELS`.
      limits: what it may take.

    Raises:
      InputError: the level does not work on this machine; says what to do.
      SandboxError: this once the sandbox did not get as far as the program.
    """
    if problem := unavailable(level):
        raise InputError(problem)
    return _run(program, stdin, call, level, limits)


@cache
def unavailable(level: str) -> str | None:
    """Why a level does not work on this machine, and what to do; None where it does.

    >>> unavailable("strong")
    "Unknown sandbox level 'strong'; known: kernel, limits, required."
    """
    if level not in LEVELS:
        return f"Unknown sandbox level {level!r}; {nearest(level, LEVELS)}"
    remedy = (
        "sandbox: required needs bubblewrap (Debian, Ubuntu: apt-get install "
        "bubblewrap) and leave to make namespaces. sandbox: kernel and sandbox: limits "
        "are weaker; docs/sandbox.md says what each contains."
    )
    if not sys.platform.startswith("linux"):
        return "The sandbox needs Linux."
    if level == "required" and not shutil.which("bwrap"):
        return f"There is no bwrap on this machine. {remedy}"
    try:
        result = _run("print(7)", "", None, level, Limits(seconds=20))
        if result.output == "7\n":
            return None
        problem = " ".join(result.error.split())[-300:] or f"exit {result.code}"
    except (OSError, SandboxError) as error:
        problem = one_line(error)
    return f"The sandbox does not work on this machine ({problem}). {remedy}"


def _run(
    program: str,
    stdin: str,
    call: tuple[str, Sequence[Any]] | None,
    level: str,
    limits: Limits,
) -> Result:
    root = os.geteuid() == 0
    interpreter = _interpreter(level, root)
    readable = _readable(interpreter)
    job = {
        # Half of a character is nothing that a file can hold; it becomes a "?".
        "program": program.encode(errors="replace").decode(),
        "call": call,
        "level": level,
        "user": _user() if root else None,
        "readable": readable,
        "limits": _resources(limits, count=root or level == "required"),
    }
    with ExitStack() as stack:
        described = stack.enter_context(_sealed(json.dumps(job).encode()))
        given = stack.enter_context(_sealed(stdin.encode(errors="replace")))
        ready, ready_there = os.pipe()
        stack.callback(os.close, ready)
        start = time.monotonic()
        inside = [interpreter, "-I", "-S", "-X", "utf8", "-c", _GUEST]
        inside += [str(described.fileno()), str(ready_there)]
        try:
            process = subprocess.Popen(
                [*_bubblewrap(readable, root, limits), *inside]
                if level == "required"
                else inside,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(described.fileno(), ready_there),
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(ready_there)
        with process:
            try:
                output, error, stopped = _collect(process, start, limits)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        os.set_blocking(ready, False)
        try:
            begun = os.read(ready, 1)
        except BlockingIOError:
            begun = b""
        seconds = time.monotonic() - start
    if not begun:
        told = " ".join(error.split())[-300:]
        raise SandboxError(f"the program was not begun: {told or stopped or 'killed'}")
    code = process.returncode
    code = 128 - code if code < 0 else code
    if code == 128 + signal.SIGXCPU:
        stopped = "time"
    return Result(code, output, error, stopped, seconds)


def _user() -> int:
    first, last = _USERS
    return first + time.monotonic_ns() // 1000 % (last - first + 1)


def _resources(limits: Limits, count: bool) -> dict[str, int]:
    """The limits that the kernel keeps; `count`: the user's threads are this run's."""
    return {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_NOFILE": limits.files,
        "RLIMIT_FSIZE": limits.space,
        "RLIMIT_CORE": 0,
        **({"RLIMIT_NPROC": limits.threads} if count else {}),
    }


def _collect(
    process: subprocess.Popen, start: float, limits: Limits
) -> tuple[str, str, str | None]:
    """What the process writes until it ends or a limit is reached, and which."""
    assert process.stdout is not None and process.stderr is not None
    output, error, stopped = bytearray(), bytearray(), None
    end = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, error)
        selector.register(end, selectors.EVENT_READ)
        ended = False
        while not ended or selector.get_map():
            left = start + limits.seconds - time.monotonic()
            if left <= 0 and not ended:
                stopped = "time"
                break
            events = selector.select(0 if ended else left)
            if ended and not events:
                break  # what still holds the pipes is not the program
            for key, _ in events:
                if key.fd == end:
                    ended = True
                    selector.unregister(end)
                elif more := os.read(key.fd, 2**16):
                    key.data.extend(more)
                else:
                    selector.unregister(key.fileobj)
            if len(output) + len(error) > limits.output:
                stopped = "output"
                break
    os.close(end)
    del output[limits.output :], error[limits.output :]
    return output.decode(errors="replace"), error.decode(errors="replace"), stopped


def _sealed(content: bytes) -> Any:
    """A file in memory that nobody can change any more."""
    flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
    file = open(os.memfd_create("sandbox", flags), "rb+")
    file.write(content)
    file.flush()
    file.seek(0)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
    return file


@cache
def _interpreter(level: str, root: bool) -> str:
    """This Python's own file; one that another user can read, where it becomes one."""
    own = Path(sys.executable).resolve()
    candidates = [own, Path("/usr/bin/python3").resolve()]
    if level == "required" or not root:
        return str(own)
    for candidate in candidates:
        parts = [candidate, *candidate.parents]
        if all(part.exists() and part.stat().st_mode & 1 for part in parts):
            return str(candidate)
    raise SandboxError(f"{own} is in a folder that other users cannot read")


@cache
def _readable(interpreter: str) -> list[str]:
    """Files and folders that an interpreter needs."""
    prefix = Path(interpreter).parents[1]
    folders = [prefix / "lib", prefix / "lib64"]
    folders += map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64"))
    files = [Path(interpreter), Path("/etc/ld.so.cache")]
    devices = [Path("/dev") / name for name in ("null", "zero", "urandom", "random")]
    return [str(path) for path in (*folders, *files, *devices) if path.exists()]


def _bubblewrap(readable: Sequence[str], root: bool, limits: Limits) -> list[str]:
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session"]
    if root:
        # A user namespace of root's has no other user, and root's processes are not
        # counted: without one, the program becomes another user and can be limited.
        command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        command += ["--unshare-cgroup-try", "--cap-add", "CAP_SETUID"]
        command += ["--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-all"]
    parents = {str(parent) for path in readable for parent in Path(path).parents}
    for parent in sorted(parents - {"/"}):  # bubblewrap would make them root's alone
        command += ["--perms", "0755", "--dir", parent]
    for path in readable:
        if path.startswith("/dev/"):
            command += ["--dev-bind", path, path]
        elif Path(path).is_symlink():
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    return [
        *command,
        *("--perms", "1777", "--size", str(limits.space), "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp"),
    ]
