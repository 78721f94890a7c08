"""A task that a random model is now and then right about: write low bytes."""

from __future__ import annotations

from dataclasses import replace

from jaxrl_post.tasks import Row, RowsTask, StreamTask
from jaxrl_post.types import Verdict


def judge(prompts, completions):
    """Reward for completions whose first character is below 'a'."""
    verdicts = []
    for completion in completions:
        right = completion[:1] < "a"
        extra = {"parsed": bool(completion), "answer": completion[:1]}
        verdicts.append(Verdict(float(right), right, extra=extra))
    return verdicts


def answering_judge(prompts, completions):
    """The same, and lets every turn go on."""
    verdicts = judge(prompts, completions)
    return [replace(verdict, observation="so?") for verdict in verdicts]


def load_in_turns(split="train", count=10):
    """The same questions, for answers of up to three turns."""
    rows = load(split, count).rows(range(count))
    rows = [Row(*row) for row in zip(rows.ids, rows.messages, strict=True)]
    return RowsTask("tiny", rows, answering_judge, turns=3)


def load(split="train", count=10):
    """`count` different questions."""
    first = 0 if split == "train" else 100
    rows = [
        Row(str(first + i), ({"role": "user", "content": f"say {first + i}"},))
        for i in range(count)
    ]
    return RowsTask("tiny", rows, judge)


def load_stream(split="train", count=10):
    """The same questions as a stream; those to evaluate on are held."""
    task = load(split, count)
    if split != "train":
        return task
    prompts = task.rows(range(count))

    def rows():
        return map(Row, prompts.ids, prompts.messages)

    return StreamTask("tiny", rows, judge, block=4)


def load_demonstrated(split="train", count=5, demonstrations=("4", "123", "x")):
    """`count` questions, to which the demonstrations are given in turn.

    By default the third of them is wrong: the judge rejects it.
    """
    task = load(split, count)
    given = [demonstrations[i % len(demonstrations)] for i in range(count)]
    prompts = task.rows(range(count))
    fields = (prompts.ids, prompts.messages, prompts.columns, given)
    rows = [Row(*row) for row in zip(*fields, strict=True)]
    return RowsTask("tiny", rows, judge)
