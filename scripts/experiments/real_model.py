"""A real model: GRPO and HAPO on GSM8K with SmolLM2-135M-Instruct.

    python scripts/get_smollm2.py                           # the model, once
    python -m scripts.experiments.real_model                # hours of a core
    python -m scripts.experiments.real_model --quick        # two steps, into runs/

GSM8K's files lie in data/gsm8k, or are fetched from the Hub.

Protocol, fixed before the runs (exploratory, and small)
- Question: with few successes, does a demonstration where the policy is unsure help a
  model that was not made for this laboratory? At this size a difference of less than
  some ten points cannot be seen.
- Methods: GRPO and HAPO as in the paper, nothing else differs. Demonstrations are the
  human solutions.
- Budget: 40 steps of 4 questions x 4 samples of at most 96 tokens; all parameters.
- Tuning: none. Learning rate 1e-5 for both, warm-up none.
- Report: avg@16 on 16 questions of the test split, before, half-way and at the end; two
  seeds, the same for both.
- Compute: 4 runs, some hours of one core in all.
"""

from __future__ import annotations

from . import _runs
from ._runs import ROOT, VALIDATION, Arm, Claim, Size, Study, last, mean, series

COMMON = (
    "training.prompts_per_step=4",
    "training.group_size=4",
    "training.micro_batch_tokens=512",
    "sampling.max_new_tokens=96",
    "task.max_prompt_length=192",
    "optimizer.warmup_updates=0",
)


def evaluation(rows: int) -> dict:
    """The one block; nothing is chosen by it."""
    block = {"rows": rows, "samples": 16, "split": "test", "max_new_tokens": 96}
    return {"validation": {**block, "max_prompt_length": 192}}


DEFAULT = Size(
    steps=40,
    overrides=COMMON,
    evaluation=evaluation(16),
    rates=(1e-5,),
    tuned_on=(),
    seeds=(0, 1),
)


def _number(row):
    return last(row, VALIDATION)


STUDY = Study(
    name="real_model",
    domain="GSM8K",
    arms={"GRPO": Arm("grpo_smollm2_gsm8k"), "HAPO": Arm("hapo_smollm2_gsm8k")},
    sizes={"default": DEFAULT, "quick": DEFAULT.reduced(evaluation(2), steps=2)},
    series=("reward/mean", "length/mean", "injection/count", "demonstration/logp"),
    claims=(
        Claim(
            "HAPO ends above GRPO (SmolLM2-135M, GSM8K)",
            "MATH-500: 83 → 87 (7 B)",
            "HAPO",
            "GRPO",
            _number,
        ),
    ),
    columns={
        "avg@16, last step": _number,
        "before": lambda row: next(iter(row["curve"].values()))[VALIDATION],
        "reward, last ten": lambda row: mean(series(row, "reward/mean")[-10:]),
        "log p of demonstrations, first": lambda row: mean(
            series(row, "demonstration/logp")[:5]
        ),
        "last five": lambda row: mean(series(row, "demonstration/logp")[-5:]),
    },
    weights=ROOT / "models" / "SmolLM2-135M-Instruct.gguf",
)

if __name__ == "__main__":
    _runs.main(STUDY)
