"""Line charts as inline SVG: no library, colours from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxrl_post.training.progress import format_count

WIDTH, HEIGHT = 360, 176
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 8, 8, 22
_MOST_POINTS = 240
_SMOOTHED_FROM = 25

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      label: its name in the legend.
      points: ``(x, y)`` by growing x; a y of None is a gap.
      band: ``(x, low, high)`` to shade around it.
    """

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(title: str, lines: Sequence[Line], *, smooth: bool = True) -> str:
    """A titled chart with its legend, which names the last value of each line.

    Args:
      title: what is shown, with its unit; empty for none.
      lines: up to six are told apart by colour.
      smooth: whether a long line is drawn as its moving average, itself faint behind.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y is not None]
    ys += [end for line in lines for _, *ends in line.band for end in ends]
    if not ys:
        return ""
    x_axis, y_axis = _Axis(min(xs), max(xs), whole=True), _Axis(min(ys), max(ys))
    x_place = _scale(x_axis, _LEFT, WIDTH - _RIGHT)
    y_place = _scale(y_axis, HEIGHT - _BOTTOM, _TOP)
    parts = []
    for y in y_axis.ticks:
        at = f"{y_place(y):.1f}"
        parts.append(
            f'<path class="grid" d="M{_LEFT} {at}H{WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">'
            f"{y_axis.label(y)}</text>"
        )
    for x in x_axis.ticks:
        parts.append(
            f'<text class="tick" x="{x_place(x):.1f}" y="{HEIGHT - 6}" '
            f'text-anchor="middle">{x_axis.label(x)}</text>'
        )
    for index, line in enumerate(lines):
        color = f"c{index % 6}"
        if line.band:
            up = [f"{x_place(x):.1f},{y_place(high):.1f}" for x, _, high in line.band]
            down = [f"{x_place(x):.1f},{y_place(low):.1f}" for x, low, _ in line.band]
            outline = " ".join(up + down[::-1])
            parts.append(f'<polygon class="band {color}" points="{outline}"/>')
        averaged = smooth and len(line.points) >= _SMOOTHED_FROM
        for points, faint in (
            (line.points, " faint" if averaged else ""),
            *([(_smooth(line.points), "")] if averaged else []),
        ):
            for run in _runs(_thin(points)):
                places = [(x_place(x), y_place(y)) for x, y in run]
                parts.append(_stroke(places, f"line {color}{faint}"))
    legend = "".join(
        f'<span><i class="c{index % 6}"></i>{html.escape(line.label)} '
        f"<b>{_last(line.points)}</b></span>"
        for index, line in enumerate(lines)
    )
    if len(lines) == 1 and title:
        legend = f"<b>{_last(lines[0].points)}</b>"
    return (
        f"<figure><figcaption>{f'<h3>{html.escape(title)}</h3>' if title else ''}"
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg></figure>'
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


class _Axis:
    """Round numbers that span a range of values."""

    def __init__(self, low: float, high: float, *, whole: bool = False) -> None:
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # the rest is rounding
            margin = 1.0 if whole else abs(low) / 2 or 1.0
            low, high = (low, high + margin) if whole else (low - margin, high + margin)
        raw = (high - low) / 4
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
        if whole:
            step = max(1.0, math.ceil(step))
            first, last = math.ceil(low / step), math.floor(high / step)
            self.low, self.high = low, high
        else:
            first, last = math.floor(low / step), math.ceil(high / step)
            self.low, self.high = first * step, last * step
        self.ticks = [index * step for index in range(first, last + 1)]
        self._step = step

    def label(self, value: float) -> str:
        largest = max(map(abs, self.ticks))
        units = {"G": 1e9, "M": 1e6, "k": 1e3}
        name, unit = next(
            ((name, unit) for name, unit in units.items() if largest >= 10 * unit),
            ("", 1.0),
        )
        step = self._step / unit
        if step < 1e-4:
            return f"{value / unit:.6g}{name}"
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        # A step of 2.5 or 0.25 needs one more place than its size.
        places += round(step * 10**places, 9) % 1 > 0
        return f"{value / unit:.{places}f}{name if value else ''}"


def _scale(axis: _Axis, start: float, end: float) -> Callable[[float], float]:
    def place(value: float) -> float:
        return start + (value - axis.low) / (axis.high - axis.low) * (end - start)

    return place


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


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Straight lines fitted locally, over a tenth of the points on either side.

    Unlike a moving average this neither lags behind a trend nor flattens it at the
    ends. Gaps stay gaps.
    """
    reach = len(points) // 10
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
