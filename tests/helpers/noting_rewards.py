"""A reward function that notes with each completion what it was given beside it."""

from __future__ import annotations


def notes(completions, completion_ids, trainer_state, log_extra):
    """Reward for many tokens."""
    log_extra("ids", completion_ids)
    log_extra(
        "at", [[trainer_state.global_step, trainer_state.max_steps]] * len(completions)
    )
    return [float(len(ids) > 3) for ids in completion_ids]
