"""What a run keeps of its completions: one file for each step, one row for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_post.recipes.groups import Groups


def completions_file(run_dir: Path, step: int) -> Path:
    """Where a run keeps the completions of a step."""
    return run_dir / "completions" / f"step_{step:06d}.jsonl"


def completion_rows(
    step: int, groups: Groups, advantages: np.ndarray
) -> list[dict[str, Any]]:
    """What ``completions/`` keeps of a step: one row per sequence.

    Args:
      step: its number.
      groups: as the batch was made of them.
      advantages: ``[P, G]``.
    """
    rows: list[dict[str, Any]] = []

    def observed(p: int, g: int, length: int) -> dict[str, Any]:
        if groups.observed is None:
            return {}
        return {"observed": groups.observed[p, g, :length].astype(int).tolist()}

    for p, verdicts in enumerate(groups.verdicts):
        prompt_ids = groups.contexts[p][groups.context_mask[p]].tolist()
        for g, verdict in enumerate(verdicts):
            length = int(groups.mask[p, g].sum())
            given = 0 if groups.is_teacher is None else groups.is_teacher[p, g].sum()
            rows.append(
                {
                    "step": step,
                    "prompt_id": groups.prompts.ids[p],
                    "prompt": groups.prompts.messages[p][-1]["content"],
                    "response": groups.completions[p][g],
                    "prompt_ids": prompt_ids,
                    "response_ids": groups.tokens[p, g, :length].tolist(),
                    "mask": groups.mask[p, g, :length].astype(int).tolist(),
                    # The shortest decimals that are this float32 and no other.
                    "sampler_logps": [
                        float(str(x)) for x in groups.sampler_logps[p, g, :length]
                    ],
                    "stopped": bool(groups.stopped[p, g]),
                    "reward": verdict.reward,
                    "success": verdict.success,
                    "feedback": verdict.feedback,
                    "advantage": float(advantages[p, g]),
                    **observed(p, g, length),
                    **({"teacher_tokens": int(given)} if given else {}),
                    "extra": dict(verdict.extra),
                }
            )
    return rows
