"""The threshold of HAPO's gate as a function of progress."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxrl_post.injection import should_inject
from jaxrl_post.thresholds import (
    KINDS,
    ThresholdSchedule,
    check_threshold,
    threshold_schedule,
)

PROGRESS = np.linspace(0, 1, 101)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "constant"])
def test_from_start_to_end_exactly_and_monotone(kind):
    schedule = ThresholdSchedule(kind, 0.8, 0.3)
    values = [schedule(float(p)) for p in PROGRESS]
    assert (values[0], values[-1]) == (0.8, 0.3)
    assert (np.diff(values) <= 0).all()
    rising = ThresholdSchedule(kind, 0.3, 0.8)
    np.testing.assert_allclose(
        [rising(p) + v for p, v in zip(PROGRESS, values, strict=True)], 1.1
    )
    assert schedule.highest == rising.highest == 0.8


def test_constant_is_the_number_itself():
    schedule = threshold_schedule(0.8)
    assert {schedule(float(p)) for p in PROGRESS} == {0.8}
    assert schedule.highest == 0.8  # not the end that a constant has none of
    assert threshold_schedule(schedule) is schedule
    assert ThresholdSchedule("constant", 0.2, end=0.9).highest == 0.2


def test_step():
    schedule = ThresholdSchedule("step", 0.9, 0.2, at=0.4)
    assert [schedule(p) for p in (0.0, 0.39, 0.4, 1.0)] == [0.9, 0.9, 0.2, 0.2]


def test_sigmoid_is_the_logistic_curve_between_its_ends():
    schedule = ThresholdSchedule("sigmoid", 0.8, 0.1, at=0.3, steepness=12.0)
    raw = [1 / (1 + math.exp(-12 * (p - 0.3))) for p in PROGRESS]
    share = [(r - raw[0]) / (raw[-1] - raw[0]) for r in raw]
    expected = [0.8 - 0.7 * s for s in share]
    np.testing.assert_allclose([schedule(p) for p in PROGRESS], expected)
    steepest = PROGRESS[np.diff(expected).argmin()]
    assert steepest == pytest.approx(0.3, abs=0.011)


def test_annealed_closes_every_gate_at_the_end():
    schedule = threshold_schedule({"kind": "annealed", "start": 0.8})
    np.testing.assert_allclose([schedule(p) for p in PROGRESS], 0.8 * (1 - PROGRESS))
    failed = np.array([0])
    # Off once gamma <= 1/(N + 2) = 0.1, that is at progress 0.875.
    assert should_inject(failed, 8, threshold=schedule(0.87)).all()
    assert not should_inject(failed, 8, threshold=schedule(0.875)).any()
    assert not should_inject(failed, 8, threshold=schedule(1.0)).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kind": "cosine"}, "threshold.kind='cosine' is not one of constant, sigmoid"),
        ({"kind": "step", "begin": 0.8}, "threshold field='begin' is not one of kind"),
        (1.5, r"threshold.start=1.5 is not in \[0, 1\]"),
        ({"kind": "step", "end": -0.1}, r"threshold.end=-0.1 is not in \[0, 1\]"),
        ({"kind": "step", "at": 2}, r"threshold.at=2 is not in \[0, 1\]"),
        ({"kind": "sigmoid", "steepness": 0}, r"threshold.steepness=0 is not in \(0"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        threshold_schedule(setting)


def test_progress_outside_the_run():
    with pytest.raises(ValueError, match="progress=1.2 is not in"):
        threshold_schedule(0.8)(1.2)


@pytest.mark.parametrize(
    ("threshold", "fewest"), [(0.8, 3), (0.85, 5), (0.9, 8), (0.95, 18)]
)
def test_group_sizes_that_a_threshold_needs(threshold, fewest):
    schedule = threshold_schedule(threshold)
    check_threshold(schedule, fewest)  # exact: 0.8 is 4/5
    with pytest.raises(ValueError, match=rf"threshold={threshold} is above"):
        check_threshold(schedule, fewest - 1)
    check_threshold(schedule, fewest - 1, replace_successes=True)


def test_a_schedule_is_checked_at_its_highest():
    schedule = ThresholdSchedule("step", 0.3, 0.95)
    with pytest.raises(ValueError, match="enlarge the group"):
        check_threshold(schedule, 8)


def test_a_threshold_that_never_injects_is_warned_of():
    with pytest.warns(UserWarning, match="nothing will ever be injected"):
        check_threshold(threshold_schedule(0.1), 8)
    check_threshold(threshold_schedule(0.11), 8)  # a warning would be an error here
    check_threshold(ThresholdSchedule("annealed", 0.8), 8)
