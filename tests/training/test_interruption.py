"""Signals: saved and gone within the grace time, or at once when asked twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import assert_same_run

from jaxrl_post import training
from jaxrl_post.training import interruption
from jaxrl_post.training.checkpoints import Checkpoints
from jaxrl_post.training.evaluation import Evaluator
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.rollout import Collector

PROGRAM = """
import os, signal, time
from jaxrl_post.training.interruption import StepGivenUp, signals
with signals(grace_seconds={grace}) as noted, noted.step():
    {do}
"""


def run_program(do, grace):
    code = PROGRAM.format(do=do.replace("\n", "\n    "), grace=grace)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_when_the_grace_time_is_over_the_process_is_too():
    done = run_program(
        "signal.raise_signal(signal.SIGTERM)\n"
        "while True:\n"
        "    try: time.sleep(600)\n"
        "    except StepGivenUp: print('given up', flush=True)",
        grace=0.4,
    )
    assert done.returncode == 143
    assert done.stdout == "given up\n"
    assert "run.grace_seconds=0.4 are over" in done.stderr


def test_a_second_ctrl_c_leaves_at_once():
    done = run_program(
        "signal.raise_signal(signal.SIGINT)\n"
        "print('noted', noted.received, flush=True)\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "print('still here')",
        grace=600,
    )
    assert done.stdout == "noted 2\n"
    assert done.returncode == -signal.SIGINT  # which a shell calls 130


@pytest.mark.parametrize("ahead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_step_that_takes_too_long_is_given_up_and_the_one_before_saved(
    tiny_config, tmp_path, monkeypatch, ahead
):
    """One step off policy it is given up before its updates, in the next rollout."""
    options = {
        "recipe": {"truncated_importance": 2.0},
        "training": {"steps": 3, "group_size": 2, "steps_off_policy": ahead},
        "evaluation": {},
    }
    whole = tiny_config(run={"dir": str(tmp_path / "whole")}, **options)
    cut = tiny_config(run={"dir": str(tmp_path / "cut"), "grace_seconds": 1}, **options)
    training.run(whole)

    collect = Collector.collect

    def hang(self, params, key, moment, *meanwhile):
        if moment.step == 3:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(600)
        return collect(self, params, key, moment, *meanwhile)

    with monkeypatch.context() as patch:
        patch.setattr(interruption.Signals, "_leave", lambda self: None)
        patch.setattr(Collector, "collect", hang)
        with pytest.raises(training.Interrupted) as stop:
            training.run(cut)
    assert stop.value.signum == signal.SIGTERM
    last = 2 - ahead
    rows = read_metrics(tmp_path / "cut")
    assert [row["step"] for row in rows] == [*range(last + 1)]
    checkpoints = Checkpoints(tmp_path / "cut", read_only=True)
    assert checkpoints.latest() == last
    checkpoints.close()
    training.run(cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "name, seconds",
    # The last one is in time; then the base's evaluation is not begun.
    [("__call__", 600), ("__init__", 600), ("__init__", 0)],
)
def test_a_run_that_has_no_step_yet_is_given_up_too(
    tiny_config, tmp_path, monkeypatch, name, seconds
):
    options = {"training": {"steps": 1, "group_size": 2}}
    whole = tiny_config(run={"dir": str(tmp_path / "whole")}, **options)
    cut = tiny_config(run={"dir": str(tmp_path / "cut"), "grace_seconds": 1}, **options)
    training.run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(interruption.Signals, "_leave", lambda self: None)
        own = getattr(Evaluator, name)

        def delayed(*arguments, **options):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(seconds)
            return own(*arguments, **options)

        patch.setattr(Evaluator, name, delayed)
        with pytest.raises(training.Interrupted) as stop:
            training.run(cut)
    assert stop.value.signum == signal.SIGTERM
    assert not [*(tmp_path / "cut" / "checkpoints").glob("[0-9]*")]
    training.run(cut)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_notice_of_preemption_ends_the_run_like_sigterm(tiny_config, monkeypatch):
    monkeypatch.setattr(Checkpoints, "preempted", lambda self, step: step == 1)
    config = tiny_config(training={"steps": 3, "group_size": 2}, evaluation={})
    with pytest.raises(training.Interrupted) as stop:
        training.run(config)
    assert stop.value.signum == signal.SIGTERM
    checkpoints = Checkpoints(config.run.dir, read_only=True)
    assert checkpoints.latest() == 1
    assert checkpoints.preempted(1)
    checkpoints.close()


def test_without_a_notice_there_is_no_preemption(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.preempted(1)
    checkpoints.close()
