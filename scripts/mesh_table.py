"""What a mesh changes: the same model, tokens and key on several meshes, as a table.

    python scripts/mesh_table.py                # some 4 minutes on two cores
    python scripts/mesh_table.py --train        # configs/quickstart.yaml on 2x2x2, once
    python scripts/mesh_table.py --table        # only the table

The devices are eight of this CPU. Results go to docs/evidence/meshes.jsonl, a line per
mesh and one for the training run; what is there already is not measured again.

Sampling: with an unembedding of zeros a token is its random number alone, so equal
tokens mean equal random numbers. With the model itself a token may differ where its
random number lies at the edge between two: within 1e-4 of it, that counts as explained.
The rest is compared on the tokens that 1x1x1 sampled: log-probs of the scoring program,
loss and gradient of an update of PGPO with half a policy gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import generation, models, recipes, tasks, vocabulary
from jaxrl_post.generation.choice import choose_tokens
from jaxrl_post.models import Policy
from jaxrl_post.recipes import Batch
from jaxrl_post.sharding import make_mesh, shard
from jaxrl_post.training import make_update_step
from jaxrl_post.training.state import TrainState, init_state
from jaxrl_post.training.update import make_score_step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "evidence" / "meshes.jsonl"
SEEDS = ROOT / "docs" / "evidence" / "quickstart.jsonl"
MESHES = {
    "1x1x1": (1, 1, 1),
    "8x1x1": (8, 1, 1),
    "1x8x1": (1, 8, 1),
    "2x2x2": (2, 2, 2),
    "1x2x4": (1, 2, 4),
}
EDGE = 1e-4
"""Distance between a random number and the edge of a token at which either may win."""

# The devices' programs run in a pool of NPROC threads, by default one per core; waiting
# for each other, devices would starve there, see tests/conftest.py.
DEVICES = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "NPROC": "32"}

RECIPE = recipes.pgpo(policy_gradient_weight=0.5, truncated_importance=None)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every mesh is given.

    Attributes:
      policy: the model.
      params: on the host.
      rules: of the mesh, where they are not the default ones.
      contexts, mask: ``[P, S]``.
      group_size: G.
      length: T, of a response.
    """

    policy: Policy
    params: Any
    contexts: np.ndarray
    mask: np.ndarray
    rules: Any = None
    group_size: int = 4
    length: int = 24

    @property
    def key(self) -> jax.Array:
        return jax.random.key(11)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one mesh made of it: host arrays, and bytes of one device.

    Attributes:
      random: ``[B, T]`` tokens of zero logits.
      tokens, mask: ``[B, T]`` tokens of the model, and which there are.
      logps: ``[B, T]`` of the tokens that the reference sampled.
      metrics: of the update.
      grads: pytree.
      bytes: of parameters, optimizer state, teacher and cache, after the update.
      shardings: of the same, by name, as the update is given them; of the cache that
        of one layer's keys.
    """

    random: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    logps: np.ndarray
    metrics: dict[str, float]
    grads: Any
    bytes: dict[str, int]
    shardings: dict[str, Any]


def science_problem() -> Problem:
    """The embedded model and eight questions of the science task."""
    policy, params, tokenizer = models.load("science_base")
    task = tasks.load("science", levels=[1, 2])
    rows = generation.tokenize_prompts(tokenizer, task.prompts(0, 0, 8).messages)
    contexts, mask = generation.pad_contexts(rows, 16)
    return Problem(policy, jax.device_get(params), contexts, mask)


def measure(
    problem: Problem, sizes: tuple[int, ...], reference: Outcome | None = None
) -> Outcome:
    """The outcome on one mesh; `reference` is that of 1x1x1, whose tokens are used."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    params = shard(problem.params, problem.policy.logical_axes, mesh, problem.rules)
    seen: list[Any] = []

    def hidden(params, tokens, positions, segments, cache=None):
        if cache is not None and cache.prefix is not None:  # in the decoding loop
            keys = jax.tree.leaves(cache.keys)[0]
            jax.debug.inspect_array_sharding(
                keys, callback=lambda s: seen.append((s, keys.shape, keys.dtype))
            )
        return problem.policy.hidden(params, tokens, positions, segments, cache)

    sampler = generation.Sampler(
        dataclasses.replace(problem.policy, hidden=hidden),
        max_new_tokens=problem.length,
        stop_tokens=problem.policy.config.stop_token_ids,
    )
    generate = functools.partial(
        sampler.generate,
        contexts=problem.contexts,
        context_mask=problem.mask,
        group_size=problem.group_size,
        key=problem.key,
    )
    name = "embed" if "unembed" not in params else "unembed"
    with jax.set_mesh(mesh):
        silent = {**params, name: jnp.zeros_like(params[name])}
        random = generate(silent)
        rollouts = generate(params)
    given = reference or rollouts
    batch = make_batch(problem, given.tokens, given.mask)
    logps = make_score_step(problem.policy, mesh=mesh)(params, batch)
    optimizer = optax.chain(record(), optax.adamw(1e-3))
    state = init_state(params, optimizer, RECIPE, problem.key)
    layout = {name: jax.tree.map(lambda x: x.sharding, t) for name, t in parts(state)}
    update = make_update_step(problem.policy, RECIPE, optimizer, mesh=mesh)
    state, metrics = update(state, batch)
    cache, shape, dtype = seen[-1]
    layers = 2 * problem.policy.config.num_layers  # keys and values
    return Outcome(
        random=random.tokens,
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        logps=np.asarray(logps),
        metrics={k: float(v) for k, v in jax.device_get(metrics).items()},
        grads=jax.device_get(state.opt_state[0]),
        bytes={
            **{name: device_bytes(tree) for name, tree in parts(state)},
            "cache": layers * math.prod(cache.shard_shape(shape)) * dtype.itemsize,
        },
        shardings={**layout, "cache": cache},
    )


def parts(state: TrainState) -> list[tuple[str, Any]]:
    """What devices hold of a state, by name."""
    trees = (state.trainable, state.opt_state[1], state.teacher)
    return [*zip(("parameters", "optimizer", "teacher"), trees, strict=True)]


def record() -> optax.GradientTransformation:
    """Keeps the last gradients as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


def make_batch(problem: Problem, tokens: np.ndarray, mask: np.ndarray) -> Batch:
    """Sampled tokens with made-up advantages; the teacher sees a context that the
    policy did not."""
    rng = np.random.default_rng(5)
    rows = len(tokens)
    return Batch(
        contexts=problem.contexts.astype(np.int32),
        context_mask=np.asarray(problem.mask) != 0,
        responses=np.asarray(tokens),
        token_mask=mask,
        loss_mask=mask,
        sequence_mask=np.ones(rows, bool),
        advantages=rng.normal(size=rows).astype(np.float32),
        teacher_contexts=np.roll(problem.contexts, 1, axis=0).astype(np.int32),
        teacher_context_mask=np.roll(np.asarray(problem.mask) != 0, 1, axis=0),
        teacher_index=(np.arange(rows) // problem.group_size).astype(np.int32),
        extras={
            "distilled": np.arange(rows) % 5 != 1,
            "distillation_weight": np.ones(rows, np.float32),
        },
    )


def device_bytes(tree: Any) -> int:
    """Of the device that holds the most."""
    held: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for part in leaf.addressable_shards:
            held[part.device] = held.get(part.device, 0) + part.data.nbytes
    return max(held.values())


def unexplained(
    problem: Problem, tokens: np.ndarray, others: np.ndarray, edge: float = EDGE
) -> list[int]:
    """Rows whose first differing token was no close call: one where a random number
    moved by `edge` gives the other token."""
    wrong = []
    for row in np.flatnonzero((tokens != others).any(1)):
        at = int(np.argmax(tokens[row] != others[row]))
        near = near_tokens(problem, tokens, row, at, edge)
        if not {int(tokens[row, at]), int(others[row, at])} <= near:
            wrong.append(int(row))
    return wrong


def near_tokens(
    problem: Problem, tokens: np.ndarray, row: int, at: int, edge: float
) -> set[int]:
    """What token `at` of a row may be, its random numbers moved by up to `edge`."""
    prompt = row // problem.group_size
    context = problem.contexts[prompt][np.asarray(problem.mask[prompt]) != 0]
    ids = jnp.asarray(np.concatenate([context, tokens[row, :at]]))[None]
    hidden, _ = problem.policy.hidden(
        problem.params, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)
    )
    logits = vocabulary.logits(
        hidden[:, -1],
        problem.policy.unembedding(problem.params),
        vocab_size=problem.policy.vocab_size,
    )
    own = jax.random.fold_in(problem.key, row)
    uniforms = jax.random.uniform(own, (problem.length, 2))[at]
    moves = np.array([*itertools.product((-edge, 0.0, edge), repeat=2)], np.float32)
    near = choose_tokens(
        jnp.repeat(logits, len(moves), axis=0), jnp.clip(uniforms[None] + moves, 0, 1)
    )
    return {*near.tokens.tolist()}


def compare(problem: Problem, name: str, one: Outcome, other: Outcome) -> dict:
    """A line of the table."""

    def distance(a, b):
        leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(np.abs(np.asarray(x) - y).max()) for x, y in leaves)

    differ = (one.tokens != other.tokens).any(1)
    zeros = jax.tree.map(np.zeros_like, one.grads)
    return {
        "claim": "meshes",
        "mesh": name,
        "random_tokens_equal": bool((one.random == other.random).all()),
        "rows": len(differ),
        "rows_that_differ": int(differ.sum()),
        "unexplained": unexplained(problem, one.tokens, other.tokens),
        "logps": distance(one.logps, other.logps),
        "largest_logp": distance(one.logps, np.zeros_like(one.logps)),
        "loss": abs(one.metrics["loss"] - other.metrics["loss"]),
        "gradient": distance(one.grads, other.grads),
        "largest_gradient": distance(one.grads, zeros),
        "bytes": other.bytes,
        "cache": str(getattr(other.shardings["cache"], "spec", None)),
    }


def rows(problem: Problem, meshes: dict[str, tuple[int, ...]]) -> Iterator[dict]:
    """A line for every mesh; the first is what the others are held against."""
    reference = None
    for name, sizes in meshes.items():
        outcome = measure(problem, sizes, reference)
        reference = reference or outcome
        yield compare(problem, name, reference, outcome)


def train(sizes: tuple[int, int, int] = (2, 2, 2), seed: int = 0) -> dict:
    """The quickstart on a mesh, beside its seeds on one device."""
    name = "x".join(map(str, sizes))
    score = "science/avg@16"
    with tempfile.TemporaryDirectory() as folder:
        mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        command = [str(ROOT / "configs" / "quickstart.yaml"), f"run.dir={folder}/run"]
        command += [f"run.seed={seed}", f"mesh={json.dumps(mesh)}"]
        subprocess.run(
            [sys.executable, "-m", "jaxrl_post.cli", "train", *command],
            cwd=ROOT,
            env=os.environ | DEVICES,
            check=True,
        )
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    found = [json.loads(lines[i])[f"eval/{score}"] for i in (0, -1)]
    seeds = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    one = [r["scores"][score][1] for r in seeds if r["config"] == "quickstart"]
    return {
        "claim": "training on a mesh",
        "mesh": name,
        "config": "quickstart",
        "seed": seed,
        "score": score,
        "base_and_final": found,
        "one_device": one,
        "within_its_range": min(one) <= found[1] <= max(one),
    }


def table(lines: list[dict]) -> str:
    """In Markdown."""
    heads = ["mesh", "random numbers", "sampled rows that differ", "log-probs"]
    heads += ["loss", "gradient", "of", "KB per device: parameters", "optimizer"]
    heads += ["teacher", "cache"]
    text = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for line in [x for x in lines if x["claim"] == "meshes"]:
        cells = [line["mesh"], "equal" if line["random_tokens_equal"] else "differ"]
        cells.append(f"{line['rows_that_differ']} of {line['rows']}")
        if line["unexplained"]:
            cells[-1] += f", {len(line['unexplained'])} of them unexplained"
        cells += [f"{line[k]:.1e}" for k in ("logps", "loss", "gradient")]
        cells.append(f"{line['largest_gradient']:.1e}")
        cells += [f"{n / 1024:.0f}" for n in line["bytes"].values()]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def training_table(lines: list[dict]) -> str:
    """The run on a mesh beside those on one device, in Markdown."""
    text = ["| config | mesh | seed | base → final | on one device, by seed |"]
    text.append("|---|---|---|---|---|")
    for line in [x for x in lines if x["claim"] != "meshes"]:
        scores = " → ".join(f"{x:.3f}" for x in line["base_and_final"])
        one = ", ".join(f"{x:.3f}" for x in line["one_device"])
        cells = [line["config"], line["mesh"], str(line["seed"]), scores, one]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def read() -> list[dict]:
    """The lines that there are."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="train on 2x2x2 as well")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    lines = read()
    done = {(line["claim"], line["mesh"]) for line in lines}

    def keep(line):
        lines.append(line)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if not arguments.table:
        if any(("meshes", name) not in done for name in MESHES):
            os.environ.update(DEVICES)
            jax.config.update("jax_num_cpu_devices", 8)
            jax.config.update("jax_platforms", "cpu")
            for line in rows(science_problem(), MESHES):
                if ("meshes", line["mesh"]) not in done:
                    keep(line)
        if arguments.train and ("training on a mesh", "2x2x2") not in done:
            keep(train())
    print(table(lines), training_table(lines), sep="\n\n")


if __name__ == "__main__":
    main()
