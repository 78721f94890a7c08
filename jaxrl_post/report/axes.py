"""Where a chart's values lie: round axes, and the steps that all charts share."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 176
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 22

Place = Callable[[float], float]


class Steps(NamedTuple):
    """What the charts of one run have in common, so that they can be compared.

    Attributes:
      span: steps that every chart reaches at least.
      marks: steps at which something new begins, by growing step, with its name.
    """

    span: Sequence[int] = ()
    marks: Sequence[tuple[int, str]] = ()


class Axis:
    """Round numbers that span a range of values.

    Args:
      low, high: of the values.
      whole: whether ticks are whole numbers, and the axis ends where the values do.
      step: between ticks; a round one for about five of them by default.
    """

    def __init__(
        self,
        low: float,
        high: float,
        *,
        whole: bool = False,
        step: float | None = None,
    ) -> None:
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # the rest is rounding
            if whole or low == high == 0:
                high = low + 1.0
            else:  # a constant is seen best beside zero
                low, high = min(low, 0.0), max(high, 0.0)
        raw = (high - low) / 4
        size = 10.0 ** math.floor(math.log10(raw))
        sizes = (size * m for m in (1, 2, 2.5, 5, 10))
        step = step or next(x for x in sizes if x >= raw * 0.999)
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


def scale(axis: Axis, start: float, end: float) -> Place:
    """Places the axis's values between two positions."""

    def place(value: float) -> float:
        return start + (value - axis.low) / (axis.high - axis.low) * (end - start)

    return place


def y_ticks(axis: Axis, place: Place) -> str:
    """Level lines and their labels, as SVG."""
    return "".join(
        f'<path class="grid" d="M{LEFT} {place(y):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{place(y):.1f}" dy=".32em" '
        f'text-anchor="end">{axis.label(y)}</text>'
        for y in axis.ticks
    )


def x_ticks(axis: Axis, place: Place) -> str:
    """Labels below the drawing, as SVG."""
    return "".join(
        f'<text class="tick" x="{place(x):.1f}" y="{HEIGHT - 6}" '
        f'text-anchor="middle">{axis.label(x)}</text>'
        for x in axis.ticks
    )


def draw_marks(steps: Steps, axis: Axis, place: Place) -> str:
    """Upright lines before the marked steps, with their names, as SVG."""
    parts = []
    for step, name in steps.marks:
        if axis.low < step <= axis.high:
            x = place(step - 0.5)
            before = x > (LEFT + WIDTH) / 2  # the name stays inside
            parts.append(
                f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
                f'<text class="tick" x="{x + (-4 if before else 4):.1f}" '
                f'y="{TOP + 8}" text-anchor="{"end" if before else "start"}">'
                f"{html.escape(name)}</text>"
            )
    return "".join(parts)
