"""Runs the programs of sandbox_programs.py at each level: what is contained, and what not.

    python scripts/sandbox_table.py          # writes docs/evidence/sandbox.jsonl, and
                                             # the table of docs/sandbox.md
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
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from sandbox_programs import ATTACKS, CHEATS  # noqa: E402

from jaxrl_post.errors import InputError  # noqa: E402
from jaxrl_post.isolation import guest, sandbox  # noqa: E402
from jaxrl_post.tasks.code import CodeJudge  # noqa: E402
from jaxrl_post.types import Prompts  # noqa: E402

RESULTS = ROOT / "docs" / "evidence" / "sandbox.jsonl"
LIMITS = sandbox.Limits(seconds=2.0, memory=2**28, output=2**20)
PATIENCE = 1.5
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


def attack(program: str, level: str) -> str | None:
    """Runs one of `ATTACKS`; what it achieved, None where it was contained."""
    with bait() as laid:
        there = {path.name for path in laid.folder.iterdir()}
        start = time.monotonic()
        try:
            result = sandbox.run(laid.definitions + program, level=level, limits=LIMITS)
        except sandbox.SandboxError as error:
            return f"the sandbox failed: {error}"
        seconds = time.monotonic() - start
        said = result.output + result.error
        if laid.secret in said:
            return "a secret was read"
        if "ESCAPED" in result.output:
            return "did what it wanted"
        if len(said) > 2 * LIMITS.output:
            return "more output than the limit"
        if seconds > LIMITS.seconds + PATIENCE:
            return f"took {seconds:.1f} s"
        if {path.name for path in laid.folder.iterdir()} != there:
            return "files were changed"
        if laid.victim.poll() is not None:
            return "a process was killed"
        if any(map(_called, laid.listeners)):
            return "a connection was made"
        if _left():
            return "a process was left"
    return None


def cheat(program: str, level: str) -> str | None:
    """Judges one of `CHEATS`; what it achieved, None where it was not taken for right."""
    columns = {"tests": TESTS, "function": "add"}
    prompts = Prompts(("add",), ((),), (columns,), (None,))
    judge = CodeJudge(sandbox=level, seconds=LIMITS.seconds)
    with bait() as laid:
        answer = f"```python\n{laid.definitions}{program}\n```"
        verdict = judge(prompts, [answer])[0]
    return "was taken for right" if verdict.success or verdict.reward else None


def _called(listener: socket.socket) -> bool:
    with suppress(BlockingIOError):
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(10)
        return True
    return False


def _left() -> bool:
    """Whether a program runs that this process did not wait for."""
    time.sleep(0.05)  # what was killed needs a moment
    mark = (guest.__doc__ or "").encode()[:60]
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "cmdline").read_bytes():
                return True
    return False


def rows(level: str, only: str | None = None) -> Iterator[dict[str, str | None]]:
    """One per program: its category, its name and what it achieved."""
    for category, programs in {**ATTACKS, "cheating": CHEATS}.items():
        for name, program in programs.items():
            if only in (None, name):
                run = cheat if category == "cheating" else attack
                yield {
                    "level": level,
                    "category": category,
                    "program": name,
                    "achieved": run(program, level),
                }


def table(records: Sequence[dict[str, str | None]]) -> str:
    """Contained programs by category and level, and the names of those that are not."""
    levels = [x for x in sandbox.LEVELS if any(r["level"] == x for r in records)]
    lines = [f"| | {' | '.join(levels)} |", "|" + "---|" * (len(levels) + 1)]
    for category in [*dict.fromkeys(r["category"] for r in records), None]:
        cells = []
        for level in levels:
            here = [
                r
                for r in records
                if r["level"] == level and category in (None, r["category"])
            ]
            out = [str(r["program"]) for r in here if r["achieved"]]
            cell = f"{len(here) - len(out)} of {len(here)}"
            named = category is not None and out
            cells.append(f"{cell}; not: {', '.join(out)}" if named else cell)
        lines.append(f"| {category or '**all**'} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
        for record in rows(level, arguments.only):
            records.append(record)
            print(*record.values(), sep="\t", flush=True)
    print(f"\n{table(records)}")
    if not (arguments.level or arguments.only):
        about = {
            "user": "root" if os.geteuid() == 0 else "not root",
            "kernel": platform.release().split("-")[0],
            "machine": platform.machine(),
        }
        lines = [json.dumps({**record, **about}) for record in records]
        RESULTS.write_text("\n".join(lines) + "\n")
        import readme_tables

        readme_tables.main()
    escaped = [r for r in records if r["level"] == "required" and r["achieved"]]
    return int(bool(escaped))


if __name__ == "__main__":
    sys.exit(main())
