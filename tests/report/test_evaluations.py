"""Base against final."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_post.report import compare_evaluations
from jaxrl_post.report.evaluations import scores_of, split_gain

SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(SHARES, SHARES)
def test_the_parts_of_a_gain_add_up_to_it(base, final):
    split = split_gain(base, final)
    assert sum(split) == pytest.approx(math.prod(final) - math.prod(base), abs=1e-9)


def test_a_gain_with_one_cause_is_all_of_that_cause():
    assert split_gain((0.5, 0.4), (1.0, 0.4)) == pytest.approx((0.2, 0.0))
    assert split_gain((0.5, 0.4), (0.5, 0.8)) == pytest.approx((0.0, 0.2))


def test_row_0_is_the_base_and_the_last_evaluation_is_final():
    rows = [
        {"step": 0, "eval/a/avg@4": 0.1, "eval/b/avg@1": 0.3},
        {"step": 1, "loss": 1.0},
        {"step": 2, "eval/a/avg@4": 0.2},
        {"step": 4, "eval/a/avg@4": 0.4, "eval/a/avg@4/low": 0.3},
        {"step": 5, "loss": 1.0},
    ]
    a, b = compare_evaluations(rows)
    assert (a.block, a.final_step, b.block, b.final_step) == ("a", 4, "b", 0)
    assert a.gain("avg@4") == pytest.approx(0.3)
    assert a.final["avg@4"].low == 0.3 and math.isnan(a.base["avg@4"].low)
    assert b.final == {} and b.gain("avg@1") is None and b.split is None


def test_without_row_0_there_is_no_base():
    (block,) = compare_evaluations([{"step": 5, "eval/a/avg@4": 0.4}])
    assert block.base == {} and block.final["avg@4"].value == 0.4
    assert block.gain("avg@4") is None


def test_unknown_and_missing_scores_are_left_out():
    row = {
        "step": 0,
        "eval/a/avg@4": None,
        "eval/a/parsed": 0.5,
        "eval/a/length": 3.5,
        "eval/a/unjudged": 0.1,
        "loss": 1.0,
    }
    assert set(scores_of(row)["a"]) == {"parsed", "length"}


def test_nothing_parsed_leaves_no_share_among_the_parsed():
    row = {"step": 0, "eval/a/avg@1": 0.0, "eval/a/parsed": 0.0}
    assert "right if parsed" not in scores_of(row)["a"]


def test_scores_are_listed_in_one_order():
    names = ("length", "parsed", "maj@4", "pass@4", "avg@4")
    (block,) = compare_evaluations(
        [{"step": 0, **{f"eval/a/{name}": 0.5 for name in names}}]
    )
    expected = ["avg@4", "pass@4", "maj@4", "parsed", "right if parsed", "length"]
    assert block.names == expected
