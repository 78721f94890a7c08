"""Plays a page of the docs in an empty folder: ``python pages.py PAGE``.

Its blocks are taken in their order. One that begins with ``# name.py``, or with a name
that ends in ``.yaml``, becomes that file; other Python is run. Of a bash block every
line is a command of ``jaxrl-post``, or exports a variable. A text block that begins
with ``error: `` is what the command before it prints in that one line, which then ends
with 2 and leaves nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A fenced block: its language and what it holds."""

    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are played."""
    pattern = r"^```(python|yaml|bash|text)\n(.*?)^```$"
    return [Block(*x) for x in re.findall(pattern, page.read_text(), flags=re.M | re.S)]


def commands(block: Block) -> list[str]:
    """The lines of a bash block, those that go on over a backslash as one."""
    return [x for x in block.text.replace("\\\n", " ").splitlines() if x.strip()]


def tree(folder: Path) -> set[str]:
    """Every path below the folder, but for Python's caches."""
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {path for path in paths if "__pycache__" not in path}


def play(page: Path) -> None:
    """Plays a page in the current folder; raises AssertionError where it is wrong."""
    found = blocks(page)
    for block in found:
        if block.kind == "bash":
            exported = re.findall(r"^export (\w+)=(.*)$", block.text, flags=re.M)
            os.environ.update(exported)  # before jax reads them
    sys.path.insert(0, os.getcwd())
    names: dict = {"__name__": "__main__"}
    for block, after in zip(found, [*found[1:], Block("", "")], strict=True):
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", block.text):
            Path(name[1]).write_text(block.text)
        elif block.kind == "python":
            exec(compile(block.text, "snippet", "exec"), names)
        elif block.kind == "bash":
            *lines, last = commands(block)
            wrong = after.text if after.text.startswith("error: ") else None
            for line in lines:
                run(line, None)
            run(last, wrong)


def run(line: str, error: str | None) -> None:
    """Runs a command, which ends well, or with exactly this error."""
    from jaxrl_post.cli import main

    program, *arguments = shlex.split(line, comments=True)
    if program == "export":
        return
    assert program == "jaxrl-post", f"{line!r} is no command of jaxrl-post"
    before, err = tree(Path.cwd()), io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(arguments)
    said = f"{line}: exit code {code}\n{err.getvalue()}"
    if error is None:
        assert code == 0, said
    else:
        assert code == 2 and err.getvalue() == error, said
        assert tree(Path.cwd()) == before, f"{line} left something behind"


if __name__ == "__main__":
    play(Path(sys.argv[1]))
