"""What an evaluation says about a model: avg@k, pass@k, maj@k and how sure they are.

Each of the three gives one value per question; `over_questions` turns values into a
mean with its interval. Questions are the independent unit: sixteen answers to one
question are not sixteen observations.

None (or NaN) marks what could not be judged. It is left out, never counted as wrong;
a question of which nothing could be judged has the value NaN and takes no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean with the ends of its confidence interval, all NaN without data."""

    value: float
    low: float
    high: float


def avg_at_k(successes: npt.ArrayLike) -> Array:
    """Share of right answers of each question: the accuracy of one sample.

    Args:
      successes: ``[P, k]``, true or 1 for a right answer, false or 0 for a wrong one,
        None or NaN for one that could not be judged.

    Returns:
      ``[P]``, the mean over the judged answers of each question.

    >>> avg_at_k([[1, 0, 0, 1], [1, None, None, 1]])
    array([0.5, 1. ])
    """
    values, judged = _judged(successes)
    return _ratio(np.where(judged, values, 0).sum(1), judged.sum(1))


def pass_at_k(n: npt.ArrayLike, c: npt.ArrayLike, k: npt.ArrayLike) -> Array:
    """Probability that at least one of k answers is right, estimated from n answers.

    ``1 - C(n-c, k) / C(n, k)``, computed as ``1 - prod_{i=n-c+1..n} (1 - k/i)``, which
    neither overflows nor cancels. Unbiased, unlike ``1 - (1 - c/n)^k``.

    Args:
      n: answers sampled, any shape.
      c: right ones among them, broadcast against `n`.
      k: answers that one may try, at most `n`.

    Raises:
      ValueError: unless ``0 <= c <= n`` and ``1 <= k <= n``.

    Source: Chen et al. 2021 (arXiv 2107.03374), Eq. 1.

    >>> pass_at_k(5, [0, 1, 5], 2).round(3)
    array([0. , 0.4, 1. ])
    """
    n, c, k = np.broadcast_arrays(*(np.asarray(x, dtype=np.int64) for x in (n, c, k)))
    if np.any((c < 0) | (c > n)) or np.any((k < 1) | (k > n)):
        raise ValueError(
            "pass_at_k needs 0 <= c <= n and 1 <= k <= n; got "
            f"n={n.tolist()}, c={c.tolist()}, k={k.tolist()}."
        )
    i = np.arange(1, n.max(initial=1) + 1)
    n, c, k = n[..., None], c[..., None], k[..., None]
    # With fewer than k wrong answers i = k makes the product 0; the maximum keeps the
    # factors before it from overflowing.
    factors = np.where((i > n - c) & (i <= n), np.maximum(1 - k / i, 0), 1.0)
    return 1.0 - factors.prod(-1)


def maj_at_k(
    answers: Sequence[Sequence[Hashable | None]], correct: npt.ArrayLike
) -> Array:
    """Whether the answer given most often is right, per question.

    Every answer has one vote, except those that could not be extracted (None) or
    judged. Among answers tied for the most votes one is drawn at random: the value is
    the expectation, the share of right ones among the tied. Without a vote it is 0 if
    an answer was judged (nothing could be extracted), else NaN.

    Args:
      answers: ``[P][k]``, the extracted answers, compared by equality.
      correct: ``[P, k]``, as the successes of `avg_at_k`. Where equal answers were
        judged differently, the answer counts by its share of right ones.

    Returns:
      ``[P]``.

    Source: Wang et al. 2022 (arXiv 2203.11171), the unweighted vote.

    >>> maj_at_k(
    ...     [["7", "8", "7", None], ["1", "2", None, None]],
    ...     [[1, 0, 1, 0], [1, 0, 0, 0]],
    ... )
    array([1. , 0.5])
    """
    values, judged = _judged(correct)
    shape = (len(answers), *{len(row) for row in answers})
    if answers and shape != values.shape:
        raise ValueError(
            f"maj_at_k needs answers and correct of one shape; got {shape} and "
            f"{values.shape}."
        )
    result = np.full(len(answers), np.nan)
    for question, row in enumerate(answers):
        votes: dict[Hashable, list[float]] = defaultdict(list)
        for sample, answer in enumerate(row):
            if answer is not None and judged[question, sample]:
                votes[answer].append(values[question, sample])
        if votes:
            most = max(map(len, votes.values()))
            tied = [np.mean(v) for v in votes.values() if len(v) == most]
            result[question] = np.mean(tied)
        elif judged[question].any():
            result[question] = 0.0
    return result


def wilson_interval(
    proportion: float, count: float, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Score interval of a proportion seen in `count` independent trials.

    Unlike ``p +- z sqrt(p (1-p) / n)`` it stays within 0 and 1 and has a width when
    nothing, or everything, succeeded.

    Source: Wilson 1927, JASA 22, 209.

    >>> low, high = wilson_interval(0.0, 10)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.278)
    """
    if not (0 <= proportion <= 1 and count > 0 and 0 < confidence < 1):
        raise ValueError(
            "wilson_interval needs a proportion from 0 to 1, a positive count and a "
            f"confidence between 0 and 1; got {proportion}, {count} and {confidence}."
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = proportion + z**2 / (2 * count)
    spread = z * np.sqrt(proportion * (1 - proportion) / count + (z / count / 2) ** 2)
    scale = 1 + z**2 / count
    low, high = (center - spread) / scale, (center + spread) / scale
    # At the edges rounding may leave the end that is exactly the proportion beside it.
    return float(min(max(low, 0.0), proportion)), float(max(min(high, 1.0), proportion))


def over_questions(
    values: npt.ArrayLike, *, samples: int = 1, confidence: float = 0.95
) -> Estimate:
    """Mean over questions, with an interval for the mean over all such questions.

    The interval is Wilson's at the effective number of trials ``p (1-p) / s^2``, with
    ``s`` the standard error of the mean between questions: answers to one question
    count as the cluster that they are. The effective number is at most the number of
    answers, and is the number of questions where every question scores 0, or 1.

    Args:
      values: ``[P]``, one value from 0 to 1 per question; NaN takes no part.
      samples: answers behind each value.
      confidence: probability that the interval holds the true mean.

    Source: errors between clusters as in Miller 2024 (arXiv 2411.00640); the effective
    sample size as in Korn and Graubard 1998, Survey Methodology 24.

    >>> estimate = over_questions([0.0, 0.25, 0.5, 1.0], samples=4)
    >>> [round(x, 3) for x in estimate]
    [0.438, 0.143, 0.784]
    """
    scores = np.asarray(values, dtype=np.float64)
    scores = scores[~np.isnan(scores)]
    if not scores.size:
        return Estimate(np.nan, np.nan, np.nan)
    mean, trials = float(scores.mean()), float(scores.size)
    if scores.size > 1 and 0 < mean < 1:
        squared_error = float(scores.var(ddof=1)) / scores.size
        at_most = scores.size * samples
        trials = min(mean * (1 - mean) / max(squared_error, 1e-12), at_most)
    return Estimate(mean, *wilson_interval(mean, trials, confidence=confidence))


def evaluation_metrics(
    successes: npt.ArrayLike,
    answers: Sequence[Sequence[Hashable | None]] | None = None,
    *,
    confidence: float = 0.95,
) -> dict[str, float]:
    """The metrics of one evaluation block, named for the k that was sampled.

    Args:
      successes: ``[P, k]``, as in `avg_at_k`.
      answers: ``[P][k]``, as in `maj_at_k`; without them there is no maj@k.
      confidence: of the intervals.

    Returns:
      ``avg@k``, for k > 1 also ``pass@k`` and ``maj@k``, each with ``/low`` and
      ``/high`` beside it, and ``unjudged``, the share of answers left out. Where some
      answers of a question were not judged, its pass@k is that of the judged ones.

    >>> metrics = evaluation_metrics([[1, 0], [0, 0]], [["a", "b"], ["c", "c"]])
    >>> {name: metrics[name] for name in ("avg@2", "pass@2", "maj@2", "unjudged")}
    {'avg@2': 0.25, 'pass@2': 0.5, 'maj@2': 0.25, 'unjudged': 0.0}
    """
    values, judged = _judged(successes)
    k, n = values.shape[1], judged.sum(1)
    share = avg_at_k(values)
    scores = {f"avg@{k}": over_questions(share, samples=k, confidence=confidence)}
    if k > 1:
        passed = np.full(len(values), np.nan)
        right = np.where(judged, values, 0).sum(1)
        some = n > 0
        passed[some] = pass_at_k(n[some], right[some], n[some])
        scores[f"pass@{k}"] = over_questions(passed, confidence=confidence)
        if answers is not None:
            voted = maj_at_k(answers, values)
            scores[f"maj@{k}"] = over_questions(voted, confidence=confidence)
    metrics: dict[str, float] = {}
    for name, (value, low, high) in scores.items():
        metrics |= {name: value, f"{name}/low": low, f"{name}/high": high}
    return metrics | {"unjudged": 1 - float(judged.mean()) if judged.size else np.nan}


def _judged(successes: Any) -> tuple[Array, npt.NDArray[np.bool_]]:
    values = np.asarray(successes, dtype=np.float64)  # None becomes NaN
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(
            "successes need the shape [questions, samples], with at least one sample; "
            f"got {values.shape}."
        )
    judged = ~np.isnan(values)
    if not np.isin(values[judged], (0, 1)).all():
        raise ValueError("successes must be 0, 1 or None (not judged).")
    return values, judged


def _ratio(total: npt.ArrayLike, count: npt.ArrayLike) -> Array:
    count = np.asarray(count)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
