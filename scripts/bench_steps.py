"""Our own steps beside each other, and how long a run takes to say something.

    python scripts/bench_steps.py
    python scripts/bench_steps.py --only pgpo teacher --repeats 5

    pgpo       a PGPO step over an SDPO step: what the information costs
    teacher    what an SDPO step takes more than a GRPO step, over the time of the
               teacher's forward pass
    prompt     an update on 8 sequences of 64 tokens behind one prompt of 512, over the
               same with a copy of the prompt for each
    startup    from the start of configs/quickstart.yaml to the first line of
               metrics.jsonl, and to the first step's, with an empty and a filled
               compilation cache

The first three take turns in one process; the steps are those of `Trainer`, as a run
makes them. Medians; rows go to docs/evidence/performance.jsonl as they come.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_peers
import bench_work
from bench_work import RESULTS, ROOT, about_run, append

from jaxrl_post.cli.memory import keep_freed_memory

MODEL = "qwen2-5m"
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "sdpo": {"name": "sdpo", "max_length": bench_peers.LONGEST},
    "pgpo": {"name": "pgpo", "sensitivity": 1.0, "max_length": bench_peers.LONGEST},
}
SETTING = bench_peers.ROWS["sdpo"]


class Steps:
    """Trainers of several recipes on the same model, whose steps take turns."""

    def __init__(self, folder: Path, names: Sequence[str], repeats: int) -> None:
        import jax
        import jax.numpy as jnp

        from jaxrl_post import models
        from jaxrl_post.isolation import JudgePool
        from jaxrl_post.training.config import Config
        from jaxrl_post.training.setup import open_task
        from jaxrl_post.training.stages import make_stages
        from jaxrl_post.training.state import init_state
        from jaxrl_post.training.trainer import Trainer

        sys.path.insert(0, str(bench_peers.DRIVERS))
        work = bench_peers.prepare(SETTING, folder, repeats, [])
        self.policy, self.params, tokenizer = models.load(work["checkpoint"])
        self.pool = JudgePool(1)
        self.trainers, self.states, self.batches = {}, {}, {}
        for name in names:
            tree = bench_peers.config_of(work, folder) | {"recipe": RECIPES[name]}
            (stage,) = make_stages(Config.from_dict(tree), None)
            section = stage.config.task
            task = open_task(section.name, section.split, section.options, "task")
            home = folder / name
            home.mkdir()
            trainer = Trainer(
                stage, task, self.policy, tokenizer, self.pool, None, home
            )
            self.trainers[name] = trainer
            self.states[name] = init_state(
                jax.tree.map(jnp.copy, self.params),  # updates donate them
                trainer.optimizer,
                trainer.recipe,
                jax.random.key(0),
                questions=len(task),
            )
            trainer.update = self._keeping(name, trainer.update)

    def run(self, step: int) -> dict[str, dict[str, float]]:
        """One step of each, in an order that changes; its row of metrics."""
        rows = {}
        for name in list(self.trainers)[:: -1 if step % 2 else 1]:
            trainer = self.trainers[name]
            self.states[name], rows[name] = trainer.step(self.states[name], step)
        return rows

    def _keeping(self, name: str, update: Callable) -> Callable:
        def run(state, batch):
            self.batches[name] = batch
            return update(state, batch)

        return run


def step_times(names: Sequence[str], repeats: int, score: bool = False):
    """Seconds of each recipe's steps, and of the teacher's forward passes."""
    import jax

    from jaxrl_post.training import make_score_step

    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    forward = []
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(Path(folder), names, repeats)
        with steps.pool:
            scored = jax.jit(make_score_step(steps.policy))
            for step in range(1, repeats + 2):
                for name, row in steps.run(step).items():
                    seconds[name].append(row)
                if not score:
                    continue
                batch = steps.batches["sdpo"]
                shown = batch.replace(
                    contexts=batch.teacher_contexts,
                    context_mask=batch.teacher_context_mask,
                    context_index=batch.teacher_index,
                )
                start = time.perf_counter()
                jax.block_until_ready(scored(steps.params, shown))
                forward.append(time.perf_counter() - start)
    return {name: rows[1:] for name, rows in seconds.items()}, forward[1:]


def parts_of(rows: dict[str, list[dict[str, float]]]):
    """The time of a generation, which is the same work for all and most of the noise,
    and by recipe that of the rest of a step."""
    generate = [row["time/generate"] for of in rows.values() for row in of]
    rest = {
        name: [row["time/step"] - row["time/generate"] for row in of]
        for name, of in rows.items()
    }
    return statistics.median(generate), rest


def pgpo(repeats: int) -> Iterator[dict[str, Any]]:
    rows, _ = step_times(("sdpo", "pgpo"), repeats)
    generate, rest = parts_of(rows)
    step = {name: generate + statistics.median(of) for name, of in rest.items()}
    yield {
        "figure": "PGPO step / SDPO step",
        "value": round(step["pgpo"] / step["sdpo"], 4),
        "must": 1.01,
        "seconds_of_generation": round(generate, 4),
        "seconds_without_generation": {n: rounded(of) for n, of in rest.items()},
    }


def teacher(repeats: int) -> Iterator[dict[str, Any]]:
    rows, forward = step_times(("grpo", "sdpo"), repeats, score=True)
    _, rest = parts_of(rows)
    middle = {name: statistics.median(of) for name, of in rest.items()}
    passes = statistics.median(forward)
    chosen = top_k_seconds(repeats)
    yield {
        "figure": "(SDPO step - GRPO step) / teacher's forward pass",
        "value": round((middle["sdpo"] - middle["grpo"]) / passes, 3),
        "must": 1.25,
        "seconds_without_generation": {n: rounded(of) for n, of in rest.items()},
        "seconds_of_teacher": rounded(forward),
        # What SDPO does besides: it takes the student's likeliest tokens.
        "seconds_of_top_k": rounded(chosen),
    }


def top_k_seconds(repeats: int) -> list[float]:
    """Seconds that the likeliest 100 tokens of a step's logits take by themselves."""
    import jax

    tokens = SETTING.count * SETTING.group * SETTING.new
    shape = (tokens, bench_work.MODELS[MODEL]["vocab_size"])
    logits = jax.random.normal(jax.random.key(0), shape)
    top = jax.jit(lambda x: jax.lax.top_k(x, 100))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(top(logits))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def prompt(repeats: int) -> Iterator[dict[str, Any]]:
    """An update on a group, its prompt stored once or with every sequence."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxrl_post import recipes
    from jaxrl_post.recipes.batch import Batch
    from jaxrl_post.training import init_state, make_update_step

    group, length, new = 8, 512, 64
    policy, params = bench_work.open_model(MODEL)
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, policy.vocab_size, (1, length), dtype=np.int32)
    mask = np.ones((group, new), bool)
    shared = Batch(
        contexts=contexts,
        context_mask=np.ones((1, length), bool),
        responses=rng.integers(0, policy.vocab_size, mask.shape, dtype=np.int32),
        token_mask=mask,
        loss_mask=mask,
        sequence_mask=mask[:, 0],
        advantages=rng.normal(size=group).astype(np.float32),
    )
    copies = shared.replace(
        contexts=np.repeat(contexts, group, 0),
        context_mask=np.ones((group, length), bool),
        context_index=np.arange(group, dtype=np.int32),
    )
    recipe, optimizer = recipes.grpo(), optax.adamw(1e-4)
    update = make_update_step(policy, recipe, optimizer)
    layouts = {"shared": shared, "copies": copies}
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    norms = {}
    states = {
        name: init_state(
            jax.tree.map(jnp.copy, params), optimizer, recipe, jax.random.key(0)
        )
        for name in layouts
    }
    for turn in range(repeats + 1):
        for name, batch in layouts.items():
            start = time.perf_counter()
            states[name], metrics = jax.block_until_ready(update(states[name], batch))
            seconds[name].append(time.perf_counter() - start)
            if not turn:
                norms[name] = float(metrics["grad_norm"])
    np.testing.assert_allclose(norms["shared"], norms["copies"], rtol=1e-3)
    middle = {name: statistics.median(of[1:]) for name, of in seconds.items()}
    yield {
        "figure": "update behind a shared prompt / a copy for each",
        "value": round(middle["shared"] / middle["copies"], 3),
        "must": 0.35,
        "seconds": {name: rounded(of[1:]) for name, of in seconds.items()},
    }


def startup(repeats: int) -> Iterator[dict[str, Any]]:
    """The quickstart until its first lines, at first with nothing compiled."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for turn in range(1 + min(repeats, 2)):
            first = first_lines(folder, turn)
            yield {
                "figure": f"first metric line, {'warm' if turn else 'cold'} cache, s",
                "value": round(first[0], 2),
                "must": 12 if turn else None,
                "first_step": round(first[1], 2),
            }


def first_lines(folder: Path, turn: int) -> list[float]:
    """Seconds until the first and the second line of a run."""
    run = folder / f"run-{turn}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {
        "XDG_CACHE_HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    config = str(ROOT / "configs" / "quickstart.yaml")
    command = [sys.executable, "-m", "jaxrl_post.cli", "train", config]
    start, seen = time.perf_counter(), []
    process = subprocess.Popen(
        [*command, f"run.dir={run}", "run.grace_seconds=2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for lines in itertools.count(1):
            while count(run / "metrics.jsonl") < lines:
                if process.poll() is not None:
                    raise RuntimeError(f"The run ended: exit {process.returncode}.")
                time.sleep(0.02)
            seen.append(time.perf_counter() - start)
            if lines == 2:
                return seen
    finally:
        process.terminate()
        process.wait()
    raise AssertionError


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


ROWS = {"pgpo": pgpo, "teacher": teacher, "prompt": prompt, "startup": startup}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=11, help="after the first one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1.")
    return arguments


def main() -> None:
    arguments = parse()
    keep_freed_memory()  # as `jaxrl-post train` does
    command = shlex.join(["python", "scripts/bench_steps.py", *sys.argv[1:]])
    cores = sorted(os.sched_getaffinity(0))
    for row in arguments.only:
        for found in ROWS[row](arguments.repeats):
            line = {"bench": "steps", "row": row, **found}
            append(arguments.out, {**line, **about_run(cores), "command": command})
            print(f"{found['figure']}: {found['value']} (must: {found['must']})")


if __name__ == "__main__":
    main()
