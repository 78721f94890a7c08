"""How far PGPO's step size and the gradient that it multiplies go together.

    python -m scripts.experiments.covariance            # a minute or two of one core

Algorithm 1 takes the multiplier rho_k and the gradient g_k from one batch: beside
``E rho E g`` the expected step then has ``Cov(rho_k, g_k)``, which the paper's theory
leaves out (docs/pgpo.md). Here both are measured at one point, the base model: batches
are sampled and no step is taken.

Protocol, fixed before the run (exploratory)
- PGPO with sensitivity 1 as in pgpo_vs_sdpo.py, 48 batches of 4 questions x 8 samples,
  the plain gradient before clipping and Adam, seed 0.
- Report: the norm of the covariance over that of ``mean rho x mean g``; the median of
  the same for rho in 2000 random orders, which is what 48 batches show where there is
  none; the share of orders with at least that norm (a permutation test).
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ._runs import EVIDENCE, ONE_THREAD, ROOT, short

BATCHES, SEED, ORDERS = 48, 0, 2000
PATH = EVIDENCE / "covariance.jsonl"


def measure() -> dict[str, Any]:
    """The row."""
    os.chdir(ROOT)
    os.environ.setdefault("XLA_FLAGS", ONE_THREAD)  # before jax starts
    import jax
    import jax.numpy as jnp
    import optax
    from jax.flatten_util import ravel_pytree

    from jaxrl_post import recipes
    from jaxrl_post.recipes.recipe import Information
    from jaxrl_post.training.config import load_config
    from jaxrl_post.training.loop import run

    from .pgpo_vs_sdpo import COMMON

    class Record(NamedTuple):
        scale: Any
        gradients: jax.Array
        multipliers: jax.Array

    @dataclass(frozen=True)
    class Recorded(Information):
        """Keeps gradients and multipliers, and takes no step."""

        def transform(self):
            inner = super().transform()

            def init(params):
                size = ravel_pytree(params)[0].size
                kept = jnp.zeros((BATCHES, size)), jnp.zeros(BATCHES)
                return Record(inner.init(params), *kept)

            def update(updates, state, params=None, **extra):
                _, scale = inner.update(updates, state.scale, params, **extra)
                k, gradient = state.scale.finite, ravel_pytree(updates)[0]
                kept = state.gradients.at[k].set(gradient)
                rho = state.multipliers.at[k].set(scale.multiplier)
                nothing = jax.tree.map(jnp.zeros_like, updates)
                return nothing, Record(scale, kept, rho)

            return optax.GradientTransformationExtraArgs(init, update)

    told = [
        *(text for text in COMMON if not text.startswith("recipe.")),
        f"training.steps={BATCHES}",
        f"run.seed={SEED}",
        "run.judge_workers=1",
        "evaluation={}",
        *("optimizer.name=sgd", "optimizer.b1=0", "optimizer.max_grad_norm=null"),
    ]
    recipe = recipes.make("pgpo", sensitivity=1.0, max_length=100)
    about = recipe.information
    assert about is not None
    values = {f.name: getattr(about, f.name) for f in fields(about)}
    recipe = replace(recipe, information=Recorded(**values))
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "configs/pgpo_science.yaml", [*told, f"run.dir={folder}/r"]
        )
        state = run(config, recipe=recipe).state
    assert state is not None
    ((_, record),) = optax.tree.get_all_with_path(state.opt_state, Record.__name__)
    rho, gradients = (
        np.asarray(x, np.float64) for x in (record.multipliers, record.gradients)
    )
    return {
        "claim": "covariance",
        "method": "PGPO 1.0",
        "model": "science_base",
        "seed": SEED,
        "command": ["jaxrl-post", "train", "configs/pgpo_science.yaml", *told],
        **covariance(rho, gradients @ gradients.T),
    }


def covariance(rho: np.ndarray, products: np.ndarray) -> dict[str, Any]:
    """The norm of Cov(rho, g), beside what other orders of rho give.

    Args:
      rho: [K] multipliers.
      products: [K, K] inner products of the gradients.

    >>> both = covariance(np.array([1.0, 2.0]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    >>> both["relative"]  # (g_2 - g_1) / 2 over 1.5 (g_1 + g_2) / 2
    0.666667
    """
    count = len(rho)

    def norm(weights: np.ndarray) -> float:
        return float(np.sqrt(max(weights @ products @ weights, 0.0)))

    evenly = np.full(count, 1 / count)
    expected = rho.mean() * norm(evenly)
    weights = (rho - rho.mean()) / (count - 1)
    own = norm(weights)
    rng = np.random.default_rng(0)
    others = [norm(rng.permutation(weights)) for _ in range(ORDERS)]
    along = weights @ products @ evenly / norm(evenly)
    return {
        "batches": count,
        "mean_multiplier": short(rho.mean()),
        "std_multiplier": short(rho.std(ddof=1)),
        "relative": short(own / expected),
        "along_mean_gradient": short(along / expected),
        "relative_by_chance": short(float(np.median(others)) / expected),
        "p": short((1 + sum(other >= own for other in others)) / (1 + ORDERS)),
    }


def main() -> None:
    row = measure()
    PATH.write_text(json.dumps(row) + "\n")
    print({key: value for key, value in row.items() if key != "command"})


if __name__ == "__main__":
    main()
