"""What a slow judge costs a step: at its end, beside decoding, beside the update too.

    python scripts/bench_overlap.py --out docs/evidence/overlap.jsonl

GRPO on a random Qwen2 of 5.2 M weights, 4 prompts x 8 completions of 64 tokens in 8
slots. The judge sleeps `--wait` seconds over every completion in one of four processes:
it takes time and no core, as one does that waits for a sandbox or a network. `end`:
nothing is judged before all is decoded. `decoding`: what has ended is judged while
others are decoded, as a run does on one device. `update`: so, and with
`training.steps_off_policy=1`. Seconds per step of all but the first two, which compile,
and the last, which samples nothing ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from bench_work import about_run, append, write_checkpoint

from jaxrl_post.tasks import Row, RowsTask
from jaxrl_post.types import Verdict

TIMES = ("step", "generate", "judge", "update")


@dataclass(frozen=True)
class Slow:
    """Rewards the share of digits, and takes so many seconds for each completion."""

    wait: float

    def __call__(self, prompts, completions):
        time.sleep(self.wait * len(completions))
        shares = (sum(map(str.isdigit, x)) / max(1, len(x)) for x in completions)
        return [Verdict(share) for share in shares]


def load(split="train", wait=0.2):
    """Sums, with a slow judge."""
    texts = [f"Question: what is {i} plus {i + 3}? Answer:" for i in range(100, 164)]
    rows = [
        Row(str(i), ({"role": "user", "content": text},))
        for i, text in enumerate(texts)
    ]
    return RowsTask("sums", rows, Slow(wait))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wait", type=float, default=0.2, help="seconds")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path, help="file that rows are appended to")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint("qwen2-5m", Path(folder))
        for name in ("end", "decoding", "update"):
            row = {
                "bench": "overlap",
                "judged": name,
                "wait": args.wait,
                **measure(folder, name, args.wait, args.steps),
                **about_run(cores),
            }
            print(json.dumps(row), flush=True)
            if args.out:
                append(args.out, row)


def measure(checkpoint: str, judged: str, wait: float, steps: int) -> dict:
    """A run's seconds, and the reward of its first step, which is the same for all."""
    import jax
    import numpy as np

    from jaxrl_post import training
    from jaxrl_post.generation import Sampler
    from jaxrl_post.training.metrics import read_metrics

    stream = Sampler.follow

    def late(self, *args, **options):
        rows, some = zip(*stream(self, *args, **options), strict=True)
        yield np.concatenate(rows), jax.tree.map(lambda *x: np.concatenate(x), *some)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Sampler, "follow", late if judged == "end" else stream),
    ):
        tree = {
            "run": {"dir": folder + "/run", "judge_workers": 4},
            "model": {"path": checkpoint},
            "task": {
                **{"name": "bench_overlap:load", "wait": wait},
                "max_prompt_length": 64,
            },
            "recipe": {"name": "grpo", "truncated_importance": 2.0},
            "optimizer": {"learning_rate": 1e-4},
            "training": {
                **{"steps": steps, "steps_off_policy": int(judged == "update")},
                **{"prompts_per_step": 4, "group_size": 8},
            },
            "sampling": {"max_new_tokens": 64, "slots": 8},
        }
        training.run(training.Config.from_dict(tree))
        rows = read_metrics(folder + "/run")[1:]
    seconds = {name: [row[f"time/{name}"] for row in rows[2:-1]] for name in TIMES}
    return {
        **{
            name: {"median": statistics.median(x), "min": min(x), "max": max(x)}
            for name, x in seconds.items()
        },
        "first_reward": rows[0]["reward/mean"],
    }


if __name__ == "__main__":
    main()
