"""Runs the programs of sandbox_programs.py at each level: which are contained.

    python scripts/sandbox_table.py          # writes docs/evidence/sandbox.jsonl
    python scripts/readme_tables.py          # and from it the tables of docs/sandbox.md
    python scripts/sandbox_table.py --level required --only "fork bomb"

A program is contained if it printed no ESCAPED and no secret, ended in time, left no
process, no file and no connection behind, and the process beside it is as it was; a
cheat, if the judge of the code task did not take it for right.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from sandbox_programs import ATTACKS, CHEATS  # noqa: E402

from jaxrl_post.errors import InputError  # noqa: E402
from jaxrl_post.isolation import sandbox  # noqa: E402
from jaxrl_post.tasks.code import CodeJudge  # noqa: E402
from jaxrl_post.types import Prompts  # noqa: E402

RESULTS = ROOT / "docs" / "evidence" / "sandbox.jsonl"
LIMITS = sandbox.Limits(seconds=4.0, memory=2**28, output=2**20)
USER = "root" if os.geteuid() == 0 else "another user"
COST = "a run, median of 20"
Record = dict[str, str | None]
PATIENCE = 3.0
"""Seconds after the limit in which a run must be over on a busy machine."""

TESTS = [
    {"input": [1, 2], "output": 3},
    {"input": [10, -4], "output": 6},
    {"input": [100, -93], "output": 7},
]


@dataclass(frozen=True)
class Bait:
    """What programs are after.

    Attributes:
      folder: open to everybody.
      secret: what stands in a file, in the environment and in arguments.
      victim: a process of this user's.
      definitions: of the names that programs use.
      listeners: sockets on which nobody should call.
    """

    folder: Path
    secret: str
    victim: subprocess.Popen
    definitions: str
    listeners: Sequence[socket.socket]


@contextmanager
def bait() -> Iterator[Bait]:
    """Lays it out, and takes it away."""
    secret = secrets.token_hex(16)
    os.environ["JAXRL_SECRET"] = secret
    with tempfile.TemporaryDirectory(prefix="jaxrl-bait-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "bait").write_text("bait")
        (folder / "secret").write_text(secret)
        (folder / "tests.json").write_text(json.dumps(TESTS))
        victim = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(3600)", secret]
        )
        address = "\0jaxrl-" + secret
        listeners = [socket.socket() for _ in range(1)]
        listeners[0].bind(("127.0.0.1", 0))
        port = listeners[0].getsockname()[1]
        for kind, place in (
            (socket.SOCK_STREAM, address),
            (socket.SOCK_STREAM, f"{name}/socket"),
            (socket.SOCK_DGRAM, f"{name}/datagrams"),
        ):
            listeners.append(socket.socket(socket.AF_UNIX, kind))
            listeners[-1].bind(place)
        listeners.append(socket.socket(type=socket.SOCK_DGRAM))
        listeners[-1].bind(("127.0.0.1", port))
        for listener in listeners:
            listener.setblocking(False)
            if listener.type == socket.SOCK_STREAM:
                listener.listen()
        for path in folder.iterdir():
            path.chmod(0o777)
        definitions = (
            f"SECRET = {str(folder / 'secret')!r}; TARGET = {name!r}; PORT = {port}; "
            f"VICTIM = {victim.pid}; ADDRESS = {address!r}\n"
        )
        try:
            yield Bait(folder, secret, victim, definitions, listeners)
        finally:
            victim.kill()
            victim.wait()
            for listener in listeners:
                listener.close()
            del os.environ["JAXRL_SECRET"]
            for path in Path("/tmp").glob("escape-*"):
                with suppress(OSError):
                    path.unlink()


def attack(program: str, level: str) -> str | None:
    """Runs one of `ATTACKS`; what it achieved, None where it was contained."""
    mark = secrets.token_hex(16)  # in the arguments of this run's processes
    marked = mock.patch.object(sandbox, "_GUEST", f"{sandbox._GUEST}\n# {mark}")
    with bait() as laid, marked:
        there = _files(laid.folder)
        start = time.monotonic()
        try:
            result = sandbox.run(laid.definitions + program, level=level, limits=LIMITS)
        except sandbox.SandboxError as error:
            return f"the sandbox failed: {error}"
        seconds, left = time.monotonic() - start, _left(mark.encode())
        said = result.output + result.error
        if laid.secret in said:
            return "a secret was read"
        if "ESCAPED" in result.output:
            return "did what it wanted"
        if len(said) > 2 * LIMITS.output:
            return "more output than the limit"
        if seconds > LIMITS.seconds + PATIENCE:
            return f"took {seconds:.1f} s"
        if _files(laid.folder) != there:
            return "files were changed"
        if laid.victim.poll() is not None:
            return "a process was killed"
        if any(map(_called, laid.listeners)):
            return "a connection was made"
        if left:
            return "a process was left"
    return None


def cheat(program: str, level: str) -> str | None:
    """Judges one of `CHEATS`; what it achieved, None where that was nothing."""
    columns = {"tests": TESTS, "function": "add"}
    prompts = Prompts(("add",), ((),), (columns,), (None,))
    judge = CodeJudge(sandbox=level, seconds=LIMITS.seconds)
    with bait() as laid:
        answer = f"```python\n{laid.definitions}{program}\n```"
        verdict = judge(prompts, [answer])[0]
    return "was taken for right" if verdict.success or verdict.reward else None


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What is in a folder: size, rights and time of change."""
    found = {path.name: path.stat() for path in folder.iterdir()}
    return {n: (s.st_size, s.st_mode, s.st_mtime_ns) for n, s in found.items()}


def _called(listener: socket.socket) -> bool:
    with suppress(BlockingIOError):
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(10)
        return True
    return False


def marked(mark: bytes) -> list[int]:
    """Processes with this in their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def _left(mark: bytes) -> bool:
    """Whether such a process still runs; not after this."""
    time.sleep(0.05)  # what was killed needs a moment
    found = marked(mark)
    for process in found:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return bool(found)


def rows(level: str, only: str | None = None) -> Iterator[Record]:
    """One per program: its category, its name and what it achieved."""
    for category, programs in {**ATTACKS, "cheating": CHEATS}.items():
        for name, program in programs.items():
            if only in (None, name):
                run = cheat if category == "cheating" else attack
                yield {
                    "user": USER,
                    "level": level,
                    "category": category,
                    "program": name,
                    "achieved": run(program, level),
                }


def cost(level: str) -> Record:
    """How long the shortest program takes, start of the interpreter and all."""
    runs = [sandbox.run("print(1)", level=level).seconds for _ in range(20)]
    return {
        "user": USER,
        "level": level,
        "category": COST,
        "program": "print(1)",
        "achieved": None,
        "seconds": f"{statistics.median(runs):.3f}",
    }


def columns(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each level and user, the strong levels first."""
    found: dict[str, list[Record]] = {}
    for level in sandbox.LEVELS:
        for record in records:
            if record["level"] == level:
                found.setdefault(f"{level}, {record['user']}", []).append(record)
    return found


def table(records: Sequence[Record]) -> str:
    """Contained programs by category and level, in Markdown."""
    found = columns(records)
    lines = [f"| | {' | '.join(found)} |", "|" + "---|" * (len(found) + 1)]
    categories = dict.fromkeys(r["category"] for r in records)
    for category in [*(c for c in categories if c != COST), None]:
        cells = []
        for column in found.values():
            here = [r for r in column if r["category"] != COST]
            here = [r for r in here if category in (None, r["category"])]
            cells.append(f"{sum(not r['achieved'] for r in here)} of {len(here)}")
        lines.append(f"| {category or '**all**'} | {' | '.join(cells)} |")
    seconds = [
        [f"{r['seconds']} s" for r in column if r["category"] == COST]
        for column in found.values()
    ]
    lines.append(f"| {COST} | {' | '.join(map(', '.join, seconds))} |")
    return "\n".join(lines)


def escapes(records: Sequence[Record]) -> str:
    """The programs that are not contained, in Markdown."""
    lines = ["| | not contained |", "|---|---|"]
    for name, column in columns(records).items():
        out: dict[str, list[str]] = {}
        for r in column:
            if r["achieved"]:
                out.setdefault(str(r["category"]), []).append(str(r["program"]))
        told = "; ".join(f"{key}: {', '.join(names)}" for key, names in out.items())
        lines.append(f"| {name} | {told or 'none'} |")
    return "\n".join(lines)


def read() -> list[Record]:
    """The committed results; none before there are any."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints and writes; 0 if all is contained at the level ``required``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--level", choices=sandbox.LEVELS)
    parser.add_argument("--only", help="name of a program")
    arguments = parser.parse_args(argv)
    records = []
    for level in [arguments.level] if arguments.level else sandbox.LEVELS:
        if problem := sandbox.unavailable(level):
            raise InputError(problem)
        whole = [] if arguments.only else [cost(level)]
        for record in [*rows(level, arguments.only), *whole]:
            records.append(record)
            print(*map(str, record.values()), sep="\t", flush=True)
    print(f"\n{table(records)}\n\n{escapes(records)}")
    if not (arguments.level or arguments.only):
        about = {
            "kernel": platform.release().split("-")[0],
            "machine": platform.machine(),
        }
        kept = [record for record in read() if record["user"] != USER]
        kept += [{**record, **about} for record in records]
        RESULTS.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
    escaped = [r for r in records if r["level"] == "required" and r["achieved"]]
    return int(bool(escaped))


if __name__ == "__main__":
    sys.exit(main())
