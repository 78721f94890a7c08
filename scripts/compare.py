"""Algorithms side by side on the science task, with seeds: a pilot, and its table.

    python scripts/compare.py distillation --cores 0 1   # or: mixed
    python scripts/compare.py distillation --table    # only the table

Every run is `jaxrl-post train` with the config and the overrides that its line of
docs/evidence/<study>.jsonl names; a run whose line is there is not repeated. Runs are
pinned to a core each and use one thread, so that two of them do not disturb each other.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from experiments._runs import ROOT, WEIGHTS, train
from experiments._statistics import mean_interval

BLOCKS = {
    "science": {"rows": 128, "samples": 16},
    "science-test": {"rows": 128, "samples": 16, "split": "test"},
    "science-greedy": {"rows": 128, "greedy": True},
}
SCORES = ("science/avg@16", "science-test/avg@16", "science-greedy/avg@1")


class Study(NamedTuple):
    """Variants, by name, that differ in nothing but what they name.

    Attributes:
      common: overrides of all.
      variants: config file and overrides.
      columns: metrics of the run to show: heading to (metric, how it is condensed).
    """

    common: tuple[str, ...]
    variants: Mapping[str, tuple[str, tuple[str, ...]]]
    columns: Mapping[str, tuple[str, str]]


STUDIES = {
    "distillation": Study(
        common=(
            "task.levels=[1,2]",
            "training.steps=30",
            "training.teacher_samples=16",
            "training.evaluate_every=15",
        ),
        variants={
            "GRPO": ("grpo_science", ()),
            "SDPO JSD, EMA": ("sdpo_science", ()),
            "SDPO JSD, live": ("sdpo_science", ("recipe.teacher=live",)),
            "SDPO reverse KL, EMA": ("sdpo_science", ("recipe.alpha=1.0",)),
            "SDPO reverse KL, live": (
                "sdpo_science",
                ("recipe.alpha=1.0", "recipe.teacher=live"),
            ),
            "PGPO 0.5": ("pgpo_science", ("recipe.sensitivity=0.5",)),
            "PGPO 1.0": ("pgpo_science", ("recipe.sensitivity=1.0",)),
            "PGPO 1.5": ("pgpo_science", ("recipe.sensitivity=1.5",)),
        },
        columns={
            "teacher, first step": ("teacher/accuracy", "first"),
            "student there": ("teacher/student_accuracy", "first"),
            "teacher, last step": ("teacher/accuracy", "last"),
            "student there ": ("teacher/student_accuracy", "last"),
            "mean ρ": ("information/multiplier", "mean"),
        },
    ),
    "mixed": Study(
        common=(
            "task.levels=[3,4]",
            "training.steps=40",
            "training.evaluate_every=20",
        ),
        variants={
            "GRPO": ("grpo_science", ()),
            "SFT": ("sft_science", ()),
            "SFT, then GRPO": (
                "sft_then_grpo_science",
                ("training.steps=20", "stages.sft.training.steps=20"),
            ),
            "SRFT, paper": ("srft_science", ()),
            "SRFT, released": ("srft_science", ("recipe.preset=released",)),
            "replace_sft": ("replace_sft_science", ()),
            "LUFFY": ("luffy_science", ()),
            "HAPO": ("hapo_science", ()),
            "HAPO, advantage": ("hapo_science", ("recipe.teacher_weight=advantage",)),
            "HAPO, doubt": ("hapo_science", ("recipe.teacher_weight=doubt",)),
            "HAPO, Thompson": ("hapo_science", ("recipe.gate=thompson",)),
            "HAPO, posterior x 0.9": (
                "hapo_science",
                ("recipe.posterior_discount=0.9",),
            ),
            "HAPO, annealed": (
                "hapo_science",
                ("recipe.threshold={kind: annealed, start: 0.8}",),
            ),
            "HAPO + PGPO": ("hapo_pgpo_science", ()),
        },
        columns={
            "zero-variance groups": ("reward/zero_std_groups", "mean"),
            "after injection": ("injection/zero_std_groups", "mean"),
            "teacher samples, first ten": ("injection/count", "first ten"),
            "last ten": ("injection/count", "last ten"),
            "length, last ten": ("length/mean", "last ten"),
            "reward, last ten": ("reward/mean", "last ten"),
            "teacher right": ("demonstrations/available", "first"),
        },
    ),
}


def run(study: str, variant: str, seed: int, core: int) -> dict[str, Any]:
    """Trains one variant in a process of its own; its line of results."""
    config, overrides = STUDIES[study].variants[variant]
    settings = [*STUDIES[study].common, *overrides, f"run.seed={seed}"]
    rows, _ = train(config, settings, BLOCKS, core)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    curve = {
        row["step"]: [row.get(f"eval/{score}") for score in SCORES]
        for row in rows
        if f"eval/{SCORES[0]}" in row
    }
    return {
        "study": study,
        "variant": variant,
        "seed": seed,
        "command": ["jaxrl-post", "train", f"configs/{config}.yaml", *settings],
        "evaluation": BLOCKS,
        "model": "science_base",
        "base_sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "commit": commit.stdout.strip() or None,
        "scores": SCORES,
        "curve": curve,
        "metrics": {
            metric: condense(rows, metric, how)
            for metric, how in (
                (m, "series") for m, _ in STUDIES[study].columns.values()
            )
        },
        "seconds_training": round(sum(row.get("time/step", 0.0) for row in rows), 1),
    }


def condense(rows: Sequence[Mapping[str, Any]], metric: str, how: str) -> Any:
    """A metric of a run: the "series" over its steps, or one number of it."""
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return values if how == "series" else summary(values, how)


def summary(values: Sequence[float], how: str) -> float | None:
    """The first, the last, the mean, or the mean of the first or last ten values."""
    if not values:
        return None
    part = {
        "first": values[:1],
        "last": values[-1:],
        "mean": values,
        "first ten": values[:10],
        "last ten": values[-10:],
    }[how]
    return sum(part) / len(part)


def interval(values: Sequence[float]) -> str:
    """Mean over seeds and the half-width of its 95 % t-interval, without zeros."""
    found = mean_interval(values)
    text = f"{found.mean:.3f}"
    if len(values) > 1:
        text += f" ± {found.high - found.mean:.3f}"
    return text.replace("0.", ".")


def number(value: float) -> str:
    """Three digits; a share without its zero.

    >>> number(0.25), number(1.0), number(16.04)
    ('.250', '1.000', '16.0')
    """
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}".replace("0.", ".", 1)


def table(study: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The variants of a study, their seeds taken together, in Markdown."""
    columns = STUDIES[study].columns
    heads = [
        "variant",
        "seeds",
        "validation",
        "test",
        "greedy",
        *map(str.strip, columns),
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]

    def add(name, chosen, at, values):
        scores = zip(*(list(row["curve"].values())[at] for row in chosen), strict=True)
        cells = [name, str(len(chosen)), *map(interval, scores), *values]
        lines.append(f"| {' | '.join(cells)} |")

    by_variant = {
        name: [row for row in rows if row["variant"] == name]
        for name in STUDIES[study].variants
    }
    first = next(chosen for chosen in by_variant.values() if chosen)
    add("base", first, 0, [""] * len(columns))
    for name, chosen in by_variant.items():
        if not chosen:
            continue
        values = []
        for metric, how in columns.values():
            found = [summary(row["metrics"][metric], how) for row in chosen]
            known = [value for value in found if value is not None]
            mean = sum(known) / len(known) if known else None
            values.append("" if mean is None else number(mean))
        add(name, chosen, -1, values)
    return "\n".join(lines)


def results(study: str) -> Path:
    """Where a study's lines are."""
    return ROOT / "docs" / "evidence" / f"{study}.jsonl"


def read(study: str) -> list[dict[str, Any]]:
    """The lines of a study that are there."""
    path = results(study)
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    study = arguments.study
    done = {(row["variant"], row["seed"]) for row in read(study)}
    # All variants of a seed before the next: what is cut short is still a comparison.
    left = [
        (variant, seed)
        for seed, variant in itertools.product(arguments.seeds, STUDIES[study].variants)
        if (variant, seed) not in done
    ]
    cores: SimpleQueue[int] = SimpleQueue()
    for core in arguments.cores:
        cores.put(core)

    def one(variant: str, seed: int) -> None:
        core = cores.get()
        try:
            row = run(study, variant, seed, core)
        finally:
            cores.put(core)
        results(study).parent.mkdir(parents=True, exist_ok=True)
        with results(study).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(variant, seed, row["curve"], f"{row['seconds_training']} s", flush=True)

    if not arguments.table:
        with ThreadPoolExecutor(len(arguments.cores)) as pool:
            for job in [pool.submit(one, *pair) for pair in left]:
                job.result()
    if rows := read(study):
        print(table(study, rows))


if __name__ == "__main__":
    main()
