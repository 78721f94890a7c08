"""Weights by sequence once more, on seeds that nobody has looked at.

    python -m scripts.experiments.sequence_weights            # from the checkout's root
    python -m scripts.experiments.sequence_weights --quick    # reduced, into runs/

In beyond.py, of four forms of PGPO, weighting each sequence's loss by its own
multiplier ended highest above the paper's, +.041 (-.006 to +.088) of five seeds: as the
best of four that is too little to recommend it, and too much to leave it.

Protocol, fixed before the runs (exploratory)
- Question: does PGPO with `weights=sequence` end above PGPO?
- Methods, budget and report as in beyond.py, with the learning rate that both were
  tuned to there (6e-4) and ten new seeds, 10 to 19, paired.
- Compute: 20 runs, some 10 minutes of one core.
"""

from __future__ import annotations

from . import _runs, beyond
from ._runs import Claim

PGPO, WEIGHTED = "PGPO", "weights by sequence"
STUDY = beyond.STUDY._replace(
    name="sequence_weights",
    arms={name: beyond.STUDY.arms[name] for name in (PGPO, WEIGHTED)},
    sizes={
        "default": beyond.DEFAULT._replace(
            rates=(6e-4,), tuned_on=(), seeds=tuple(range(10, 20))
        ),
        "quick": beyond.QUICK,
    },
    claims=(
        Claim(
            "PGPO, weights by sequence, ends above PGPO (ten new seeds)",
            "none",
            WEIGHTED,
            PGPO,
            beyond.STUDY.columns["test, last step"],
        ),
    ),
)

if __name__ == "__main__":
    _runs.main(STUDY)
