"""Questions that a random model answers now and then, or never, with feedback."""

from __future__ import annotations

from jaxrl_post.tasks import Row, RowsTask
from jaxrl_post.types import Verdict


def judge(prompts, completions):
    """A success begins with a printable character, if there is any for the question."""
    return [
        Verdict(1.0, True)
        if columns["possible"] and " " <= completion[:1] <= "~"
        else Verdict(0.0, False, f"not {completion[:1]!a}.")
        for columns, completion in zip(prompts.columns, completions, strict=True)
    ]


def load(split="train"):
    """Two questions; nothing answers the first."""
    rows = [
        Row(name, ({"role": "user", "content": f"say {name}"},), {"possible": possible})
        for name, possible in (("one", False), ("two", True))
    ]
    return RowsTask("rare", rows, judge)


def unsure(prompts, completions):
    """Rewards alone."""
    return [Verdict(0.5) for _ in completions]


def load_unsure(split="train"):
    """As `load`, with a judge that does not know what a success is."""
    task = load(split)
    task.judge = unsure
    return task
