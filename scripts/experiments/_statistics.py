"""What seeds say: Student's t, intervals of a mean and of a new seed, the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MARGIN = 0.01
"""The smallest difference in accuracy that counts: one point of the papers' tables."""


class Interval(NamedTuple):
    """A mean over seeds with an interval around it; NaN ends from a single seed.

    >>> print(Interval(0.125, 0.1, 0.15, 10))
    +.125 (+.100 to +.150)
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        mean, low, high = (f"{x:+.3f}".replace("0.", ".", 1) for x in self[:3])
        return mean if self.seeds < 2 else f"{mean} ({low} to {high})"


def t_probability(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t, from its finite series for whole degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.

    >>> round(t_probability(2.262157, 9), 6)
    0.975
    """
    if freedom < 1:
        raise ValueError(f"freedom is {freedom}; Student's t has at least 1.")
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for j in range(odd, freedom - 1, 2):
        total += term
        term *= (j + 1) / (j + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    within = (angle + total) * 2 / math.pi if odd else total
    return (1 + within) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """Where `t_probability` is `probability`, in (1/2, 1), by bisection.

    >>> round(t_quantile(0.995, 9), 4)
    3.2498
    """
    if not 0.5 < probability < 1:
        raise ValueError(f"probability is {probability}; it lies in (1/2, 1).")
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        below = t_probability(middle, freedom) < probability
        low, high = (middle, high) if below else (low, middle)
    return high


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Where the mean over seeds lies. Of paired differences it is the paired t-test.

    >>> print(mean_interval([0.1, 0.2, 0.3]))
    +.200 (-.048 to +.448)
    """
    return _interval(values, level, new=0.0)


def prediction_interval(values: Sequence[float], level: float = 0.99) -> Interval:
    """Where one new seed falls, for values from a normal distribution.

    >>> print(prediction_interval([0.1, 0.2, 0.3], level=0.95))
    +.200 (-.297 to +.697)
    """
    return _interval(values, level, new=1.0)


def _interval(values: Sequence[float], level: float, new: float) -> Interval:
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = t_quantile((1 + level) / 2, count - 1) * math.sqrt(
        variance * (new + 1 / count)
    )
    return Interval(mean, mean - half, mean + half, count)


def verdict(interval: Interval, margin: float = MARGIN) -> str:
    """Whether "greater than 0" holds, by a 95 % interval alone.

    It holds where the whole interval lies above 0; it does not where the interval lies
    below `margin`, so that a difference worth having is excluded; else it is unclear.

    >>> verdict(Interval(0.02, 0.001, 0.04, 10)), verdict(Interval(0.0, -0.01, 0.01, 9))
    ('holds', 'unclear')
    >>> verdict(Interval(0.0, -0.009, 0.009, 10))
    'does not'
    """
    if interval.low > 0:
        return "holds"
    return "does not" if interval.high < margin else "unclear"
