"""The tiny task with a demonstration for every question."""

from __future__ import annotations

from tiny_task import judge

from jaxrl_post.tasks import Row, RowsTask


def load(split="train", count=10):
    """`count` different questions; the demonstrations differ too."""
    first = 0 if split == "train" else 100
    rows = [
        Row(
            str(first + i),
            ({"role": "user", "content": f"say {first + i}"},),
            demonstration=f"A{i}",
        )
        for i in range(count)
    ]
    return RowsTask("shown", rows, judge)
