"""Reference numbers for the losses, from the formulas alone: NumPy, float64, no jax.

Values come from the published formulas written out a second time; gradients with
respect to the student's logits from the complex step, `Im f(z + ih) / h`, which has
no subtraction and so is exact to rounding. What carries no gradient is computed from
the real part.

    python scripts/make_goldens.py            # rewrites tests/goldens/losses.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).parents[1] / "tests" / "goldens" / "losses.json"
B, T, V = 3, 4, 6
STEP = 1e-30

b, t, v = np.ogrid[:B, :T, :V]
STUDENT = 1.5 * np.sin(0.7 * (1 + b) + 1.3 * t + 0.9 * v)
TEACHER = 1.5 * np.cos(0.4 * b + 0.8 * t + 1.1 * v)
b, t = np.ogrid[:B, :T]
TOKENS = (2 * b + 3 * t + 1) % V
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], float)
SAMPLES = np.array([1.0, 0.0, 1.0])
LOG_RATIO = np.sin(b + 2 * t)
ROLLOUT_GAP = 0.9 * np.cos(b + t)
ADVANTAGES = np.array([1.0, -0.5, 0.25])
LUFFY_ADVANTAGES = np.array([1.0, 0.0, 1.0]) - 2 / 3


def log_softmax(z):
    shift = z.real.max(-1, keepdims=True)
    return z - shift - np.log(np.exp(z - shift).sum(-1, keepdims=True))


def pick(logps):
    return np.take_along_axis(logps, TOKENS[..., None], -1)[..., 0]


OLD = pick(log_softmax(STUDENT)) - LOG_RATIO  # a constant, like the sampler's
SAMPLER = OLD - ROLLOUT_GAP


def smaller(x, y):
    return np.where(np.real(x) <= np.real(y), x, y)


def larger(x, y):
    return np.where(np.real(x) >= np.real(y), x, y)


def limit(x, low, high):
    return smaller(larger(x, low), high)


def logps_of(z):
    return pick(log_softmax(z))


def kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def divergence(student, teacher, alpha):
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    mixture = np.log((1 - alpha) * np.exp(student) + alpha * np.exp(teacher))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


def distillation(z, alpha, k=None, tail=True, support="student"):
    student, teacher = log_softmax(z), log_softmax(TEACHER)
    if k is not None:
        order = student.real if support == "student" else teacher
        ids = np.argsort(-order, -1, kind="stable")[..., :k]
        student, teacher = (np.take_along_axis(x, ids, -1) for x in (student, teacher))
        close = with_tail if tail else lambda x: x - np.log(mass(x))
        student, teacher = close(student), close(teacher)
    return divergence(student, teacher, alpha)


def mass(logps):
    return np.exp(logps).sum(-1, keepdims=True)


def with_tail(logps):
    total = smaller(np.log(mass(logps)), -1e-7)
    return np.concatenate([logps, np.log(1 - np.exp(total))], -1)


def pessimistic(ratio, advantages, low, high):
    advantages = advantages[:, None]
    clipped = limit(ratio, 1 - low, 1 + high)
    return larger(-advantages * ratio, -advantages * clipped)


def ppo(z, low=0.2, high=0.28, dual=3.0):
    ratio = np.exp(limit(logps_of(z) - OLD, -20, 20))
    loss = pessimistic(ratio, ADVANTAGES, low, high)
    capped = smaller(loss, -dual * ADVANTAGES[:, None])
    return np.where(ADVANTAGES[:, None] < 0, capped, loss)


def sequence_ratio(z):
    return ((logps_of(z) - OLD) * MASK).sum(-1, keepdims=True) / tokens()


def tokens():
    return np.maximum(MASK.sum(-1, keepdims=True), 1)


def gspo_token_form(z):
    logps = logps_of(z)
    log_ratio = sequence_ratio(z).real + logps - logps.real
    return pessimistic(np.exp(smaller(log_ratio, 10)), ADVANTAGES, 0.3, 0.4)


def gspo_sequence_form(z):
    loss = pessimistic(np.exp(sequence_ratio(z)), ADVANTAGES, 0.3, 0.4)
    return np.broadcast_to(loss, (B, T))


def cispo(z, low=0.2, high=0.28, cap=None):
    logps = logps_of(z)
    ratio = np.exp((logps - OLD).real)
    weight = np.clip(ratio, 1 - low, 1 + high) if cap is None else ratio.clip(max=cap)
    return -weight * ADVANTAGES[:, None] * logps


def luffy(z):
    logps = logps_of(z)
    p = np.exp(logps)
    off_policy = np.array([[1.0], [0.0], [0.0]])
    surrogate = off_policy * p / (p + 0.1) + (1 - off_policy) * np.exp(logps - OLD)
    return -LUFFY_ADVANTAGES[:, None] * surrogate


def rollout_weight(level):
    gap = ROLLOUT_GAP if level == "token" else (ROLLOUT_GAP * MASK).sum(-1)[:, None]
    return np.minimum(np.exp(np.clip(gap, -20, 20)), 2.0)


def importance_factor(clip):
    return np.minimum(np.exp(LOG_RATIO), clip)


def reference(z, estimator):
    d = logps_of(z) - OLD
    return {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) + d - 1}[estimator]


def entropy(z):
    logps = log_softmax(z)
    return -(np.exp(logps) * logps).sum(-1)


def sampled(z):
    logps = logps_of(z)
    return (logps.real - pick(log_softmax(TEACHER))) * logps


def token_mean(loss, mask):
    return (loss * mask).sum() / max(mask.sum(), 1)


def sequence_mean(loss, mask):
    counted = mask.sum(-1) > 0
    means = (loss * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
    return means.sum() / max(counted.sum(), 1)


def sequence_mean_over_all(loss, mask):
    return ((loss * mask).sum(-1) / np.maximum(mask.sum(-1), 1)).sum() / B


def sequence_sum_mean(loss, mask):
    return (loss * mask).sum() / max((mask.sum(-1) > 0).sum(), 1)


DISTILLED = MASK * SAMPLES[:, None]
Case = tuple[Callable, Callable, np.ndarray]

CASES: dict[str, Case] = {
    "full a=0.0 token": (lambda z: distillation(z, 0), token_mean, DISTILLED),
    "full a=0.3 token": (lambda z: distillation(z, 0.3), token_mean, DISTILLED),
    "full a=0.5 token": (lambda z: distillation(z, 0.5), token_mean, DISTILLED),
    "full a=1.0 token": (lambda z: distillation(z, 1), token_mean, DISTILLED),
    "top2+tail a=0.5 token": (
        lambda z: distillation(z, 0.5, 2),
        token_mean,
        DISTILLED,
    ),
    "top2+tail a=0.0 token": (lambda z: distillation(z, 0, 2), token_mean, DISTILLED),
    "top2+tail a=1.0 token": (lambda z: distillation(z, 1, 2), token_mean, DISTILLED),
    "top3 renorm a=0.5 token": (
        lambda z: distillation(z, 0.5, 3, tail=False),
        token_mean,
        DISTILLED,
    ),
    "teacher top3+tail a=0.5 token": (
        lambda z: distillation(z, 0.5, 3, support="teacher"),
        token_mean,
        DISTILLED,
    ),
    "teacher top3 renorm a=1.0 token": (
        lambda z: distillation(z, 1, 3, tail=False, support="teacher"),
        token_mean,
        DISTILLED,
    ),
    "top6+tail a=0.5 token": (
        lambda z: distillation(z, 0.5, 6),
        token_mean,
        DISTILLED,
    ),
    "sampled a=1 token": (sampled, token_mean, DISTILLED),
    "full a=.5 isclip1.5 token": (
        lambda z: distillation(z, 0.5) * importance_factor(1.5),
        token_mean,
        DISTILLED,
    ),
    "full a=.5 seqall": (
        lambda z: distillation(z, 0.5),
        sequence_mean_over_all,
        DISTILLED,
    ),
    "full a=.5 token all-masked": (
        lambda z: distillation(z, 0.5),
        token_mean,
        np.zeros((B, T)),
    ),
    "top6(K=V) renorm a=.5 == full": (
        lambda z: distillation(z, 0.5, 6, tail=False),
        token_mean,
        DISTILLED,
    ),
    "ppo .2/.28 c3 token-mean": (ppo, token_mean, MASK),
    "ppo seq-mean": (ppo, sequence_mean, MASK),
    "ppo seq-sum-mean": (ppo, sequence_sum_mean, MASK),
    "ppo dual clip 1.2 token-mean": (
        lambda z: ppo(z, dual=1.2),
        token_mean,
        MASK,
    ),
    "ppo tis token": (lambda z: ppo(z) * rollout_weight("token"), token_mean, MASK),
    "ppo tis sequence": (
        lambda z: ppo(z) * rollout_weight("sequence"),
        token_mean,
        MASK,
    ),
    "gspo .3/.4 token form": (gspo_token_form, sequence_mean, MASK),
    "gspo .3/.4 sequence form": (gspo_sequence_form, sequence_mean, MASK),
    "cispo(verl 2-sided) token": (cispo, token_mean, MASK),
    "cispo(trl cap 2) token": (lambda z: cispo(z, cap=2.0), token_mean, MASK),
    "luffy noclip token-mean": (luffy, token_mean, MASK),
    "k1 token": (lambda z: reference(z, "k1"), token_mean, MASK),
    "k2 token": (lambda z: reference(z, "k2"), token_mean, MASK),
    "k3 token": (lambda z: reference(z, "k3"), token_mean, MASK),
    "entropy token": (entropy, token_mean, MASK),
    "nll token": (lambda z: -logps_of(z), token_mean, MASK),
}


def compute() -> dict[str, dict]:
    """Loss and gradient [B, T, V] of every case."""
    results = {}
    for name, (per_token, reduction, mask) in CASES.items():
        gradient = np.zeros((B, T, V))
        for index in np.ndindex(B, T, V):
            z = STUDENT.astype(complex)
            z[index] += 1j * STEP
            gradient[index] = np.imag(reduction(per_token(z), mask)) / STEP
        loss = np.real(reduction(per_token(STUDENT.astype(complex)), mask))
        results[name] = {"loss": float(loss), "gradient": gradient.tolist()}
    return results


def main() -> None:
    document = {
        "command": "python scripts/make_goldens.py",
        "source": "float64 NumPy, complex-step gradients w.r.t. the student's logits",
        "inputs": "see the constants at the top of scripts/make_goldens.py",
        "cases": compute(),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(document) + "\n")
    print(f"{len(document['cases'])} cases written to {OUTPUT.name}")


if __name__ == "__main__":
    main()
