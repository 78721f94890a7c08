"""What a glance at a run's numbers should not miss, in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_post.report.run import Run

RECENT = 10
"""Steps that say how a run is doing now; as many say how it began."""

_LONG = 2 * RECENT


class Alert(NamedTuple):
    """Something that deserves a look.

    Attributes:
      name: of the kind.
      words: what was seen, and what may help.
    """

    name: str
    words: str


def alerts(run: Run) -> list[Alert]:
    """All that a run gives reason for; what was not measured gives none."""
    found = ((name, check(run)) for name, check in _CHECKS.items())
    return [Alert(name, words) for name, words in found if words]


def _flat(run: Run) -> str | None:
    rewards = _values(run, "reward/mean")
    if len(rewards) < _LONG:
        return None
    part = max(len(rewards) // 4, 5)
    early, late = rewards[:part], rewards[-part:]
    noise = ((statistics.variance(early) + statistics.variance(late)) / part) ** 0.5
    gain = statistics.mean(late) - statistics.mean(early)
    if gain > 2 * noise:
        return None
    return (
        f"The mean reward of the last {part} steps is {gain:+.3f} from that of the "
        f"first {part}, within two standard errors ({2 * noise:.3f}) or below. Look "
        "at the completions; try a larger learning rate, or questions that are "
        "neither hopeless nor solved."
    )


def _no_variance(run: Run) -> str | None:
    shares = _values(run, "reward/zero_std_groups")
    alike = sum(share == 1 for share in shares)
    if len(shares) < 5 or 2 * alike < len(shares):
        return None
    return (
        f"In {alike} of {len(shares)} steps all rewards of every group were equal: "
        "group-relative advantages are 0 there. Mix the difficulties, enlarge "
        "training.group_size, or set recipe.dynamic_sampling."
    )


def _no_success(run: Run) -> str | None:
    shares = _values(run, "reward/success")
    if len(shares) < 5 or any(shares):
        return None
    return (
        f"No completion was right in {len(shares)} steps. Check the judge on a right "
        "answer, or begin with easier questions or demonstrations (SFT, HAPO)."
    )


def _truncated(run: Run) -> str | None:
    shares = _values(run, "length/truncated")[-RECENT:]
    if not shares or (share := statistics.mean(shares)) <= 0.2:
        return None
    return (
        f"{share:.0%} of the last steps' completions reached "
        "sampling.max_new_tokens, and could not finish their answer; raise it."
    )


def _entropy_collapse(run: Run) -> str | None:
    early, late = _ends(run, "entropy")
    if early is None or late is None or not late < 0.1 * early:
        return None
    return (
        f"Entropy fell from {early:.3f} to {late:.3f} nats per token: the policy no "
        "longer explores. Raise recipe.clip_high, lower the learning rate, or add a "
        "KL term (recipe.kl_weight)."
    )


def _length_explosion(run: Run) -> str | None:
    early, late = _ends(run, "length/mean")
    if early is None or late is None or not late > 2 * early:
        return None
    return (
        f"Responses grew from {early:.0f} to {late:.0f} tokens. See whether the "
        "longer ones are better, or only longer; an overlong penalty holds them."
    )


def _capped(run: Run) -> str | None:
    shares = _values(run, "information/capped")
    if len(shares) < 5 or (share := statistics.mean(shares)) <= 0.5:
        return None
    return (
        f"The step multiplier was at its cap in {share:.0%} of the updates: it is a "
        "constant there, and no longer follows the information gain. Lower "
        "recipe.sensitivity or raise recipe.max_multiplier."
    )


def _teacher_behind(run: Run) -> str | None:
    teacher = dict(run.series("teacher/accuracy"))
    pairs = [
        (step, own, teacher.get(step))
        for step, own in run.series("teacher/student_accuracy")
    ]
    measured = [(s, a, b) for s, a, b in pairs if a is not None and b is not None]
    if not measured or measured[-1][2] >= measured[-1][1]:
        return None
    step, own, other = measured[-1]
    return (
        f"At step {step} the teacher was right in {other:.0%} of its answers and the "
        f"student, without its context, in {own:.0%}: what it teaches makes the "
        "student worse. Look at its contexts."
    )


def _skipped(run: Run) -> str | None:
    shares = _values(run, "update/skipped")
    skipped = sum(share > 0 for share in shares)
    if not skipped:
        return None
    return (
        f"Updates of {skipped} of {len(shares)} steps were skipped, for a loss or a "
        "gradient that was not finite, or for a spike; their batches are in faults/."
    )


_CHECKS: dict[str, Callable[[Run], str | None]] = {
    "Flat rewards": _flat,
    "No success": _no_success,
    "Steps without variance": _no_variance,
    "Truncation": _truncated,
    "Entropy collapse": _entropy_collapse,
    "Length explosion": _length_explosion,
    "Capped multiplier": _capped,
    "Teacher worse than student": _teacher_behind,
    "Skipped updates": _skipped,
}


def _values(run: Run, key: str) -> list[float]:
    return [y for _, y in run.series(key) if y is not None]


def _ends(run: Run, key: str) -> tuple[float | None, float | None]:
    """Means over the first and the last steps of a run that is long enough."""
    values = _values(run, key)
    if len(values) < _LONG:
        return None, None
    return statistics.mean(values[:RECENT]), statistics.mean(values[-RECENT:])
