"""Charts: what is drawn where."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_page import figures

from jaxrl_post.report import charts
from jaxrl_post.report.axes import HEIGHT, Axis, Steps
from jaxrl_post.report.charts import Line, line_chart, share_bar


def polylines(svg):
    """Points of every unbroken stretch of line."""
    found = re.findall(r'<polyline class="line c\d( faint)?" points="([^"]*)"', svg)
    return [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for _, points in found
    ]


def ticks(svg, anchor):
    pattern = rf'<text class="tick" [^>]*text-anchor="{anchor}">([^<]*)</text>'
    return re.findall(pattern, svg)


def test_points_are_placed_to_scale():
    svg = line_chart("Loss", [Line("loss", [(0, 0.0), (5, 1.0), (10, 0.5)])])
    (low, high, middle) = polylines(svg)[0]
    assert low[0] < high[0] < middle[0] and high[1] < middle[1] < low[1]
    assert high[0] - low[0] == pytest.approx(middle[0] - high[0], abs=0.2)
    assert middle[1] - high[1] == pytest.approx(low[1] - middle[1], abs=0.2)


def test_axes_have_round_labels():
    svg = line_chart("x", [Line("x", [(1, 0.31), (80, 0.744)])])
    assert ticks(svg, "end") == ["0.2", "0.4", "0.6", "0.8"]
    assert ticks(svg, "middle") == ["20", "40", "60", "80"]


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-7, 1e6),
    st.booleans(),
)
def test_axis_ticks_are_distinct_and_few_and_cover_the_values(low, extent, whole):
    high = low + extent
    axis = Axis(low, high, whole=whole)
    assert 1 <= len(axis.ticks) <= 7 or whole
    rounding = 1e-6 * extent
    assert axis.low <= low + rounding and high - rounding <= axis.high
    if extent > 1e-3 * abs(low) and not whole:
        labels = [axis.label(tick) for tick in axis.ticks]
        assert len(set(labels)) == len(labels)


def test_large_numbers_have_one_unit():
    svg = line_chart("x", [Line("x", [(1, 12_000.0), (2, 41_000.0)])])
    assert ticks(svg, "end") == ["10k", "20k", "30k", "40k", "50k"]


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 1.0, 1e9])
def test_a_constant_is_a_level_line_beside_zero(value):
    svg = line_chart("x", [Line("x", [(1, value), (2, value)])])
    (a, b) = polylines(svg)[0]
    assert a[1] == b[1] and 0 < a[1] < HEIGHT
    assert "0" in [tick.rstrip("0").rstrip(".") or "0" for tick in ticks(svg, "end")]
    figure = figures(svg)["x"]
    assert [y for _, y in figure.lines[""]] == pytest.approx([value] * 2, rel=1e-3)


def test_a_gap_breaks_the_line():
    points = [(1, 0.0), (2, 1.0), (3, None), (4, 0.0), (5, 1.0)]
    assert [len(run) for run in polylines(line_chart("x", [Line("x", points)]))] == [
        2,
        2,
    ]


def test_a_single_point_is_a_dot():
    svg = line_chart("x", [Line("x", [(3, 0.5)])])
    assert svg.count("<circle") == 1 and not polylines(svg)


def test_nothing_known_is_no_chart():
    assert line_chart("x", [Line("x", [(1, None)])]) == ""
    assert line_chart("x", []) == ""
    assert share_bar("x", [("a", 0.0, "")]) == ""


def test_the_band_spans_its_ends():
    svg = line_chart("x", [Line("x", [(0, 0.5), (1, 0.5)], [(0, 0, 1), (1, 0.2, 0.8)])])
    points = re.search(r'<polygon class="band c0" points="([^"]*)"', svg)[1]
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 4 and heights[0] < heights[1] < heights[2] < heights[3]


def test_smoothing_keeps_straight_lines_and_gaps():
    points = [(x, 3.0 - 0.5 * x) for x in range(60)]
    points[20] = (20, None)
    smoothed = charts._smooth(points)
    assert smoothed[20] == (20, None)
    for (_, y), (_, expected) in zip(smoothed, points, strict=True):
        assert y == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_smoothing_takes_noise_away():
    points = [(x, float(x % 2)) for x in range(100)]
    assert all(abs(y - 0.5) < 0.2 for _, y in charts._smooth(points))


def test_only_long_lines_are_smoothed():
    def drawn(count, **options):
        points = [(x, math.sin(x)) for x in range(count)]
        return len(polylines(line_chart("x", [Line("x", points)], **options)))

    assert drawn(10) == 1 and drawn(50) == 2 and drawn(50, smooth=False) == 1


def test_thinning_keeps_order_and_extremes():
    points = [(x, math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234, 9.0)
    points[4321] = (4321, -9.0)
    thin = charts._thin(points)
    assert len(thin) <= charts._MOST_POINTS
    assert {9.0, -9.0} <= {y for _, y in thin}
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


def test_the_legend_names_the_last_known_values():
    lines = [Line("a<b", [(1, 0.25), (2, None)]), Line("c", [(1, None), (2, 12345.0)])]
    svg = line_chart("T", lines)
    assert "a&lt;b <b>0.250</b>" in svg and "c <b>12.3k</b>" in svg


def test_shares_are_in_proportion():
    bar = share_bar("Time", [("generate", 30.0, "0:30"), ("update", 90.0, "1:30")])
    assert re.findall(r"width:([\d.]+)%", bar) == ["25.00", "75.00"]
    assert "update <b>1:30</b>" in bar


def test_points_measured_now_and_then_have_dots():
    sparse, dense = [(1, 0.5), (20, 0.6), (40, 0.9)], [(x, x / 4) for x in range(5)]
    figure = figures(line_chart("T", [Line("a", sparse), Line("b", dense)]))["T"]
    assert list(figure.dots) == ["a"]
    assert figure.dots["a"] == [pytest.approx(p, abs=0.1) for p in sparse]


def test_a_chart_reaches_over_the_shared_steps_and_marks_them():
    steps = Steps(span=(1, 101), marks=[(21, "a<b"), (500, "never")])
    svg = line_chart("T", [Line("x", [(50, 1.0), (60, 2.0)])], steps=steps)
    figure = figures(svg)["T"]
    assert ticks(svg, "middle") == ["25", "50", "75", "100"]
    assert figure.lines[""] == [
        pytest.approx((50, 1.0), abs=0.3),
        pytest.approx((60, 2.0), abs=0.3),
    ]
    ((at, name),) = figure.marks
    assert name == "a<b" and at == pytest.approx(20.5, abs=0.2)


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_level_line_is_inside_and_in_the_legend(cap):
    figure = figures(
        line_chart("T", [Line("x", [(1, 1.0), (2, 1.5)])], level=("cap", cap))
    )["T"]
    assert figure.level == pytest.approx(cap, rel=0.01)
    assert figure.legend == {"": "1.500", "cap": f"{cap:.{3 if cap < 10 else 1}f}"}


def test_smoothing_stays_within_the_values():
    points = [(x, float(x < 3)) for x in range(60)]
    assert all(0 <= y <= 1 for _, y in charts._smooth(points))


def test_smoothing_does_not_cross_a_mark():
    points = [(x, 2.0 if x < 31 else 0.5) for x in range(1, 61)]

    def smoothed(steps):
        raw, smooth = polylines(line_chart("T", [Line("x", points)], steps=steps))
        return raw, smooth

    raw, smooth = smoothed(Steps(marks=[(31, "rl")]))
    assert smooth == raw
    raw, smooth = smoothed(Steps())
    assert smooth != raw


def test_a_figure_of_the_legend_in_place_of_the_last_value():
    figure = figures(line_chart("T", [Line("x", [(1, 1.0), (2, 0.0)], figure="5 <%")]))
    assert figure["T"].legend == {"": "5 <%"}
