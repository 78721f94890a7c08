"""Histograms over the steps: which cell is how dark, and where."""

from __future__ import annotations

import re

import pytest
from report_page import figures

from jaxrl_post.report.axes import Steps
from jaxrl_post.report.histograms import histogram_chart


def chart(by_step, **options):
    return histogram_chart(
        "T", by_step, width=0.1, steps=Steps(**{"span": (), **options})
    )


def test_each_share_is_a_cell_of_its_darkness():
    figure = figures(chart({1: {0.1: 0.25, 0.9: 0.75}, 2: {0.1: 0.5, 0.9: 0.5}}))["T"]
    assert figure.cells == {
        "step 1, 0.1–0.2: 25.0%": pytest.approx(1 / 3, abs=0.01),
        "step 1, 0.9–1: 75.0%": 1.0,
        "step 2, 0.1–0.2: 50.0%": pytest.approx(2 / 3, abs=0.01),
        "step 2, 0.9–1: 50.0%": pytest.approx(2 / 3, abs=0.01),
    }
    assert figure.legend == {"": "75%"}


def test_cells_lie_at_their_steps_and_bins():
    svg = chart({3: {0.0: 0.5, 0.9: 0.5}, 4: {0.0: 1.0}}, span=(1, 4))
    cells = [
        dict(re.findall(r' (x|y|width|height)="([\d.]+)"', cell))
        for cell in re.findall(r'<rect class="cell"[^>]*>', svg)
    ]
    low, high, later = ({k: float(v) for k, v in c.items()} for c in cells)
    assert high["y"] < low["y"] == later["y"] and low["x"] == high["x"]
    assert later["x"] == pytest.approx(low["x"] + low["width"], abs=0.2)
    # Two of the four steps that the chart spans have a column, the last two.
    assert low["x"] == pytest.approx((54 + 352) / 2, abs=0.2)
    # Ten bins from the bottom of the drawing to its top, upwards.
    assert low["height"] == pytest.approx((154 - 8) / 10, abs=0.2)
    assert high["y"] == pytest.approx(8, abs=0.2)
    assert low["y"] + low["height"] == pytest.approx(154, abs=0.2)


def test_empty_bins_are_no_cells_and_no_histogram_is_no_chart():
    assert list(figures(chart({1: {0.0: 0.0, 0.5: 1.0}}))["T"].cells) == [
        "step 1, 0.5–0.6: 100.0%"
    ]
    assert chart({}) == "" == chart({1: {}})


def test_many_steps_share_columns_that_hold_their_means():
    by_step = {step: {0.0: step % 2, 0.5: 1 - step % 2} for step in range(1, 241)}
    cells = figures(chart(by_step))["T"].cells
    assert len(cells) == 2 * 60
    assert cells["steps 1–4, 0–0.1: 50.0%"] == 1.0  # the largest share


def test_stages_are_marked():
    ((at, name),) = figures(
        chart({x: {0.0: 1.0, 0.9: 0.0} for x in range(1, 21)}, marks=[(11, "rl")])
    )["T"].marks
    assert name == "rl" and at == pytest.approx(10.5, abs=0.1)
