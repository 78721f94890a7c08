"""Several turns behind kept caches, beside contexts that are read anew every turn.

    python scripts/bench_turns.py --out docs/evidence/turns.jsonl
    python scripts/bench_turns.py --prompt 512 --out docs/evidence/turns.jsonl

Answers of up to --turns turns to random prompts, sampled from random weights; a share
of the vocabulary ends a turn, so that its length is geometric, and then the answer is
told --observed random tokens. Both ways, which run one after the other, have to sample
the same tokens; times are medians after a run that compiles. `read` is what forward
passes over contexts were given, padding not counted: the tokens of prompts, of turns
that are read again, and of observations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import bench_work
import jax
import numpy as np

from jaxrl_post.cli.memory import keep_freed_memory
from jaxrl_post.generation import Sampler
from jaxrl_post.training.dialogue import Dialogue
from jaxrl_post.training.turns import go_on
from jaxrl_post.types import Verdict

RESULTS = bench_work.ROOT / "docs" / "evidence" / "turns.jsonl"


class Words:
    """A tokenizer of numbers: `go_on` asks for the tokens of observations."""

    chat_template = None
    all_special_tokens = ()
    added_tokens_decoder: dict = {}

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, rows, **_):
        return ["" for _ in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2-5m", choices=[*bench_work.MODELS])
    sizes = {"prompts": 4, "group": 8, "prompt": 64, "new": 128, "mean": 16}
    sizes |= {"turns": 4, "observed": 8, "runs": 4}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="file that rows are appended to")
    parser.add_argument("--table", action="store_true", help="only the table")
    args = parser.parse_args()
    if args.table:
        print(table(read()))
        return
    keep_freed_memory()  # as `jaxrl-post train` does
    line = json.dumps(measure(args))
    print(line)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


def measure(args) -> dict:
    """A row."""
    policy, params = bench_work.open_model(args.model)
    stops = range(0, policy.vocab_size, args.mean)
    sampler = Sampler(policy, max_new_tokens=args.new, stop_tokens=stops)
    read = count_read(sampler)
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, policy.vocab_size, (args.prompts, args.prompt))
    count = args.prompts * args.group
    told = rng.integers(0, policy.vocab_size, (args.turns, count, args.observed))
    words = [[" ".join(map(str, ids)) for ids in turn] for turn in told]

    def run(keeps: bool):
        read.clear()
        start = time.perf_counter()
        dialogue = Dialogue(
            sampler,
            lambda: params,
            key=jax.random.key(0),
            context_limit=args.prompt,
            keeps=keeps,
        )
        first = dialogue.begin(contexts, np.ones_like(contexts), group_size=args.group)
        spoken = iter(words)

        def judge(rows, *_):
            said = next(spoken)
            return [Verdict(0.0, observation=said[row]) for row in rows]

        answers = go_on(
            first,
            [""] * count,
            judge(range(count)),
            np.repeat(contexts, args.group, axis=0).tolist(),
            turns=args.turns,
            tokenizer=Words(),
            generate=dialogue.go_on,
            judge=judge,
        )
        return time.perf_counter() - start, answers.rollouts, sum(read)

    times = []
    for _ in range(args.runs + 1):
        (kept, ours, few), (again, others, all_) = run(True), run(False)
        if (ours.tokens != others.tokens).any():
            sys.exit("the two ways gave different tokens: no ratio.")
        times.append((kept, again))
    kept, again = (statistics.median(x) for x in zip(*times[1:], strict=True))
    single = sorted(a / b for a, b in times[1:])
    return {
        "model": args.model,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "answers": count,
        "prompt": args.prompt,
        "turns": args.turns,
        "observed": args.observed,
        "tokens": int(ours.mask.sum()),
        "read_kept": few,
        "read_again": all_,
        "read_ratio": round(few / all_, 4),
        "seconds_kept": round(kept, 4),
        "seconds_again": round(again, 4),
        "seconds_ratio": round(kept / again, 4),
        "seconds_ratio_min": round(single[0], 4),
        "seconds_ratio_max": round(single[-1], 4),
    }


def count_read(sampler: Sampler) -> list[int]:
    """A list that grows by the tokens of each forward pass over contexts."""
    programs, read = sampler.programs, []
    prefill, extend = programs.prefill, programs.extend

    def counted(program):
        def run(*arguments, **options):
            read.append(int(arguments[-1].sum()))
            return program(*arguments, **options)

        return run

    programs.prefill, programs.extend = counted(prefill), counted(extend)
    return read


def read() -> list[dict]:
    """The rows that are there."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def table(rows: list[dict]) -> str:
    """Rows as they came, in Markdown; nothing where there are none."""
    if not rows:
        return ""
    heads = ["prompt", "answers", "turns", "read anew", "kept", "ratio", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        low, high = row["seconds_ratio_min"], row["seconds_ratio_max"]
        cells = [
            *(str(row[key]) for key in ("prompt", "answers", "turns")),
            f"{row['read_again']:,}",
            f"{row['read_kept']:,}",
            f"{row['read_ratio']:.2f}",
            f"{row['seconds_ratio']:.2f} ({low:.2f}–{high:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
