"""The base beside the trained model: scores, gains, and where the gain comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxrl_post.training.statistics import Estimate

_SCORE = re.compile(r"(avg|pass|maj)@\w+")


class GainSplit(NamedTuple):
    """A gain in accuracy as the sum of its two causes.

    Attributes:
      parsing: from more answers that can be read.
      correctness: from more right ones among those that can.
    """

    parsing: float
    correctness: float


class Comparison(NamedTuple):
    """One evaluation block of a run, before and after.

    Attributes:
      block: its name.
      final_step: the step of its last evaluation; 0 where only the base has one.
      base: estimates by the name of the score, ``avg@16`` for example.
      final: the same after `final_step`; empty where only the base was evaluated.
    """

    block: str
    final_step: int
    base: Mapping[str, Estimate]
    final: Mapping[str, Estimate]

    @property
    def names(self) -> list[str]:
        """Names of the scores, accuracy first."""
        return in_order({**self.base, **self.final})

    def gain(self, name: str) -> float | None:
        """Final minus base, or None where one of the two is missing."""
        if name not in self.base or name not in self.final:
            return None
        return self.final[name].value - self.base[name].value

    @property
    def split(self) -> GainSplit | None:
        """The gain in avg@k, split; None where the parse rate is unknown."""
        key = "right if parsed"
        if not (key in self.base and key in self.final):
            return None
        return split_gain(
            (self.base["parsed"].value, self.base[key].value),
            (self.final["parsed"].value, self.final[key].value),
        )


def split_gain(base: tuple[float, float], final: tuple[float, float]) -> GainSplit:
    """Splits the gain of a product ``parse rate * right among the parsed``.

    Each factor's change counts at the other's mean, so the parts add up exactly.

    Args:
      base: parse rate, and right answers' share among the parsed.
      final: the same afterwards.

    >>> split_gain((0.5, 0.4), (1.0, 0.6))
    GainSplit(parsing=0.25, correctness=0.15)
    """
    (parsed, right), (parsed_final, right_final) = base, final
    return GainSplit(
        parsing=round((parsed_final - parsed) * (right + right_final) / 2, 12),
        correctness=round((right_final - right) * (parsed + parsed_final) / 2, 12),
    )


def compare_evaluations(rows: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """The evaluations of a run's rows: row 0 holds the base's, the last is final.

    Args:
      rows: of ``metrics.jsonl``, with keys ``eval/<block>/<score>`` and, for its
        interval, ``.../low`` and ``.../high``.

    Returns:
      One comparison per block, in the order in which blocks first appear.
    """
    by_block: dict[str, list[tuple[int, Mapping[str, Estimate]]]] = {}
    for row in rows:
        for block, scores in scores_of(row).items():
            by_block.setdefault(block, []).append((row["step"], scores))
    comparisons = []
    for block, evaluations in by_block.items():
        base = dict(evaluations[:1]).get(0, {})
        step, final = evaluations[-1]
        comparisons.append(Comparison(block, step, base, final if step else {}))
    return comparisons


def scores_of(row: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """The scores of one row by block and name; ends of unknown intervals are NaN.

    >>> scores = scores_of(
    ...     {"step": 0, "eval/gsm8k/avg@4": 0.3, "eval/gsm8k/parsed": 0.6}
    ... )
    >>> {name: estimate.value for name, estimate in scores["gsm8k"].items()}
    {'avg@4': 0.3, 'parsed': 0.6, 'right if parsed': 0.5}
    """
    blocks: dict[str, dict[str, Estimate]] = {}
    for key, value in row.items():
        prefix, _, rest = key.partition("/")
        block, _, name = rest.partition("/")
        known = name in ("parsed", "length") or _SCORE.fullmatch(name)
        if prefix == "eval" and known and value is not None:
            ends = (row.get(f"{key}/{end}") for end in ("low", "high"))
            low, high = (float("nan") if x is None else x for x in ends)
            blocks.setdefault(block, {})[name] = Estimate(value, low, high)
    for scores in blocks.values():
        accuracy = next((scores[n] for n in scores if n.startswith("avg@")), None)
        if accuracy and "parsed" in scores and scores["parsed"].value > 0:
            right = accuracy.value / scores["parsed"].value
            unknown = float("nan")
            scores["right if parsed"] = Estimate(right, unknown, unknown)
    return blocks


def in_order(names: Iterable[str]) -> list[str]:
    """Names of scores as they are listed: accuracy first, length last."""
    order = ("avg", "pass", "maj", "parsed", "right if parsed", "length")
    return sorted(names, key=lambda name: order.index(name.partition("@")[0]))


def format_score(name: str, value: float, *, signed: bool = False) -> str:
    """A score as shown in tables: shares to three places, lengths to one."""
    places = 1 if name == "length" else 3
    return f"{value:{'+' if signed else ''}.{places}f}"


def format_interval(estimate: Estimate | None) -> str:
    """``0.28–0.35``, or nothing where the interval is unknown."""
    if estimate is None or estimate.low != estimate.low:
        return ""
    return f"{estimate.low:.2f}–{estimate.high:.2f}"
