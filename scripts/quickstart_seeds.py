"""The quickstart with several seeds: what it gains, as a table.

    python scripts/quickstart_seeds.py --seeds 0 1 2 3   # some 2 minutes each
    python scripts/quickstart_seeds.py --config grpo_science
    python scripts/quickstart_seeds.py --table           # only the table

Results go to docs/evidence/quickstart.jsonl, a line per config and seed; a pair that is
there already is not run again. Seconds are those of the machine as it was: where other
work ran beside, they are upper bounds; those of the processor are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "evidence" / "quickstart.jsonl"
WEIGHTS = ROOT / "jaxrl_post" / "assets" / "science_base" / "model.safetensors"
QUICKSTART = "quickstart"
BLOCKS = {"science": "avg@16", "science-t0.6": "avg@16", "science-greedy": "avg@1"}


def run(config: str, seed: int, overrides: list[str]) -> dict:
    """Trains with `seed` in a process of its own; what came out of it."""
    path = ROOT / "configs" / f"{config}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.seed={seed}", f"run.dir={folder}/run", *overrides]
        command = ["train", str(path), *settings]
        start, before = time.perf_counter(), cpu_seconds()
        subprocess.run(
            [sys.executable, "-m", "jaxrl_post.cli", *command], cwd=ROOT, check=True
        )
        seconds, used = time.perf_counter() - start, cpu_seconds() - before
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    base, final = rows[0], rows[-1]
    scores = {
        f"{block}/{name}": [base.get(key), final.get(key)]
        for block, score in BLOCKS.items()
        for name in (score, "parsed", "maj@16", "pass@16")
        if (key := f"eval/{block}/{name}") in base
    }
    return {
        "claim": "quickstart",
        "config": config,
        "method": yaml.safe_load(path.read_text())["recipe"]["name"],
        "model": "science_base",
        "base_sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "seed": seed,
        "steps": final["step"],
        "overrides": overrides,
        "seconds": round(seconds, 1),
        "seconds_cpu": round(used, 1),
        "seconds_training": total(rows, "time/step"),
        "seconds_evaluating": total(rows, "time/evaluate"),
        "scores": scores,
    }


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def total(rows: list[dict], key: str) -> float:
    return round(sum(row.get(key, 0.0) for row in rows), 1)


def table(rows: list[dict]) -> str:
    """Base and final accuracy by config and seed, in Markdown."""
    heads = ("", "seed", "T = 1, avg@16", "T = 0.6, avg@16", "greedy", "parsed")
    heads += ("training, at most",)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in sorted(rows, key=lambda row: (row["config"] != QUICKSTART, row["seed"])):
        cells = [
            "{:.3f} → {:.3f}".format(*row["scores"][key])
            for key in (
                "science/avg@16",
                "science-t0.6/avg@16",
                "science-greedy/avg@1",
                "science/parsed",
            )
        ]
        seconds = f"{row['seconds_training']:.0f} s"
        what = f"{row['method'].upper()}, {row['steps']} steps"
        lines.append(f"| {what} | {row['seed']} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=QUICKSTART)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    rows = []
    if RESULTS.exists():
        rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    if not arguments.table:
        done = {(row["config"], row["seed"]) for row in rows}
        for seed in arguments.seeds:
            if (arguments.config, seed) not in done:
                rows.append(run(arguments.config, seed, arguments.overrides))
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
