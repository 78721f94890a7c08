"""Judged groups on the host, and demonstrations for them."""

from __future__ import annotations

import numpy as np

from jaxrl_post.recipes import Demonstrations, Groups
from jaxrl_post.types import Prompts, Verdict

TIME = 6


def make_groups(rewards) -> Groups:
    """Judged groups; completion ``g`` of each is the text ``"g"``, None not judged."""
    count, size = len(rewards), len(rewards[0])
    questions = [({"role": "user", "content": f"q{p}"},) for p in range(count)]
    known = np.array([[r is not None for r in row] for row in rewards])
    return Groups(
        prompts=Prompts(
            tuple(f"q{p}" for p in range(count)),
            tuple(questions),
            ({},) * count,
            (None,) * count,
        ),
        contexts=np.ones((count, 4), np.int32),
        context_mask=np.ones((count, 4), bool),
        tokens=np.ones((count, size, TIME), np.int32),
        mask=np.ones((count, size, TIME), bool),
        sampler_logps=np.zeros((count, size, TIME), np.float32),
        stopped=np.ones((count, size), bool),
        completions=tuple(tuple(str(g) for g in range(size)) for _ in rewards),
        verdicts=tuple(
            tuple(
                Verdict(None) if r is None else Verdict(float(r), bool(r)) for r in row
            )
            for row in rewards
        ),
        rewards=np.array([[r or 0.0 for r in row] for row in rewards], np.float32),
        judged=known,
    )


def make_demonstrations(available, length=3) -> Demonstrations:
    """One for each question, of `length` tokens 7, with reward 1 where available."""
    available = np.array(available, bool)
    count = len(available)
    mask = available[:, None] & (np.arange(TIME) < length)
    return Demonstrations(
        tokens=np.where(mask, 7, 99).astype(np.int32),  # garbage where there is none
        mask=mask,
        is_teacher=mask,
        sampler_logps=np.full((count, TIME), -0.5, np.float32),
        stopped=np.ones(count, bool),
        rewards=np.where(available, 1.0, 0.25).astype(np.float32),
        available=available,
        texts=tuple(f"demonstration {p}" for p in range(count)),
        verdicts=tuple(Verdict(1.0, True) if a else None for a in available),
    )
