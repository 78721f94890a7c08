"""SDPO's own claims: fewer generations, shorter answers, credit, kinds of teacher.

    python -m scripts.experiments.sdpo_claims            # from the checkout's root
    python -m scripts.experiments.sdpo_claims --quick    # reduced, into runs/

The paper (arXiv 2601.20802): Table 4 on LiveCodeBench v6 for the teachers; its other
numbers are not repeated here.

Protocol, fixed before the runs (exploratory)
- Question: does SDPO half-way reach what GRPO has at the end (half of the generations)?
  Are its answers shorter? Is credit by logits better than by the sampled token? Does a
  regularised teacher end above a live one?
- Methods: GRPO; SDPO (JSD on the top 100, EMA teacher); SDPO with the reverse KL on the
  top 100, and on the sampled token alone; SDPO with a live, a frozen and a trust-region
  teacher.
- Added when the others had run: the sampled token's credit averaged over its sequence.
- Budget, tuning and report as in pgpo_vs_sdpo.py, with five seeds.
- Compute: 72 runs, some 30 minutes of one core.
"""

from __future__ import annotations

from . import _runs, pgpo_vs_sdpo
from ._runs import Arm, Claim, Row, Study, best, last, mean, series
from .pgpo_vs_sdpo import half_way, test_score

FIVE = tuple(range(5))
# GRPO has no teacher context whose length could be set.
OWN = pgpo_vs_sdpo.STUDY.sizes


def _sdpo(*overrides: str) -> Arm:
    return Arm("sdpo_science", ("recipe.max_length=100", *overrides))


def _gain(row: Row) -> float:
    """Half-way, so that a difference to another's last step is one of generations."""
    return test_score(half_way if row["method"] == "SDPO" else last)(row)


def _shorter(row: Row) -> float:
    return -mean(series(row, "length/mean")[-6:])


STUDY = Study(
    name="sdpo_claims",
    domain=pgpo_vs_sdpo.STUDY.domain,
    arms={
        "GRPO": Arm("grpo_science"),
        "SDPO": _sdpo(),
        "reverse KL": _sdpo("recipe.alpha=1.0"),
        "sampled token": _sdpo("recipe.alpha=1.0", "recipe.support=sampled"),
        "by sequence": _sdpo("recipe.name=scripts.experiments.controls:by_sequence"),
        "live teacher": _sdpo("recipe.teacher=live"),
        "frozen teacher": _sdpo("recipe.teacher=frozen"),
        "trust region": _sdpo("recipe.teacher=trust_region"),
    },
    sizes={
        name: size._replace(
            overrides=tuple(x for x in size.overrides if "max_length" not in x),
            seeds=FIVE[: len(size.seeds)],
        )
        for name, size in OWN.items()
    },
    series=("reward/mean", "length/mean", "entropy", "teacher/kl"),
    claims=(
        Claim(
            "SDPO half-way is above GRPO at the end",
            "GRPO's accuracy in a fraction of the generations",
            "SDPO",
            "GRPO",
            _gain,
        ),
        Claim("SDPO ends above GRPO", "does", "SDPO", "GRPO", test_score(last)),
        Claim(
            "SDPO's answers are shorter than GRPO's (last six steps, tokens)",
            "shorter",
            "SDPO",
            "GRPO",
            _shorter,
            margin=1.0,
        ),
        Claim(
            "credit by logits ends above the sampled token's (reverse KL)",
            "above",
            "reverse KL",
            "sampled token",
            test_score(last),
        ),
        Claim(
            "the sampled token's credit ends above its sequence's",
            "above",
            "sampled token",
            "by sequence",
            test_score(last),
        ),
        *(
            Claim(
                f"the {name} ends above the live one",
                f"29.8 → {paper} (Table 4, average)",
                arm,
                "live teacher",
                test_score(last),
            )
            for name, paper, arm in (
                ("EMA teacher", 45.3, "SDPO"),
                ("frozen teacher", 44.4, "frozen teacher"),
                ("trust region", 45.6, "trust region"),
            )
        ),
    ),
    columns={
        "test, last step": test_score(last),
        "half-way": test_score(half_way),
        "best step": test_score(best),
        "length, last six": lambda row: mean(series(row, "length/mean")[-6:]),
    },
)

if __name__ == "__main__":
    _runs.main(STUDY)
