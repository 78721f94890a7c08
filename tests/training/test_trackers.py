"""Trackers get the rows; one that fails, or is not there, costs its own rows alone."""

from __future__ import annotations

import importlib.util

import pytest

from jaxrl_post import training
from jaxrl_post.errors import InputError
from jaxrl_post.training import trackers
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.trackers import Trackers, check_trackers

ROW = {"step": 3, "reward/mean": 0.5, "loss": float("nan"), "note": "x", "entropy": 2}


class Listed:
    """Keeps what it gets; fails at the steps in `fails`."""

    fails: tuple[int, ...] = ()

    def __init__(self):
        self.rows, self.closed = [], False

    def log(self, step, values):
        if step in self.fails:
            raise OSError("the dashboard\nis gone")
        self.rows.append((step, values))

    def close(self):
        self.closed = True


def opened(config, tmp_path, tracker, warnings):
    make = lambda name, config, run_dir, step: tracker  # noqa: E731
    return Trackers(config, tmp_path, 0, warnings.append, make=make)


def test_finite_numbers_are_handed_on(tiny_config, tmp_path):
    tracker, warnings = Listed(), []
    config = tiny_config(tracking={"to": ["trackio"]})
    with opened(config, tmp_path, tracker, warnings) as both:
        both.log(ROW)
    assert tracker.rows == [(3, {"reward/mean": 0.5, "entropy": 2.0})]
    assert tracker.closed and not warnings


def test_names_are_trls_by_a_switch(tiny_config, tmp_path):
    tracker = Listed()
    config = tiny_config(tracking={"to": ["trackio"], "names": "trl"})
    with opened(config, tmp_path, tracker, []) as both:
        both.log(ROW)
    assert tracker.rows == [(3, {"reward": 0.5, "entropy": 2.0})]


def test_one_that_fails_is_left_out_with_one_warning(tiny_config, tmp_path):
    tracker, warnings = Listed(), []
    tracker.fails = (2,)
    config = tiny_config(tracking={"to": ["tensorboard"]})
    with opened(config, tmp_path, tracker, warnings) as both:
        for step in (1, 2, 3):
            both.log({**ROW, "step": step})
    assert [step for step, _ in tracker.rows] == [1]
    assert warnings == [
        "warning: tracking: tensorboard failed and gets no more rows: OSError: the "
        "dashboard is gone"
    ]


def test_one_that_cannot_be_opened_warns_too(tiny_config, tmp_path):
    def broken(*args):
        raise RuntimeError("no database")

    config, warnings = tiny_config(tracking={"to": ["trackio"]}), []
    with Trackers(config, tmp_path, 0, warnings.append, make=broken) as both:
        both.log(ROW)
    assert len(warnings) == 1 and "no database" in warnings[0]


def test_a_missing_package_is_one_error_before_anything(tiny_config, monkeypatch):
    config = tiny_config(tracking={"to": ["trackio"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackio.*jaxrl_post\[tracking\]"):
        training.run(config)
    assert not (config.run.dir and list(_folder(config).glob("*")))


def test_the_list_is_short_for_the_section(tiny_config):
    tree = tiny_config().to_dict() | {"tracking": ["tensorboard"]}
    assert training.Config.from_dict(tree).tracking.to == ("tensorboard",)
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        training.Config.from_dict(tree | {"tracking": ["tensorbord"]})


def test_a_run_goes_on_without_its_tracker(tiny_config, monkeypatch, capsys):
    """And is the same as without one."""
    tracker = Listed()
    tracker.fails = (1,)
    monkeypatch.setattr(trackers, "check_trackers", lambda section: None)
    monkeypatch.setattr("jaxrl_post.training.loop.check_trackers", lambda x: None)
    monkeypatch.setattr(trackers, "_make", lambda *args: tracker)
    config = tiny_config(
        tracking={"to": ["trackio"]}, training={"steps": 2}, evaluation={}
    )
    result = training.run(config)
    assert [row["step"] for row in read_metrics(result.dir)] == [0, 1, 2]
    assert capsys.readouterr().err.count("warning: tracking") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None, reason="no tensorboardX"
)
def test_tensorboard_writes_event_files(tiny_config, tmp_path):
    config = tiny_config(tracking={"to": ["tensorboard"]})
    check_trackers(config.tracking)
    with Trackers(config, tmp_path, 0, pytest.fail) as both:
        both.log(ROW)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"reward/mean" in events.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="no trackio")
@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_the_rows(tiny_config, tmp_path, monkeypatch):
    import sqlite3

    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    config = tiny_config(tracking={"to": ["trackio"], "project": "tests"})
    with Trackers(config, tmp_path / "run", 0, pytest.fail) as both:
        both.log(ROW)
    (database,) = (tmp_path / "trackio").glob("tests*.db")
    with sqlite3.connect(database) as connection:
        (found,) = connection.execute("select step, metrics from metrics").fetchall()
    assert found[0] == 3 and "reward/mean" in str(found[1])


def _folder(config):
    from pathlib import Path

    return Path(config.run.dir)
