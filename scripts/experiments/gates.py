"""HAPO's gates and teachers: what ends the injections, and who demonstrates.

    python -m scripts.experiments.gates            # from the checkout's root
    python -m scripts.experiments.gates --quick    # reduced, into runs/

The paper (arXiv 2603.11321) has one gate, the posterior mean, which it says closes;
Thompson sampling is named and not measured. Its demonstrations are a strong model's.

Protocol, fixed before the runs (exploratory)
- Questions: which gate gives fewer demonstrations in the end, and at what price in
  accuracy? Does a verbose teacher make answers longer, and end lower? Does half of a
  demonstration do as well as all of it?
- Methods: HAPO with the posterior mean ("good", the worked solution as it is), Thompson
  sampling, a posterior that lasts (discount .9), an annealed threshold; a verbose
  teacher, who writes the working twice; a partial one, who gives the first half of the
  tokens and lets the policy go on. All teachers are right; what a partial one's policy
  makes of it need not be.
- Levels 3 and 4, of which 8 questions for each domain and level alone (80): 40 steps of
  4 questions x 8 samples ask each of them twice, which a posterior that lasts needs.
  52 new tokens, which the verbose solutions need.
- Tuning: none. All have the learning rate 6e-4, HAPO's in hapo_vs_mixed.py.
- Report: test avg@16 as there; five seeds, paired; `_statistics.verdict`.
- Compute: 30 runs, some 20 minutes of one core.
"""

from __future__ import annotations

from . import _runs
from ._runs import Arm, Claim, Row, Size, Study, best, last, mean, series
from .hapo_vs_mixed import evaluation, test_score

COMMON = (
    "task.levels=[3,4]",
    "task.size=8",
    "training.prompts_per_step=4",
    "sampling.max_new_tokens=52",
)
DEFAULT = Size(
    steps=40,
    overrides=COMMON,
    evaluation={
        name: {**block, "max_new_tokens": 52} for name, block in evaluation(16).items()
    },
    rates=(6e-4,),
    tuned_on=(),
    seeds=tuple(range(5)),
)
QUICK = DEFAULT.reduced(evaluation(8))


def _hapo(*overrides: str) -> Arm:
    return Arm("hapo_science", overrides)


def _demonstrations(row: Row) -> float:
    """For each question, in the last ten steps."""
    questions = row["settings"]["training"]["prompts_per_step"]
    return mean([x / questions for x in series(row, "injection/count")[-10:]])


def _length(row: Row) -> float:
    return mean(series(row, "length/mean")[-10:])


def _fewer(row: Row) -> float:
    return -_demonstrations(row)


GOOD, THOMPSON, LASTS, ANNEALED = "HAPO", "Thompson", "posterior x 0.9", "annealed"
VERBOSE, PARTIAL = "verbose teacher", "partial teacher"
STUDY = Study(
    name="gates",
    domain="science, levels 3 and 4, 80 questions",
    arms={
        GOOD: _hapo(),
        THOMPSON: _hapo("recipe.gate=thompson"),
        LASTS: _hapo("recipe.posterior_discount=0.9"),
        ANNEALED: _hapo("recipe.threshold={kind: annealed, start: 0.8}"),
        VERBOSE: _hapo("task.name=scripts.experiments.controls:verbose"),
        PARTIAL: _hapo("recipe.prefix={lowest: 0.5, highest: 0.5}"),
    },
    sizes={"default": DEFAULT, "quick": QUICK},
    series=(
        "reward/mean",
        "length/mean",
        "injection/count",
        "injection/confidence",
        "demonstration/logp",
    ),
    claims=(
        Claim(
            "the posterior mean ends with fewer demonstrations than Thompson sampling "
            "(per question, last ten steps)",
            "does not say",
            GOOD,
            THOMPSON,
            _fewer,
        ),
        Claim(
            "an annealed threshold ends with fewer demonstrations than the mean",
            "does not say",
            ANNEALED,
            GOOD,
            _fewer,
        ),
        *(
            Claim(f"HAPO ends above {x}", "does not say", GOOD, x, test_score(last))
            for x in (THOMPSON, LASTS, ANNEALED, VERBOSE, PARTIAL)
        ),
        Claim(
            "a verbose teacher makes answers longer (last ten steps, tokens)",
            "does not say",
            VERBOSE,
            GOOD,
            _length,
            margin=1.0,
        ),
    ),
    columns={
        "test, last step": test_score(last),
        "best step": test_score(best),
        "demonstrations a question, last ten steps": _demonstrations,
        "reward, last ten": lambda row: mean(series(row, "reward/mean")[-10:]),
        "length, last ten": _length,
        "log p of demonstrations, last ten": lambda row: mean(
            series(row, "demonstration/logp")[-10:]
        ),
    },
    plots=("injection/count",),
)

if __name__ == "__main__":
    _runs.main(STUDY)
