"""`jaxrl-post watch`: the numbers of a run, once or live, and how it ends."""

from __future__ import annotations

import io
import sys
import time

import pytest

from jaxrl_post import cli
from jaxrl_post.cli import watch
from jaxrl_post.training.metrics import MetricsWriter


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my run"
    with MetricsWriter(folder) as writer:
        writer.write({"step": 0, "eval/science/avg@4": 0.25})
        for step in range(1, 31):
            row = {"step": step, "reward/mean": step / 30, "time/step": 2.0}
            row |= {"reward/success": 0.0, "information/multiplier": 1.5}
            writer.write(row | ({"eval/science/avg@4": 0.75} if step == 30 else {}))
    config = "recipe: {name: pgpo}\ntraining: {steps: 40}\n"
    (folder / "config.yaml").write_text(config)
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_numbers_of_a_run_once_where_there_is_no_terminal(run_dir, capsys):
    assert cli.main(["watch", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("my run  pgpo\nstep 30 of 40  1:00 in steps, 2.0 s each")
    assert "0:20 left" in out and "science avg@4  0.250 -> 0.750" in out
    assert "! No success" in out
    (reward,) = [line for line in out.splitlines() if line.startswith("  Reward ")]
    assert reward.split()[1] == "1.000" and reward.split()[2].startswith("▁")
    assert reward.endswith("█") and "Step multiplier" in out
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 80


def test_live_it_ends_with_the_run(run_dir, monkeypatch):
    """It is shown again when a step was done, and not when none was."""
    screen, naps = Terminal(), []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            with MetricsWriter(run_dir) as writer:
                writer.write({"step": 31, "reward/mean": 1.0})
        if len(naps) == 4:
            (run_dir / "model").mkdir()
            (run_dir / "model" / "config.json").write_text("{}")

    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert cli.main(["watch", str(run_dir), "--every", "0.5"]) == 0
    shown = screen.getvalue().split("\x1b[H\x1b[2J\x1b[3J")[1:]
    assert len(naps) == 4 and set(naps) == {0.5}
    assert ["step 31 of 40" in text for text in shown] == [False, True, True]


def test_ctrl_c_is_the_way_out(run_dir, monkeypatch, capsys):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(time, "sleep", interrupted)
    assert cli.main(["watch", str(run_dir)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: there is no such run folder"),
        (["."], "not a run folder"),
        ([".", "--every", "0"], "--every=0: must be above 0"),
    ],
)
def test_what_is_no_run_is_one_error(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["watch", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
