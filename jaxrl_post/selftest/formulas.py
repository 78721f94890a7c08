"""Losses and the vocabulary pass against their formulas in float64 on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import losses, vocabulary
from jaxrl_post.selftest.measured import Measured

BOUND = 1e-4
"""Of differences between numbers of about 1: accelerators round their exponentials and
logarithms to some 1e-6; a wrong formula misses by far more."""

_STEP = 1e-30
_n, _v = np.ogrid[:12, :9]
STUDENT = 1.5 * np.sin(0.7 * _n + 0.9 * _v)
TEACHER = 1.5 * np.cos(0.4 * _n + 1.1 * _v)
TOKENS = (np.arange(12) * 5 + 1) % 9
ADVANTAGES = np.cos(np.arange(12.0))
OLD = -2.0 + 0.4 * np.sin(3.0 * np.arange(12))


def _log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _logps(z):
    return np.take_along_axis(_log_softmax(z), TOKENS[:, None], -1)[:, 0]


def _kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def _jensen_shannon(z):
    student, teacher = _log_softmax(z), _log_softmax(TEACHER)
    middle = np.log((np.exp(student) + np.exp(teacher)) / 2)
    return (_kl(student, middle) + _kl(teacher, middle)) / 2


def _clipped(z):
    ratio = np.exp(_logps(z) - OLD)
    inside = np.where(ratio.real < 0.8, 0.8, np.where(ratio.real > 1.28, 1.28, ratio))
    plain, clipped = ratio * ADVANTAGES, inside * ADVANTAGES
    return -np.where(plain.real <= clipped.real, plain, clipped)


def _ours_logps(z):
    return jnp.take_along_axis(jax.nn.log_softmax(z), TOKENS[:, None], -1)[:, 0]


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "forward KL": (
        lambda z: losses.self_distillation(z, jnp.asarray(TEACHER), alpha=0.0),
        lambda z: _kl(_log_softmax(TEACHER), _log_softmax(z)),
    ),
    "reverse KL": (
        lambda z: losses.self_distillation(z, jnp.asarray(TEACHER), alpha=1.0),
        lambda z: _kl(_log_softmax(z), _log_softmax(TEACHER)),
    ),
    "Jensen-Shannon": (
        lambda z: losses.self_distillation(z, jnp.asarray(TEACHER), alpha=0.5),
        _jensen_shannon,
    ),
    "clipped policy gradient": (
        lambda z: losses.clipped_policy_gradient(
            _ours_logps(z)[:, None],
            jnp.asarray(OLD)[:, None],
            jnp.asarray(ADVANTAGES),
            clip_low=0.2,
            clip_high=0.28,
        )[:, 0],
        _clipped,
    ),
    "KL to the reference (k3)": (
        lambda z: losses.reference_kl(_ours_logps(z), jnp.asarray(OLD)),
        lambda z: np.exp(OLD - _logps(z)) - (OLD - _logps(z)) - 1,
    ),
    "shaped imitation": (
        lambda z: losses.shaped_imitation(_ours_logps(z), gamma=0.1),
        lambda z: -np.exp(_logps(z)) / (np.exp(_logps(z)) + 0.1),
    ),
    "entropy": (
        lambda z: losses.entropy(z),
        lambda z: -(np.exp(_log_softmax(z)) * _log_softmax(z)).sum(-1),
    ),
}
"""Each loss of this package on logits ``[n, V]``, and its formula in NumPy."""


def check_losses() -> Iterator[Measured]:
    """Value and gradient of every case, on the device in float32."""
    logits = jnp.asarray(STUDENT, jnp.float32)
    for name, (ours, formula) in CASES.items():

        def total(z, ours=ours):
            values = ours(z)
            return values.sum(), values

        grads, values = jax.jit(jax.grad(total, has_aux=True))(logits)
        value = _distance(values, formula(STUDENT + 0j).real)
        slope = _distance(grads, _gradient(formula, STUDENT))
        yield Measured(f"loss: {name}", max(value, slope), BOUND)


def check_vocabulary() -> Iterator[Measured]:
    """Log-probs and entropies of the chunked pass, and the gradient of both: as numbers
    per token, and as a sum whose gradient is formed in the forward pass."""
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(60, 64)), rng.normal(size=(500, 64)) / 8
    tokens = rng.integers(0, 500, 60)

    def formula(hidden):
        logps = _log_softmax(hidden @ unembedding.T)
        chosen = np.take_along_axis(logps, tokens[:, None], -1)[:, 0]
        return chosen - (np.exp(logps) * logps).sum(-1)

    def score(logits, ids):
        return logits.log_probs(ids) + logits.entropy()

    def per_token(*arguments):
        values = vocabulary.map_logits(score, *arguments, chunk_size=16)
        return values.sum(), values

    def summed(*arguments):
        def loss(logits, ids):
            values = score(logits, ids)
            return values, values

        return vocabulary.sum_logits(loss, *arguments, chunk_size=16)

    # The unembedding's gradient is held against its slope along one direction.
    direction = rng.normal(size=unembedding.shape)
    moved = _log_softmax(hidden @ (unembedding + _STEP * 1j * direction).T)
    chosen = np.take_along_axis(moved, tokens[:, None], -1)[:, 0]
    along = (chosen - (np.exp(moved) * moved).sum(-1)).imag.sum() / _STEP
    arguments = (
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(unembedding, jnp.float32),
        jnp.asarray(tokens),
    )
    for name, total in (("pass", per_token), ("sum", summed)):
        with jax.default_matmul_precision("highest"):
            grads, values = jax.jit(jax.grad(total, (0, 1), has_aux=True))(*arguments)
        value = _distance(values, formula(hidden))
        slope = _distance(grads[0][:4], _gradient(formula, hidden)[:4])
        turn = np.asarray((grads[1] * direction).sum() - along) / abs(along)
        value = max(value, slope, float(abs(turn)))
        yield Measured(f"vocabulary {name}", value, BOUND)


def _gradient(formula, at: np.ndarray) -> np.ndarray:
    """Of the formula's sum over rows, each of which depends on its own row alone: one
    complex step per column, exact to rounding."""
    columns = []
    for column in range(at.shape[1]):
        moved = at.astype(complex)
        moved[:, column] += _STEP * 1j
        columns.append(formula(moved).imag / _STEP)
    return np.stack(columns, axis=1)


def _distance(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max())
