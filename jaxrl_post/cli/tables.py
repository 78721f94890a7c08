"""Evaluation scores as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxrl_post.report.evaluations import (
    Comparison,
    format_interval,
    format_score,
    in_order,
)
from jaxrl_post.training.statistics import Estimate


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Base, final and gain of every block, and what the gains in accuracy are due to.

    The interval is that of the last evaluation.
    """
    lines = [("", "", "base", "final", "gain", "95 %")]
    notes = []
    for comparison in comparisons:
        base, final = comparison.base, comparison.final
        for index, name in enumerate(comparison.names):
            gain = comparison.gain(name)
            lines.append(
                (
                    "" if index else comparison.block,
                    name,
                    _value(name, base),
                    _value(name, final),
                    "" if gain is None else format_score(name, gain, signed=True),
                    format_interval((final or base).get(name)),
                )
            )
        if split := comparison.split:
            notes.append(
                f"{comparison.block}: of the gain, {split.parsing:+.3f} comes from "
                f"answers that parse, {split.correctness:+.3f} from answers that are "
                "right."
            )
    return "\n".join([_align(lines), *notes])


def score_table(blocks: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The scores of one evaluation, by block and name."""
    lines = [("", "", "", "95 %")]
    for block, scores in blocks.items():
        for index, name in enumerate(in_order(scores)):
            title, interval = "" if index else block, format_interval(scores[name])
            lines.append((title, name, _value(name, scores), interval))
    return _align(lines)


def _value(name: str, scores: Mapping[str, Estimate]) -> str:
    return format_score(name, scores[name].value) if name in scores else ""


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, names to the left, numbers to the right.

    A column that is empty under its head is left out.
    """
    columns = []
    for index, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        align = str.ljust if index < 2 else str.rjust
        if any(column[1:]):
            columns.append([align(cell, width) for cell in column])
    rows = zip(*columns, strict=True)
    return "\n".join("  ".join(row).rstrip() for row in rows)
