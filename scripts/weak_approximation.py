"""PGPO's theory in numbers: how well an SDE describes steps modulated by rho.

    python scripts/weak_approximation.py --out weak_approximation.jsonl

An SDE is an order-a weak approximation of an optimizer if, for every test function g,
`max over k <= T/eta of |E g(theta_SDE(k eta)) - E g(theta_k)| <= C eta^a`. Theorem 2 of
arXiv 2606.03620 gives order 1 for `d theta = -rho grad L dt + s dw`. Here
L = theta^2/2, the gradient of a batch is `theta + z` with `z ~ N(0, 1)`, and T = 1, so
that both sides have closed forms. Three tables:

1. rho = 1.5, g = theta^2, for several diffusions s. As printed the theorem drops the
   sqrt(eta); with s = 1 the error does not fall.
2. rho is 1 or 2, 1.5 on average; g = theta, to which s does not matter. If rho comes
   from the batch that gives the gradient, its covariance with the gradient is a drift
   that no SDE of the theorem has. With rho of an independent batch there is none, with
   that of the previous step (`delay=1`) it is eta times smaller.
3. Both by Monte Carlo, through `transforms.scale_by_information` after optax's sgd.

Closed forms are NumPy in float64. `slope` is least squares in log-log.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post.transforms import scale_by_information

ETAS = (0.1, 0.05, 0.025, 0.0125)
RHO = 1.5
DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "sqrt(eta)": math.sqrt,
    "rho sqrt(eta)": lambda eta: RHO * math.sqrt(eta),
    "1": lambda eta: 1.0,
    "0": lambda eta: 0.0,
}
ROWS = (
    (1, "max over k", "sqrt(eta)"),
    (1, "max over k", "rho sqrt(eta)"),
    (1, "at T only", "rho sqrt(eta)"),
    (1, "max over k", "1"),
    (1, "max over k", "0"),
    (0, "max over k", "sqrt(eta)"),
    (0, "max over k", "rho sqrt(eta)"),
)
GAINS_FROM = ("own batch", "previous step", "independent batch")
COVARIANCE = 0.5 * math.sqrt(2 / math.pi)
"""Of rho = 1.5 + 0.5 sign(z) and z."""
LIMIT = COVARIANCE * (1 - math.exp(-RHO)) / RHO
"""The error in E theta that this covariance leaves as eta goes to 0."""


class Row(NamedTuple):
    """One line of a table: errors at each of `ETAS` and how fast they fall."""

    table: str
    setting: str
    errors: list[float]
    slope: float
    standard_errors: list[float] | None = None


def slope(errors: Sequence[float]) -> float:
    """Least-squares slope of log error over log eta.

    >>> round(slope([0.3 * eta**2 for eta in ETAS]), 6)
    2.0
    """
    return float(np.polyfit(np.log(ETAS), np.log(errors), 1)[0])


def times(eta: float) -> np.ndarray:
    """``[T/eta + 1]``, k eta for every k."""
    return eta * np.arange(round(1 / eta) + 1)


def second_moments(eta: float, start: float, variance: float = 0.0) -> np.ndarray:
    """E theta_k^2 of ``theta <- theta - eta rho (theta + z)``, every k.

    Here rho has mean 1.5 and the given variance, and is independent of z.
    """
    moments = [start**2]
    for _ in times(eta)[1:]:
        shrunk = (1 - RHO * eta) ** 2 + variance * eta**2
        moments.append(shrunk * moments[-1] + (RHO**2 + variance) * eta**2)
    return np.array(moments)


def sde_second_moments(eta: float, start: float, diffusion: float) -> np.ndarray:
    """E theta(k eta)^2 of ``d theta = -rho theta dt + diffusion dw``, every k."""
    decay = np.exp(-2 * RHO * times(eta))
    return start**2 * decay + diffusion**2 / (2 * RHO) * (1 - decay)


def first_moments(eta: float, gains_from: str) -> np.ndarray:
    """E theta_k from theta_0 = 1, for rho = 1 or 2 by the sign of a batch's noise.

    From the own batch, rho's covariance with the gradient is there at every step. From
    the previous one it is that of rho_k with theta_k: eta times smaller, so the error
    keeps order 1. The first rho is 1 there, as in the transform.
    """
    mean, moments = 1.0, [1.0]
    previous_rho = rho = 1.0 if gains_from == "previous step" else RHO
    for k in range(len(times(eta)) - 1):
        covariance = 0.0
        if gains_from == "own batch":
            covariance = COVARIANCE
        elif gains_from == "previous step" and k:
            covariance = -eta * previous_rho * COVARIANCE
        mean -= eta * (rho * mean + covariance)
        moments.append(mean)
        previous_rho, rho = rho, RHO
    return np.array(moments)


def diffusion_rows() -> list[Row]:
    """Errors in E theta^2 for a constant rho, by start, kind of error and diffusion."""
    rows = []
    for start, where, name in ROWS:
        gaps = [
            np.abs(
                sde_second_moments(eta, start, DIFFUSIONS[name](eta))
                - second_moments(eta, start)
            )
            for eta in ETAS
        ]
        errors = [float(gap[-1] if where == "at T only" else gap.max()) for gap in gaps]
        setting = f"theta_0 = {start}, {where}, s = {name}"
        rows.append(Row("theta^2, rho = 1.5", setting, errors, slope(errors)))
    return rows


def gain_rows() -> list[Row]:
    """Largest errors over k from theta_0 = 1, by the batch that rho comes from."""
    rows = []

    def add(setting: str, gaps: Iterable[np.ndarray]) -> None:
        errors = [float(np.abs(gap).max()) for gap in gaps]
        rows.append(Row("rho in {1, 2}, theta_0 = 1", setting, errors, slope(errors)))

    for gains_from in GAINS_FROM:
        add(
            f"theta, rho of the {gains_from}",
            (
                first_moments(eta, gains_from) - np.exp(-RHO * times(eta))
                for eta in ETAS
            ),
        )
    add(
        "theta^2, the same, s = sqrt(eta)",
        (
            second_moments(eta, 1, variance=0.25)
            - sde_second_moments(eta, 1, math.sqrt(eta))
            for eta in ETAS
        ),
    )
    return rows


def simulate(key: jax.Array, eta: float, *, gains_from: str, paths: int) -> jax.Array:
    """Means of theta_k and theta_k^2 over paths of the real optimizer from 1.

    Args:
      key: a random key.
      eta: learning rate; may be traced.
      gains_from: one of `GAINS_FROM`, or "constant" for rho = 1.5.
      paths: number of independent paths.

    Returns:
      ``[2, K + 1]``, as many steps K as the smallest of `ETAS` needs.
    """
    delay = int(gains_from == "previous step")
    optimizer = optax.chain(optax.sgd(eta), scale_by_information(1.0, delay=delay))
    steps = round(1 / min(ETAS))

    def step(carry, batch):
        theta, state = carry
        noise, gain = batch
        updates, state = optimizer.update(theta + noise, state, information=gain)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    def path(key):
        batches = 2 if gains_from == "independent batch" else 1
        noises = jax.random.normal(key, (batches, steps))
        gains = jnp.where(noises[-1] > 0, jnp.log(2.0), 0.0)
        if gains_from == "constant":
            gains = jnp.full(steps, jnp.log(RHO))
        start = jnp.ones(())
        carry = start, optimizer.init(start)
        _, thetas = jax.lax.scan(step, carry, (noises[0], gains))
        return jnp.append(start, thetas)

    thetas = jax.vmap(path)(jax.random.split(key, paths))
    return jnp.stack([thetas.mean(0), (thetas**2).mean(0)])


def monte_carlo_row(gains_from: str, *, seeds: int, paths: int) -> Row:
    """The largest error over k and its standard error, from the spread over seeds."""
    constant = gains_from == "constant"
    run = jax.jit(partial(simulate, gains_from=gains_from, paths=paths))
    errors, standard_errors = [], []
    for eta in ETAS:
        moments = np.array([run(jax.random.key(seed), eta) for seed in range(seeds)])
        sampled = moments[:, int(constant), : len(times(eta))].astype(float)
        expected = np.exp(-RHO * times(eta))
        if constant:
            expected = sde_second_moments(eta, 1, DIFFUSIONS["rho sqrt(eta)"](eta))
        gap = np.abs(sampled.mean(0) - expected)
        worst = int(gap.argmax())
        errors.append(float(gap[worst]))
        spread = sampled[:, worst].std(ddof=1)
        standard_errors.append(float(spread) / math.sqrt(seeds))
    setting = f"theta, rho of the {gains_from}"
    if constant:
        setting = "theta^2, rho = 1.5, s = rho sqrt(eta)"
    table = f"Monte Carlo, theta_0 = 1, {seeds} seeds of {paths} paths"
    return Row(table, setting, errors, slope(errors), standard_errors)


def print_rows(rows: Sequence[Row]) -> None:
    """One table, a heading first."""
    print(f"\n{rows[0].table}\n{'':44}", *(f"{eta:>9g}" for eta in ETAS), "   slope")
    for row in rows:
        print(f"{row.setting:44}", *(f"{e:9.6f}" for e in row.errors), end="")
        print(f"{row.slope:9.3f}")
        if row.standard_errors:
            print(
                f"{'standard error':>44}", *(f"{e:9.6f}" for e in row.standard_errors)
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="0: closed forms only")
    parser.add_argument("--paths", type=int, default=32768, help="of each seed")
    parser.add_argument("--out", type=Path, help="JSON lines, one a row")
    args = parser.parse_args(argv)
    if args.seeds == 1:
        parser.error("--seeds is 1; a standard error needs 2 or more, 0 for none.")
    tables = [diffusion_rows(), gain_rows()]
    if args.seeds:
        options: dict[str, Any] = {"seeds": args.seeds, "paths": args.paths}
        tables.append(
            [monte_carlo_row(s, **options) for s in ("constant", *GAINS_FROM)]
        )
    for rows in tables:
        print_rows(rows)
    print(f"\nlimit of the error with rho of the own batch: {LIMIT:.6f}")
    if args.out is not None:
        lines = [
            json.dumps({**row._asdict(), "etas": ETAS})
            for rows in tables
            for row in rows
        ]
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
