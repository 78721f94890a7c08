"""Each alert is raised by a run that deserves it, and by no healthy one."""

from __future__ import annotations

import random

import pytest

from jaxrl_post import report
from jaxrl_post.training.metrics import MetricsWriter

STEPS = 40


def raised(run_dir, **changes):
    """Names of the alerts of a healthy run but for `changes`: metric -> f(step)."""
    rng = random.Random(0)
    healthy = {
        "reward/mean": lambda step: step / STEPS + rng.gauss(0, 0.05),
        "reward/success": lambda step: step / STEPS,
        "reward/zero_std_groups": lambda step: 0.3,
        "length/mean": lambda step: 20 + step / 10,
        "length/truncated": lambda step: 0.05,
        "entropy": lambda step: 1 - step / 80,
        "information/capped": lambda step: 0.2,
        "teacher/accuracy": lambda step: 0.9,
        "teacher/student_accuracy": lambda step: 0.5,
        "update/skipped": lambda step: 0.0,
    }
    renamed = {name.replace("__", "/"): f for name, f in changes.items()}
    assert renamed.keys() <= healthy.keys()
    with MetricsWriter(run_dir) as writer:
        for step in range(1, STEPS + 1):
            row = {name: f(step) for name, f in {**healthy, **renamed}.items()}
            writer.write({"step": step, **row})
    return [alert.name for alert in report.alerts(report.read_run(run_dir))]


def test_a_healthy_run_raises_none(tmp_path):
    assert raised(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("Flat rewards", "reward__mean", lambda step: 0.5 + 0.1 * (step % 2)),
        ("Flat rewards", "reward__mean", lambda step: -step / STEPS),
        ("No success", "reward__success", lambda step: 0.0),
        ("Steps without variance", "reward__zero_std_groups", lambda step: step < 21),
        ("Truncation", "length__truncated", lambda step: 0.5 * (step > 35)),
        ("Entropy collapse", "entropy", lambda step: 0.8**step),
        ("Length explosion", "length__mean", lambda step: 5.0 * step),
        ("Capped multiplier", "information__capped", lambda step: 0.6),
        ("Teacher worse than student", "teacher__accuracy", lambda step: 0.4),
        ("Skipped updates", "update__skipped", lambda step: float(step == 7)),
    ],
)
def test_each_alert_is_raised_alone(tmp_path, name, metric, value):
    assert raised(tmp_path, **{metric: lambda step: float(value(step))}) == [name]


def test_alerts_stand_on_the_page(tmp_path):
    raised(tmp_path, reward__success=lambda step: 0.0)
    page = report.build(tmp_path).read_text()
    assert "<b>No success.</b> No completion was right in 40 steps" in page


def test_too_few_steps_raise_none(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "reward/mean": 0.0, "reward/zero_std_groups": 1.0})
    assert report.alerts(report.read_run(tmp_path)) == []
