"""Line charts as inline SVG: no library, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from jaxrl_post.training.progress import format_count

_MOST_POINTS = 240
_SMOOTHED_FROM = 25
_NO_STEPS = Steps()

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      label: its name in the legend.
      points: ``(x, y)`` by growing x; a y of None is a gap.
      band: ``(x, low, high)`` to shade around it.
      figure: what the legend says of it; its last value where that is None.
    """

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    figure: str | None = None


class Chart(NamedTuple):
    """A line chart that is yet to be drawn: as SVG here, as PNG in `pictures`.

    Attributes:
      title, lines, steps, level, smooth: arguments of `line_chart`.
    """

    title: str
    lines: Sequence[Line]
    steps: Steps = Steps()
    level: tuple[str, float] | None = None
    smooth: bool = True

    def html(self) -> str:
        """The figure; empty without a value."""
        return line_chart(
            self.title,
            self.lines,
            smooth=self.smooth,
            steps=self.steps,
            level=self.level,
        )


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    smooth: bool = True,
    steps: Steps = _NO_STEPS,
    level: tuple[str, float] | None = None,
) -> str:
    """A titled chart with its legend, which names the last value of each line.

    Args:
      title: what is shown, with its unit; empty for none.
      lines: up to six are told apart by colour.
      smooth: whether a long line is drawn as its moving average, itself faint behind.
      steps: that the chart shares with others.
      level: name and value of a dashed level line.
    """
    ys = [y for line in lines for _, y in line.points if y is not None]
    ys += [end for line in lines for _, *ends in line.band for end in ends]
    if not ys:
        return ""
    ys += [level[1]] if level else []
    xs = [*(x for line in lines for x, _ in line.points), *steps.span]
    x_axis, y_axis = Axis(min(xs), max(xs), whole=True), Axis(min(ys), max(ys))
    x_place = scale(x_axis, LEFT, WIDTH - RIGHT)
    y_place = scale(y_axis, HEIGHT - BOTTOM, TOP)
    parts = [y_ticks(y_axis, y_place), x_ticks(x_axis, x_place)]
    parts.append(draw_marks(steps, x_axis, x_place))
    if level:
        at = f"{y_place(level[1]):.1f}"
        parts.append(f'<path class="level" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
    for index, line in enumerate(lines):
        color = f"c{index % 6}"
        if line.band:
            up = [f"{x_place(x):.1f},{y_place(high):.1f}" for x, _, high in line.band]
            down = [f"{x_place(x):.1f},{y_place(low):.1f}" for x, low, _ in line.band]
            outline = " ".join(up + down[::-1])
            parts.append(f'<polygon class="band {color}" points="{outline}"/>')
        averaged = smooth and len(line.points) >= _SMOOTHED_FROM
        smoothed = [p for part in _parts(line.points, steps) for p in _smooth(part)]
        for points, faint in (
            (line.points, " faint" if averaged else ""),
            *([(smoothed, "")] if averaged else []),
        ):
            for run in _runs(_thin(points)):
                places = [(x_place(x), y_place(y)) for x, y in run]
                parts.append(_stroke(places, f"line {color}{faint}"))
        if not averaged and _is_sparse(line.points):
            known = [(x_place(x), y_place(y)) for x, y in line.points if y is not None]
            parts += [_stroke([place], f"line {color}") for place in known]
    figures = [line.figure or _last(line.points) for line in lines]
    legend = "".join(
        f'<span><i class="c{index % 6}"></i>{html.escape(line.label)} '
        f"<b>{html.escape(figure)}</b></span>"
        for index, (line, figure) in enumerate(zip(lines, figures, strict=True))
    )
    if len(lines) == 1 and title:
        legend = f"<span><b>{html.escape(figures[0])}</b></span>"
    if level:
        legend += (
            f'<span><i class="dash"></i>{html.escape(level[0])} '
            f"<b>{format_value(level[1])}</b></span>"
        )
    return figure_of(title, legend, "".join(parts))


def figure_of(title: str, legend: str, drawing: str) -> str:
    """A chart's title, legend and drawing, the last two in HTML and SVG."""
    return (
        f"<figure><figcaption>{f'<h3>{html.escape(title)}</h3>' if title else ''}"
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{drawing}</svg></figure>'
    )


def share_bar(title: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """A bar divided in proportion.

    Args:
      title: what the whole is.
      parts: label, size and the size in words, of each.
    """
    total = sum(size for _, size, _ in parts)
    if not total > 0:
        return ""
    segments, legend = [], []
    for index, (label, size, words) in enumerate(parts):
        color = f"c{index % 6}"
        segments.append(
            f'<i class="{color}" style="width:{100 * size / total:.2f}%"></i>'
        )
        legend.append(
            f'<span><i class="{color}"></i>{html.escape(label)} '
            f"<b>{html.escape(words)}</b></span>"
        )
    return (
        f"<figure><figcaption><h3>{html.escape(title)}</h3></figcaption>"
        f'<div class="share">{"".join(segments)}</div>'
        f'<div class="legend below">{"".join(legend)}</div></figure>'
    )


def _is_sparse(points: Sequence[Point]) -> bool:
    """Whether a line was measured now and then, so that its points are worth a dot."""
    return len(points) > 1 and points[-1][0] - points[0][0] >= 2 * (len(points) - 1)


def _stroke(places: Sequence[tuple[float, float]], style: str) -> str:
    if len(places) == 1:
        (x, y), dot = places[0], style.replace("line", "dot")
        return f'<circle class="{dot}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{style}" points="{path}"/>'


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The points between the gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _parts(points: Sequence[Point], steps: Steps) -> list[Sequence[Point]]:
    """The points between the marks."""
    starts = [-math.inf, *(step for step, _ in steps.marks)]
    ends = [*starts[1:], math.inf]
    return [
        [(x, y) for x, y in points if start <= x < end]
        for start, end in zip(starts, ends, strict=True)
    ]


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Straight lines fitted locally, over a tenth of the points on either side.

    Unlike a moving average this neither lags behind a trend nor flattens it at the
    ends. Gaps stay gaps.
    """
    reach = len(points) // 10
    known = [y for _, y in points if y is not None] or [0.0]
    lowest, highest = min(known), max(known)
    smoothed: list[Point] = []
    for center, (x, y) in enumerate(points):
        if y is not None:
            w0 = w1 = w2 = wy = wxy = 0.0
            start = max(center - reach, 0)
            for index in range(start, min(center + reach + 1, len(points))):
                near, offset = points[index][1], index - center
                if near is not None:
                    weight = reach + 1.0 - abs(offset)
                    w0, w1 = w0 + weight, w1 + weight * offset
                    w2 += weight * offset**2
                    wy, wxy = wy + weight * near, wxy + weight * offset * near
            spread = w0 * w2 - w1**2
            y = (w2 * wy - w1 * wxy) / spread if spread > 0 else wy / w0
            y = min(max(y, lowest), highest)  # a share stays one
        smoothed.append((x, y))
    return smoothed


def _thin(points: Sequence[Point]) -> list[Point]:
    """Fewer points with the same outline: the lowest and highest of each bucket."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        known = [(y, i) for i, (_, y) in enumerate(bucket) if y is not None]
        indices = {min(known)[1], max(known)[1]} if known else {0}
        kept += [bucket[index] for index in sorted(indices)]
    return kept


def _last(points: Sequence[Point]) -> str:
    value = next((y for _, y in reversed(points) if y is not None), None)
    return "–" if value is None else format_value(value)


def format_value(value: float) -> str:
    """A value in about three significant places.

    >>> [format_value(x) for x in (0.61234, 23.25, 48_210.0, 3e-06, 0.0)]
    ['0.612', '23.2', '48.2k', '3.0e-06', '0']
    """
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return format_count(value)
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
