"""Training steps beside those of TRL and Tunix: the same weights, prompts and lengths.

    python scripts/bench_peers.py --trl-python A/bin/python --tunix-python B/bin/python
    python scripts/bench_peers.py --only grpo --pairs 2 --steps 3   # a quick look

TRL wants Python 3.11 and, in this order, `pip install torch==2.13.0` (the CPU's build)
and `transformers trl==1.16.0 accelerate peft datasets jinja2`; Tunix Python 3.11 and
`google-tunix==0.1.7`. A peer without an interpreter is left out.

Ours is `jaxrl-post train` with a config; its seconds are those of its metrics.jsonl.
Everyone runs in a fresh process on the same cores, in turns; the first turn finds an
empty compilation cache, the later ones what it left. A run's first step compiles and is
told apart. The model never ends a sequence: all are equally long. Memory is the
most that a process and its children held together. Rows go to
docs/evidence/performance.jsonl as they come; where the work turns out to differ there
is a reason in the place of a ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import bench_work
import yaml
from bench_work import RESULTS, ROOT, about_run, append

DRIVERS = Path(__file__).parent / "peers"
LEARNING_RATE = 1e-4


class Setting(NamedTuple):
    """What is trained, and what the ratios to each peer must come to.

    Attributes:
      model: one of `bench_work.MODELS`.
      recipe, reward: by name.
      count, group, new: prompts per step, completions per prompt, tokens each.
      must: greatest ratio of step times, by peer.
      lean: greatest ratio of peak memory, by peer.
    """

    model: str
    recipe: str
    reward: str
    count: int
    group: int
    new: int
    must: Mapping[str, float]
    lean: Mapping[str, float] = {}


ROWS = {
    "grpo": Setting(
        "qwen2-5m",
        "grpo",
        "digits",
        *(4, 8, 64),
        must={"trl": 0.5, "tunix": 0.55},
        lean={"trl": 0.7, "tunix": 0.7},
    ),
    "sdpo": Setting("qwen2-5m", "sdpo", "solved", *(4, 8, 64), must={"trl": 0.5}),
    "smollm2": Setting(
        "smollm2-135m", "grpo", "digits", *(2, 4, 32), must={"trl": 0.65}
    ),
}
WORDING = {
    "reprompt": "{prompt}{demonstration}\nsolve it:",
    "demonstration": "\nworked solution:\n{demonstration}",
}
"""Of what the teacher is shown, the same for all."""
LONGEST = 176
"""Tokens of that; none is cut, see `shortened`."""
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    # What TRL's SDPO does when it is told nothing else.
    "sdpo": {
        "name": "sdpo",
        "support": "sampled",
        "alpha": 1.0,
        "truncated_importance": None,
        "max_length": LONGEST,
        "templates": WORDING,
    },
}
EXACT = ("parameters", "prompt_tokens", "lengths", "sequences", "optimizer_steps")
NEAR = {  # absolute and relative
    "probe_loss": (0.0, 1e-3),
    "first_loss": (0.02, 0.0),
    "first_entropy": (0.0, 0.02),
    "distilled": (0.15, 0.0),
    "shortened": (0.0, 0.0),
}
"""Losses of unlike random samples agree within what these vary."""


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Where the work of two runs differs; what one of them cannot tell is not asked.

    >>> differences({"sequences": 32, "probe_loss": 9.5}, {"sequences": 30})
    ['sequences: 32, 30']
    """
    found = [name for name in EXACT if ours.get(name) != theirs.get(name)]
    for name, (absolute, relative) in NEAR.items():
        pair = ours.get(name), theirs.get(name)
        if None not in pair and not math.isclose(
            *pair, abs_tol=absolute, rel_tol=relative
        ):
            found.append(name)
    return [f"{name}: {ours.get(name)}, {theirs.get(name)}" for name in found]


def compare(
    row: str, figure: str, peer: str, must: float | None, pairs: Sequence[Sequence]
) -> dict[str, Any]:
    """Ours over a peer's, pair by pair, or why that would mean nothing."""
    of: Callable[[Any], float] = {
        "step": lambda run: statistics.median(run["step"][1:]),
        "peak_rss": lambda run: run["peak_rss"],
    }[figure]
    whole = {"bench": "peers", "row": row, "figure": figure, "over": peer, "must": must}
    for ours, theirs in pairs:
        if unlike := differences(ours["work"], theirs["work"]):
            return {**whole, "refused": unlike}
    ratios = [of(ours) / of(theirs) for ours, theirs in pairs]
    return {
        **whole,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median": round(statistics.median(ratios), 3),
    }


def prepare(setting: Setting, folder: Path, steps: int, cores: list[int]) -> dict:
    """Writes checkpoint and prompts; the work that the drivers are told of."""
    import jax.numpy as jnp
    import optax

    from jaxrl_post import models

    checkpoint = folder / "checkpoint"
    bench_work.write_checkpoint(setting.model, checkpoint)
    policy, params, tokenizer = models.load(str(checkpoint))
    prompts, length = bench_work.make_prompts(tokenizer, (steps + 1) * setting.count)
    ids = jnp.asarray(tokenizer(prompts[: setting.count])["input_ids"])
    places = jnp.broadcast_to(jnp.arange(length), ids.shape)
    hidden, _ = policy.hidden(params, ids, places, jnp.ones_like(ids))
    logits = hidden[:, :-1] @ policy.unembedding(params).T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    rows = "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    (folder / "prompts.jsonl").write_text(rows)
    return {
        **setting._asdict(),
        "checkpoint": str(checkpoint),
        "prompts": prompts,
        "prompt_length": length,
        "steps": steps,
        "threads": len(cores),
        "learning_rate": LEARNING_RATE,
        "wording": WORDING,
        "probe_loss": float(losses.mean()),
    }


def config_of(work: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config that trains on the same work."""
    return {
        "run": {"dir": str(folder / "run"), "judge_workers": 1},
        "model": {"path": work["checkpoint"]},
        "task": {
            "name": "rows",
            "source": str(folder / "prompts.jsonl"),
            "answer": None,
            "reward": f"rewards:{work['reward']}",
            "max_prompt_length": work["prompt_length"],
        },
        "recipe": RECIPES[work["recipe"]],
        "optimizer": {"learning_rate": work["learning_rate"]},
        "training": {
            "steps": work["steps"] + 1,
            "prompts_per_step": work["count"],
            "group_size": work["group"],
        },
        "sampling": {"max_new_tokens": work["new"]},
    }


def read_run(run: Path, work: Mapping[str, Any]) -> dict[str, Any]:
    """What a run of ours has written, in the form of the peers' drivers."""
    from safetensors import safe_open

    import jaxrl_post

    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"]]
    with safe_open(run / "model" / "model.safetensors", "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    return {
        "version": jaxrl_post.__version__,
        "step": [row["time/step"] for row in rows],
        "generate": [row["time/generate"] for row in rows],
        "update": [row["time/update"] for row in rows],
        "work": {
            "parameters": sum(map(math.prod, shapes)),
            "prompt_tokens": work["count"] * work["prompt_length"],
            "lengths": sorted(
                {row[key] for row in rows for key in ("length/mean", "length/max")}
            ),
            "sequences": len(rows) * work["count"] * work["group"],
            "optimizer_steps": len(rows),
            "probe_loss": work["probe_loss"],
            "first_loss": rows[0]["loss"],
            "first_entropy": rows[0]["entropy"],
            "distilled": rows[0].get("teacher/reprompted"),
            "shortened": max(row.get("teacher/shortened", 0) for row in rows),
        },
    }


def run_in_turn(
    who: str, python: str, work: Mapping[str, Any], folder: Path, cores: list[int]
) -> dict[str, Any]:
    """One process of one library; what it measured, and its memory."""
    tell, told = folder / "work.json", folder / "result.json"
    tell.write_text(json.dumps(work))
    told.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{DRIVERS}",
        "OMP_NUM_THREADS": str(len(cores)),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled-{who}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
    }
    if who == "ours":
        shutil.rmtree(folder / "run", ignore_errors=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(config_of(work, folder)))
        command = [python, "-m", "jaxrl_post.cli", "train", str(config)]
    else:
        command = [python, str(DRIVERS / f"{who}_driver.py"), str(tell), str(told)]
    cpus = ",".join(map(str, cores))
    log = folder / f"{who}.log"
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", cpus, *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.2)
    if process.returncode:
        text = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{who}: exit {process.returncode}\n{text}")
    if who == "ours":
        result = read_run(folder / "run", work)
    else:
        result = json.loads(told.read_text())
    result["wall"] = time.perf_counter() - start
    result["peak_rss"] = peak
    return result


def resident(pid: int) -> int:
    """Bytes that a process and its descendants hold in memory, shared ones each."""
    total = 0
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        total = int(pages) * os.sysconf("SC_PAGE_SIZE")
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(map(resident, map(int, children.read_text().split())))
    except OSError:  # it has just ended
        pass
    return total


Write = Callable[[Mapping[str, Any]], None]


def measure(
    row: str, pythons: Mapping[str, str], arguments: argparse.Namespace, write: Write
) -> None:
    """All turns of a row, then its ratios, written as they come."""
    setting, cores = ROWS[row], arguments.cores
    peers = [peer for peer in setting.must if peer in pythons]
    turns: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: this one stays small and idle.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as pool:
            asked = (setting, folder, arguments.steps, cores)
            work = pool.submit(prepare, *asked).result()
        for turn in range(arguments.pairs):
            turns.append({})
            for who in ("ours", *peers):
                run = run_in_turn(who, pythons[who], work, folder, cores)
                turns[-1][who] = run
                cache = "warm" if turn else "cold"
                about = {"row": row, "who": who, "turn": turn, "cache": cache}
                write(turn_row(about, run, setting))
    for peer in peers:
        both = [(turn["ours"], turn[peer]) for turn in turns]
        write(compare(row, "step", peer, setting.must[peer], both))
        write(compare(row, "peak_rss", peer, setting.lean.get(peer), both))


def turn_row(
    about: Mapping[str, Any], run: Mapping[str, Any], setting: Setting
) -> dict[str, Any]:
    """What is kept of a turn; the first step, which compiles, apart."""
    parts = {
        key: {
            "median": round(statistics.median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for key in ("step", "generate", "update")
        if (values := run[key][1:])
    }
    tokens = setting.count * setting.group * setting.new
    return {
        "bench": "peers",
        **about,
        "version": run["version"],
        "first_step": round(run["step"][0], 3),
        **parts,
        "tokens_per_second": round(tokens / parts["step"]["median"], 1),
        "peak_rss": run["peak_rss"],
        "wall": round(run["wall"], 1),
        "work": run["work"],
    }


def described(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    if "who" in row:
        parts = ("step", "generate", "update")
        seconds = ", ".join(f"{part} {row[part]['median']:.3f} s" for part in parts)
        return (
            f"{row['row']}, turn {row['turn']}, {row['who']}: {seconds}; first "
            f"{row['first_step']:.1f} s; {row['peak_rss'] / 2**30:.2f} GiB"
        )
    what = f"{row['row']}: {row['figure']}, ours / {row['over']}"
    if "refused" in row:
        return f"{what}: no ratio, for the work differs: {'; '.join(row['refused'])}"
    return f"{what}: {row['median']} (must: {row['must']})"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--trl-python", help="interpreter of TRL's environment")
    parser.add_argument("--tunix-python", help="interpreter of Tunix's environment")
    parser.add_argument("--pairs", type=int, default=3, help="turns of each library")
    parser.add_argument("--steps", type=int, default=3, help="after the first one")
    parser.add_argument(
        "--cores", type=int, nargs="*", default=sorted(os.sched_getaffinity(0))
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.pairs < 1 or arguments.steps < 1:
        parser.error("--pairs and --steps must be at least 1.")
    return arguments


def main() -> None:
    arguments = parse()
    pythons = {"ours": sys.executable}
    for peer in ("trl", "tunix"):
        if python := getattr(arguments, f"{peer}_python"):
            pythons[peer] = python
        else:
            print(f"{peer} is left out: give its interpreter, --{peer}-python.")
    # An interpreter is told by its library: its path means nothing elsewhere.
    of_peer = {p: f"{name.upper()}_ENV/bin/python" for name, p in pythons.items()}
    told = [of_peer.get(word, word) for word in sys.argv[1:]]
    command = shlex.join(["python", "scripts/bench_peers.py", *told])

    def write(row: Mapping[str, Any]) -> None:
        about = {**about_run(arguments.cores), "command": command}
        append(arguments.out, {**row, **about})
        print(described(row), flush=True)

    for row in arguments.only:
        measure(row, pythons, arguments, write)


if __name__ == "__main__":
    main()
