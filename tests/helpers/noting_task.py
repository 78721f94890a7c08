"""The tiny task, its judge noting down in a file what it has judged, in order."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tiny_task


@dataclass(frozen=True)
class Noting:
    """The tiny task's judge; after so many verdicts it waits until a file exists."""

    path: str
    after: int = 0
    until: str = ""

    def __call__(self, prompts, completions):
        notes = Path(self.path)
        if self.until and notes.exists():
            done = len(notes.read_text().splitlines())
            while done >= self.after and not Path(self.until).exists():
                time.sleep(0.01)
        with notes.open("a") as file:
            file.writelines(f"{name}\n" for name in prompts.ids)
        return tiny_task.judge(prompts, completions)


def load(split="train", path="", after=0, until=""):
    """The tiny task."""
    task = tiny_task.load(split)
    task.judge = Noting(path, after, until)
    return task
