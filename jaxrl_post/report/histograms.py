"""Histograms over the steps, as inline SVG: the darker, the larger the share."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl_post.report.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Steps,
    draw_marks,
    scale,
    x_ticks,
    y_ticks,
)
from jaxrl_post.report.charts import figure_of

_MOST_COLUMNS = 60

Histogram = Mapping[float, float]


class HistogramChart(NamedTuple):
    """Histograms that are yet to be drawn.

    Attributes:
      title, by_step, width, steps: arguments of `histogram_chart`.
    """

    title: str
    by_step: Mapping[int, Histogram]
    width: float
    steps: Steps

    def html(self) -> str:
        """The figure; empty without a value."""
        return histogram_chart(
            self.title, self.by_step, width=self.width, steps=self.steps
        )


def histogram_chart(
    title: str, by_step: Mapping[int, Histogram], *, width: float, steps: Steps
) -> str:
    """A titled map with a column for each step, or for a few adjacent ones.

    Args:
      title: what the bins are of.
      by_step: for each step that has a histogram, the share of each bin by its low end.
      width: of the bins.
      steps: that the chart shares with others.
    """
    lows = sorted({low for histogram in by_step.values() for low in histogram})
    if not lows:
        return ""
    columns = _merge(by_step)
    ends = [*by_step, *steps.span]
    x_axis = Axis(min(ends) - 0.5, max(ends) + 0.5, whole=True)
    y_axis = Axis(lows[0], lows[-1] + width, step=2 * width)
    x_place = scale(x_axis, LEFT, WIDTH - RIGHT)
    y_place = scale(y_axis, HEIGHT - BOTTOM, TOP)
    shares = [x for histogram in columns.values() for x in histogram.values()]
    most = max(shares) or 1.0
    cells = []
    for (first, last), histogram in columns.items():
        x, right = x_place(first - 0.5), x_place(last + 0.5)
        when = f"step {first}" if first == last else f"steps {first}–{last}"
        for low, share in sorted(histogram.items()):
            if not share > 0:
                continue
            top, bottom = y_place(low + width), y_place(low)
            what = f"{when}, {low:.2g}–{low + width:.2g}: {share:.1%}"
            cells.append(
                f'<rect class="cell" x="{x:.1f}" y="{top:.1f}" '
                f'width="{right - x:.1f}" height="{bottom - top:.1f}" '
                f'fill-opacity="{share / most:.2f}"><title>{html.escape(what)}</title>'
                "</rect>"
            )
    legend = f'<span>0 <i class="ramp"></i><b>{most:.0%}</b></span>'
    axes = y_ticks(y_axis, y_place) + x_ticks(x_axis, x_place)
    marks = draw_marks(steps, x_axis, x_place)
    return figure_of(title, legend, axes + "".join(cells) + marks)


def _merge(by_step: Mapping[int, Histogram]) -> dict[tuple[int, int], Histogram]:
    """The mean histograms of as many adjacent steps as it takes for few columns.

    >>> _merge({1: {0.0: 1.0}, 2: {0.0: 0.5, 0.5: 0.5}})
    {(1, 1): {0.0: 1.0}, (2, 2): {0.0: 0.5, 0.5: 0.5}}
    """
    first, last = min(by_step), max(by_step)
    size = math.ceil((last - first + 1) / _MOST_COLUMNS)
    parts: dict[int, list[int]] = {}
    for step in sorted(by_step):
        parts.setdefault((step - first) // size, []).append(step)
    merged: dict[tuple[int, int], Histogram] = {}
    for part in parts.values():
        lows = sorted({low for step in part for low in by_step[step]})
        merged[part[0], part[-1]] = {
            low: sum(by_step[step].get(low, 0.0) for step in part) / len(part)
            for low in lows
        }
    return merged
