"""GRPO of a whole model, of an adapter, and of one on an int8 base: memory and time.

    python scripts/get_smollm2.py
    python scripts/bench_adapters.py --model models/SmolLM2-135M-Instruct.gguf
    python scripts/bench_adapters.py               # random weights of the same shape
    python scripts/bench_adapters.py --only lora --transformers TORCH_ENV/bin/python

Each in a process of its own: a group's completions are sampled and trained on, as a
step of a run does. Bytes of arguments (the state and the batch) and of temporary
memory are XLA's own account of the compiled update; ``peak_rss`` is the process's. With
`--transformers`, an interpreter that has torch and transformers, the merged export of
what was trained is continued there and here, greedily: ``greedy_equal`` of
``greedy_tokens`` are the same, and of an adapter's ``greedy_changed`` are not what the
base says. Rows go to docs/evidence/adapters.jsonl as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_work
from bench_tables import last, markdown
from bench_work import ROOT, about_run, append, read_rows

RESULTS = ROOT / "docs" / "evidence" / "adapters.jsonl"
RANDOM = "smollm2-135m"
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": {"rank": 16}},
    "int8-lora": {"adapter": {"rank": 16}, "int8": True},
}
PROMPTS, GROUP, LENGTH, NEW = 2, 4, 32, 32
CONTINUED = 32  # tokens of each greedy answer


def measure(mode: str, path: str, repeats: int, python: str | None) -> dict[str, Any]:
    """One row; in a process of its own."""
    import jax
    import numpy as np
    import optax

    from jaxrl_post import models, recipes
    from jaxrl_post.generation import Sampler
    from jaxrl_post.models.adapters import split_adapter
    from jaxrl_post.recipes.batch import Batch
    from jaxrl_post.training import init_state, make_update_step
    from jaxrl_post.training.state import merge_params

    options = dict(MODES[mode])
    if "adapter" in options:
        options["adapter"] = models.Lora(**options["adapter"])
    policy, params, tokenizer = models.load(path, **options)
    trained, frozen = split_adapter(params)
    del params
    recipe, optimizer = recipes.grpo(), optax.adamw(1e-3)
    state = init_state(trained, optimizer, recipe, jax.random.key(0), frozen=frozen)
    del trained, frozen
    update = make_update_step(policy, recipe, optimizer)
    sampler = Sampler(policy, max_new_tokens=NEW)
    rng = np.random.default_rng(0)
    shape = (PROMPTS, LENGTH)
    contexts = rng.integers(0, policy.vocab_size, shape, dtype=np.int32)
    seen, rows = np.ones(shape, bool), PROMPTS * GROUP

    def sample(state, step: int):
        made = sampler.generate(
            merge_params(state.trainable, state.frozen),
            contexts,
            seen,
            key=jax.random.key(step),
            group_size=GROUP,
        )
        return Batch(
            contexts=contexts,
            context_mask=seen,
            responses=made.tokens,
            token_mask=made.mask,
            loss_mask=made.mask,
            sequence_mask=np.ones(rows, bool),
            advantages=rng.normal(size=rows).astype(np.float32),
            sampler_logps=made.sampler_logps,
        )

    seconds: dict[str, list[float]] = {"generate": [], "update": []}
    memory = None
    for step in range(repeats + 1):
        start = time.perf_counter()
        batch = sample(state, step)
        seconds["generate"].append(time.perf_counter() - start)
        if memory is None:
            memory = update.lower(state, batch).compile().memory_analysis()
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(update(state, batch))
        seconds["update"].append(time.perf_counter() - start)
    assert memory is not None and metrics["grad_norm"] > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    middle = {k: round(statistics.median(v[1:]), 3) for k, v in seconds.items()}
    row = {
        "mode": mode,
        "trained": sum(x.size for x in jax.tree.leaves(state.trainable)),
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "peak_rss": peak,
        **middle,
        "step": round(sum(middle.values()), 3),
    }
    if python is None:
        return row
    params, base = merge_params(state.trainable, state.frozen), state.frozen
    del state
    greedy = Sampler(policy, max_new_tokens=CONTINUED, temperature=0.0)

    def answers(params):
        made = greedy.generate(params, contexts, seen, key=jax.random.key(0))
        return np.asarray(made.tokens)

    ours = answers(params)
    if mode != "full":
        row["greedy_changed"] = int((answers(base) != ours).sum())
    with tempfile.TemporaryDirectory() as folder:
        models.save(policy, params, tokenizer, Path(folder, "merged"))
        theirs = continued(python, f"{folder}/merged", contexts.tolist())
    same = np.asarray(theirs) == ours
    return row | {"greedy_tokens": same.size, "greedy_equal": int(same.sum())}


_CONTINUE = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(sys.argv[1], dtype=torch.float32).eval()
model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
tokens = torch.tensor(json.loads(sys.argv[2]))
made = model.generate(
    tokens,
    attention_mask=torch.ones_like(tokens),
    max_new_tokens=int(sys.argv[3]),
    do_sample=False,
)
print(json.dumps(made[:, tokens.shape[1] :].tolist()))
"""


def continued(python: str, folder: str, contexts: list[list[int]]) -> list[list[int]]:
    """What transformers' `generate` says behind the contexts, greedily."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run(
        [python, "-c", _CONTINUE, folder, json.dumps(contexts), str(CONTINUED)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def read() -> list[dict[str, Any]]:
    """All rows so far."""
    return list(read_rows(RESULTS))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The last row of each mode, beside the whole model's memory."""
    lines = []
    for mode in MODES:
        if (row := last(rows, mode=mode)) is None:
            continue
        sizes = (row[k] / 2**20 for k in ("arguments", "temp", "peak_rss"))
        times = (row[k] for k in ("generate", "update", "step"))
        lines.append(
            (
                mode,
                f"{row['trained'] / 1e6:.2f}",
                *(f"{size:,.0f}" for size in sizes),
                *(f"{seconds:.2f}" for seconds in times),
                f"{row['greedy_equal']} of {row['greedy_tokens']}"
                if "greedy_tokens" in row
                else "",
            )
        )
    heads = ("", "trained, M", "arguments, MiB", "temporary", "peak RSS")
    heads += ("generation, s", "update", "step", "greedy tokens as transformers'")
    return markdown(heads, lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--model", help="folder or file; else random weights")
    parser.add_argument("--repeats", type=int, default=3, help="after the first one")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1.")
    return arguments


def main() -> None:
    args = parse()
    if args.measure:
        row = measure(args.measure, args.model, args.repeats, args.transformers)
        print(json.dumps(row))
        return
    command = shlex.join(["python", "scripts/bench_adapters.py", *sys.argv[1:]])
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path is None:
            path = f"{folder}/model"
            bench_work.write_checkpoint(RANDOM, Path(path))
        for mode in args.only:
            inner = ["--measure", mode, "--model", path]
            inner += ["--repeats", str(args.repeats)]
            if args.transformers:
                inner += ["--transformers", args.transformers]
            out = subprocess.run(
                [sys.executable, __file__, *inner],
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",
                    "PYTHONPATH": str(ROOT),
                },
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            row = json.loads(out.stdout.splitlines()[-1])
            model = Path(args.model).name if args.model else f"random {RANDOM}"
            about = {"model": model, **about_run(cores), "command": command}
            append(args.out, {"bench": "adapters", **row, **about})
            print(json.dumps(row), flush=True)
    print(table(list(read_rows(args.out))))


if __name__ == "__main__":
    main()
