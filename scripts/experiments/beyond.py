"""Beyond the paper: finer weights, an adaptive sensitivity, a brake, PGPO on HAPO.

    python -m scripts.experiments.beyond            # from the checkout's root
    python -m scripts.experiments.beyond --quick    # reduced, into runs/

The papers have no numbers; PGPO's section 4 names the first two as future work.

Protocol, fixed before the runs (exploratory)
- Question: is any form better than the papers' own on questions that were not used for
  choosing it? Programs are those: the other studies do not ask them.
- Methods: PGPO as in the paper (sensitivity 1) and with weights per sequence or token,
  with an adaptive sensitivity, with the brake of `controls.Braked`; HAPO with and
  without PGPO's step size, and with demonstrations weighted by their advantage, which
  ended above the paper's weight of 1 in hapo_vs_mixed.py.
- Budget: 20 steps of 4 questions x 8 samples on programs of levels 1 to 3.
- Tuning: learning rates 3e-4 and 6e-4 on seeds 1000 and 1001 for every method; chosen
  by validation avg@16 after the last step.
- Report: test avg@16 (T = 1, 16 samples, 64 questions) after the last step; five seeds,
  paired; `_statistics.verdict`.
- Compute: 72 runs, some 30 minutes of one core.
"""

from __future__ import annotations

from . import _runs, pgpo_vs_sdpo
from ._runs import Arm, Claim, Size, Study, best, last, mean, series

SCORE = "test/avg@16"
PGPO, HAPO = "pgpo_science", "hapo_science"


def _number(row):
    return last(row, SCORE)


def evaluation(rows: int) -> dict:
    """Blocks: validation and test."""
    block = {"rows": rows, "samples": 16}
    return {"validation": block, "test": {**block, "split": "test"}}


COMMON = (
    "task.domains=[programs]",
    "task.levels=[1,2,3]",
    "training.prompts_per_step=4",
    "training.teacher_samples=null",
)
DEFAULT = Size(
    steps=20,
    overrides=COMMON,
    evaluation=evaluation(64),
    rates=(3e-4, 6e-4),
    tuned_on=(1000, 1001),
    seeds=tuple(range(5)),
)
QUICK = DEFAULT.reduced(evaluation(8))

FORMS = {
    "weights by sequence": ("recipe.weights=sequence",),
    "weights by token": ("recipe.weights=token",),
    "adaptive sensitivity": ("recipe.adapt={target: 1.2}",),
    "brake": ("recipe.name=scripts.experiments.controls:braked",),
}
STUDY = Study(
    name="beyond",
    domain="programs, levels 1 to 3",
    arms={
        "PGPO": Arm(PGPO),
        **{name: Arm(PGPO, told) for name, told in FORMS.items()},
        "HAPO": Arm(HAPO, ("training.teacher_samples=null",)),
        "HAPO, advantage": Arm(
            HAPO,
            ("training.teacher_samples=null", "recipe.teacher_weight=advantage"),
        ),
        "HAPO + PGPO": Arm("hapo_pgpo_science"),
    },
    sizes={"default": DEFAULT, "quick": QUICK},
    series=pgpo_vs_sdpo.STUDY.series,
    claims=(
        *(
            Claim(f"PGPO, {name}, ends above PGPO", "none", name, "PGPO", _number)
            for name in FORMS
        ),
        *(
            Claim(f"{name} ends above HAPO (programs)", "none", name, "HAPO", _number)
            for name in ("HAPO + PGPO", "HAPO, advantage")
        ),
    ),
    columns={
        "test, last step": _number,
        "best step": lambda row: best(row, SCORE),
        "mean ρ": lambda row: mean(series(row, "information/multiplier")),
    },
)

if __name__ == "__main__":
    _runs.main(STUDY)
