"""Makes the embedded base model from scratch: tokenizer, training, figures.

    python scripts/make_base.py --out build/base                  # tens of minutes
    python scripts/make_base.py --out build/base --ceiling 400    # supervised, on top
    python scripts/make_base.py --out build/base --install        # into the package

A training that was interrupted goes on where it last left off. Everything follows from
the seed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from base_corpus import EARLY_HARD, examples, packed_batches, right_example
from base_evaluation import Answerer, figures, table
from base_tokenizer import make_tokenizer
from optax.contrib import MuonDimensionNumbers
from transformers import AutoTokenizer

import jaxrl_post
from jaxrl_post import models

ROWS, WIDTH = 28, 128
INSTALLED = Path(jaxrl_post.__file__).parent / "assets" / "science_base"


def config(vocab_size: int) -> models.DecoderConfig:
    """About 0.9 M parameters; heads, width and MLP divide by 4."""
    return models.DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        tie_embeddings=True,
        max_positions=512,
    )


def loss_fn(policy, params, batch):
    """Mean negative log-likelihood of the response tokens."""
    hidden, _ = policy.hidden(
        params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    logps = jax.nn.log_softmax(hidden @ policy.unembedding(params).T)
    targets = batch["targets"]
    picked = jnp.take_along_axis(logps, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    mask = targets >= 0
    return -jnp.where(mask, picked, 0.0).sum() / mask.sum()


def muon_axes(params):
    """Which axes of a stacked weight are a matrix's rows and columns."""

    def axes(path, x):
        names = [getattr(key, "key", None) for key in path]
        if "kernel" not in names:
            return None
        if "o" in names:
            return MuonDimensionNumbers((1, 2), 3)
        return MuonDimensionNumbers(1, tuple(range(2, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(steps: int, decay: int, peak: float) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for the rest.

    Warm-up, a constant rate, and a linear decay to zero over the last `decay` steps.
    Muon learns this corpus in far fewer steps than Adam.
    """
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, 50),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [50, steps - decay],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            consistent_rms=0.2,
            weight_decay=0.02,
            adam_b2=0.98,
            muon_weight_dimension_numbers=muon_axes,
        ),
    )


def prefetch(stream: Iterator) -> Iterator:
    """Makes batches in a thread while the device computes."""
    ready: queue.Queue = queue.Queue(maxsize=4)

    def fill():
        for item in stream:
            ready.put(item)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield ready.get()


def train(policy, params, batches, optimizer, *, steps, folder=None, every=250):
    """Trains; with a `folder`, saves every so often and resumes where it left off."""
    state, first = optimizer.init(params), 0
    stored = folder / "state.npz" if folder else None
    if stored and stored.exists():
        (params, state), first = load_tree((params, state), stored)
        for _ in range(first):
            next(batches)
    batches = prefetch(batches)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(lambda p: loss_fn(policy, p, batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    start, losses = time.time(), []
    for number in range(first + 1, steps + 1):
        params, state, loss = step(params, state, next(batches))
        losses.append(loss)
        if number % 50 == 0 or number == steps:
            mean, losses = float(jnp.stack(losses).mean()), []
            seconds = time.time() - start
            print(f"step {number} loss {mean:.4f} {seconds:.0f} s", flush=True)
        if stored and number % every == 0:
            save_tree((params, state), number, stored)
    return params


def save_tree(tree, step: int, path: Path) -> None:
    leaves = {f"{i:03}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    np.savez(path.with_suffix(".new.npz"), step=step, **leaves)
    path.with_suffix(".new.npz").replace(path)


def load_tree(like, path: Path):
    with np.load(path) as stored:
        names = sorted(set(stored.files) - {"step"})
        leaves = [jnp.asarray(stored[name]) for name in names]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), int(stored["step"])


def open_tokenizer(folder: Path):
    """The tokenizer of the training folder, learnt from the corpus the first time."""
    if not (folder / "tokenizer.json").exists():
        stream = examples(Random("tokenizer"), hard=EARLY_HARD)
        sample = itertools.islice(stream, 6000)
        texts = [text for e in sample for text in (e.prompt, e.response)]
        make_tokenizer(texts).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make(args) -> None:
    """Trains the base and saves it under ``model``."""
    tokenizer = open_tokenizer(args.out)
    policy = models.decoder(config(len(tokenizer)))
    params = policy.init(jax.random.key(args.seed))
    early = examples(Random(f"base {args.seed}"), hard=EARLY_HARD)
    late = examples(Random(f"base {args.seed} late"))
    early, late = (
        packed_batches(stream, tokenizer, rows=ROWS, width=WIDTH)
        for stream in (early, late)
    )
    params = train(
        policy,
        params,
        itertools.chain(itertools.islice(early, args.steps - args.late), late),
        make_optimizer(args.steps, args.decay, args.peak),
        steps=args.steps,
        folder=args.out,
    )
    models.save(policy, params, tokenizer, args.out / "model", overwrite=True)


def measure(args, seconds: float) -> None:
    """Writes the figures of the saved model beside its weights."""
    folder = args.out / "model"
    policy, params, tokenizer = models.load(folder)
    result = figures(Answerer(policy, params, tokenizer), split=args.split)
    weights = (folder / "model.safetensors").read_bytes()
    result |= {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "seconds": round(seconds),
        "command": "python scripts/make_base.py --out build/base "
        + " ".join(f"--{n} {getattr(args, n)}" for n in ("steps", "seed")),
    }
    write(result, folder / "figures.json")


def ceiling(args) -> None:
    """What supervised training on correct plain solutions makes of the base."""
    folder = args.out / "model"
    policy, params, tokenizer = models.load(folder)
    rng = Random(f"ceiling {args.seed}")
    stream = (right_example(rng, "train", (1, 2, 3, 4)) for _ in itertools.count())
    params = train(
        policy,
        params,
        packed_batches(stream, tokenizer, rows=ROWS, width=WIDTH),
        make_optimizer(args.ceiling, args.ceiling // 2, args.peak / 2),
        steps=args.ceiling,
    )
    result = figures(Answerer(policy, params, tokenizer), split=args.split)
    write(result | {"steps": args.ceiling}, folder / "ceiling.json")


def write(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print("greedy fails where avg@16 < .5:", result["greedy_fails_below_half"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--late", type=int, default=900)
    parser.add_argument("--decay", type=int, default=700)
    parser.add_argument("--peak", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", help="of the figures")
    parser.add_argument("--figures", action="store_true", help="measure only")
    parser.add_argument("--ceiling", type=int, default=0, metavar="STEPS")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.install:
        shutil.copytree(args.out / "model", INSTALLED, dirs_exist_ok=True)
    elif args.ceiling:
        ceiling(args)
    else:
        start = time.time()
        if not args.figures:
            make(args)
        measure(args, time.time() - start)


if __name__ == "__main__":
    main()
