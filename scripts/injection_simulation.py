"""HAPO's gate over visits: which variants stop injecting what a policy can do.

    python scripts/injection_simulation.py --out docs/evidence/injection.jsonl

A prompt is visited again and again by a policy that solves it with a known probability
mu; each visit is a group of N = 8 rollouts, and the gate opens where the confidence is
below gamma = 0.8. Two tables of the chance that it opens:

1. mu stays. Above the threshold injections should vanish, below it they should not.
2. mu is 0.2 for ten visits and 0.95 from the eleventh on: how soon a gate notices.

Chances are exact where a binomial gives them: at one visit, and with a posterior that
forgets nothing, which has seen one group of N x visits rollouts. The others are Monte
Carlo through `injection.update_posterior`, with standard errors over seeds. The
annealed threshold falls from gamma at the first visit to 0 at the last.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_post.injection import (
    injection_probability,
    posterior_mean,
    sample_confidence,
    update_posterior,
)
from jaxrl_post.thresholds import ThresholdSchedule, threshold_schedule

GROUP, THRESHOLD, VISITS = 8, 0.8, 50
RATES = (0.5, 0.8, 0.9, 0.95, 1.0)
SHOWN = (1, 2, 5, 10, 20, 50)
LEARNED, BEFORE, AFTER = 10, 0.2, 0.95
SHOWN_LEARNING = (10, 11, 12, 15, 20, 50)


class Gate(NamedTuple):
    """A variant: what it remembers, whether it draws, and its threshold."""

    discount: float = 0.0
    sampled: bool = False
    schedule: ThresholdSchedule = threshold_schedule(THRESHOLD)

    def threshold(self, visit: int) -> float:
        return self.schedule((visit - 1) / (VISITS - 1))


GATES = {
    "mean (the paper)": Gate(),
    "Thompson": Gate(sampled=True),
    "mean, annealed threshold": Gate(schedule=ThresholdSchedule("annealed", THRESHOLD)),
    "mean, posterior kept": Gate(discount=1.0),
    "mean, posterior x 0.9": Gate(discount=0.9),
    "mean, posterior x 0.5": Gate(discount=0.5),
    "Thompson, posterior kept": Gate(discount=1.0, sampled=True),
}


class Row(NamedTuple):
    """One line of a table: the chance that the gate opens, by visit."""

    table: str
    gate: str
    setting: str
    probabilities: list[float]
    standard_errors: list[float] | None = None


def exact(gate: Gate, rate: float) -> list[float]:
    """By visit, for a success rate that stays and a gate that forgets all or nothing.

    >>> [round(p, 4) for p in exact(Gate(discount=1.0), 0.9)[:3]]
    [0.1869, 0.2108, 0.0851]
    """
    return [
        float(
            injection_probability(
                rate,
                GROUP * (visit if gate.discount else 1),
                threshold=gate.threshold(visit),
                sampled=gate.sampled,
            )
        )
        for visit in range(1, VISITS + 1)
    ]


def simulate(
    gate: Gate, rate_at: Callable[[int], float], *, seeds: int, paths: int
) -> tuple[list[float], list[float]]:
    """Means over seeds by visit, and their standard errors."""
    opened = np.empty((seeds, VISITS))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        posterior = np.ones((paths, 2))
        for visit in range(1, VISITS + 1):
            successes = rng.binomial(GROUP, rate_at(visit), paths)
            posterior = update_posterior(
                posterior, successes, GROUP, discount=gate.discount
            )
            confidence = (
                sample_confidence(posterior, rng)
                if gate.sampled
                else posterior_mean(posterior)
            )
            opened[seed, visit - 1] = (confidence < gate.threshold(visit)).mean()
    errors = opened.std(0, ddof=1) / math.sqrt(seeds)
    return opened.mean(0).tolist(), errors.tolist()


def steady_rows(*, seeds: int, paths: int) -> list[Row]:
    """Table 1; without seeds, only what is exact."""
    rows = []
    for name, gate in GATES.items():
        for rate in RATES:
            found: tuple = (exact(gate, rate),)
            if gate.discount not in (0.0, 1.0):
                if not seeds:
                    continue
                found = simulate(gate, lambda _, r=rate: r, seeds=seeds, paths=paths)
            rows.append(Row("mu stays", name, f"mu = {rate:g}", *found))
    return rows


def learning_rows(*, seeds: int, paths: int) -> list[Row]:
    """Table 2."""

    def rate_at(visit: int) -> float:
        return BEFORE if visit <= LEARNED else AFTER

    setting = f"mu = {BEFORE:g}, then {AFTER:g}"
    return [
        Row(
            "mu changes",
            name,
            setting,
            *simulate(gate, rate_at, seeds=seeds, paths=paths),
        )
        for name, gate in GATES.items()
    ]


def print_rows(rows: Sequence[Row], shown: Sequence[int]) -> None:
    """One table, at some of its visits."""
    print(f"\n{rows[0].table}; P(inject) at visit{'':17}", end="")
    print(*(f"{visit:>7}" for visit in shown))
    for row in rows:
        print(f"{row.gate:26} {row.setting:20}", end="")
        print(*(f"{row.probabilities[visit - 1]:7.4f}" for visit in shown))
        if row.standard_errors:
            print(f"{'standard error':>47}", end="")
            print(*(f"{row.standard_errors[visit - 1]:7.4f}" for visit in shown))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="0: only what is exact")
    parser.add_argument("--paths", type=int, default=20_000, help="of each seed")
    parser.add_argument(
        "--out", type=Path, help="JSON lines: the command, then the rows"
    )
    args = parser.parse_args(argv)
    if args.seeds == 1:
        parser.error("--seeds is 1; a standard error needs 2 or more, 0 for none.")
    rows = steady_rows(seeds=args.seeds, paths=args.paths)
    print_rows(rows, SHOWN)
    if args.seeds:
        learning = learning_rows(seeds=args.seeds, paths=args.paths)
        print_rows(learning, SHOWN_LEARNING)
        rows += learning
    if args.out is not None:
        command = f"--seeds {args.seeds} --paths {args.paths}"
        head = {
            "command": f"python scripts/injection_simulation.py {command}",
            "group_size": GROUP,
            "threshold": THRESHOLD,
        }
        lines = [head, *(_rounded(row) for row in rows)]
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _rounded(row: Row) -> dict:
    errors = row.standard_errors and [round(e, 6) for e in row.standard_errors]
    probabilities = [round(p, 6) for p in row.probabilities]
    return {**row._asdict(), "probabilities": probabilities, "standard_errors": errors}


if __name__ == "__main__":
    main()
