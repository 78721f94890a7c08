"""A task whose judge is wrong in every way, by how long a completion is."""

from __future__ import annotations

import os
import time

from jaxrl_post.tasks import Row, RowsTask
from jaxrl_post.types import Verdict


def judge(prompts, completions):
    """One fault per remainder; every other completion is judged."""
    verdicts = []
    for completion in completions:
        fault = sum(completion.encode()) % 16
        if fault == 0:
            time.sleep(3600)
        elif fault == 1:
            os._exit(1)
        elif fault == 2:
            raise RuntimeError("no")
        elif fault == 3:
            return None
        elif fault == 4:
            verdicts.append(Verdict(float("nan")))
        elif fault == 5:
            verdicts.append(Verdict(None))
        elif fault == 6:
            verdicts += [Verdict(1.0), Verdict(1.0)]
        elif fault == 7:
            verdicts.append(Verdict(1.0, "yes", extra={"answer": []}))
        else:
            right = fault % 2 == 0
            extra = {"answer": str(fault), "parsed": right}
            verdicts.append(Verdict(float(right), right, extra=extra))
    return verdicts


def load(split="train"):
    """Ten questions."""
    rows = [
        Row(f"{split}{i}", ({"role": "user", "content": f"say {i}"},))
        for i in range(10)
    ]
    return RowsTask("bad", rows, judge)


def one_short(completions, **columns):
    """A reward function that forgets a completion."""
    return [0.0 for _ in completions][1:]


def raises(completions, **columns):
    """A reward function that knows no answer that it can read."""
    raise ValueError("unreadable")
