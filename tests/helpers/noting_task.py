"""The tiny task, its judge noting down in a file what it has judged, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiny_task


@dataclass(frozen=True)
class Noting:
    """The tiny task's judge."""

    path: str

    def __call__(self, prompts, completions):
        with Path(self.path).open("a") as file:
            file.writelines(f"{name}\n" for name in prompts.ids)
        return tiny_task.judge(prompts, completions)


def load(split="train", path="", count=10):
    """The tiny task."""
    task = tiny_task.load(split, count)
    task.judge = Noting(path)
    return task
