"""The bar on a terminal and the lines elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys

from jaxrl_post.training.progress import Progress

ROW = {
    "reward/mean": 0.25,
    "length/mean": 31.0,
    "throughput/generated_tokens_per_second": 18_200.0,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_line_per_step_with_the_time_left():
    stream, now = io.StringIO(), iter(range(0, 1000, 30))
    with Progress(10, 4, stream=stream, clock=lambda: next(now)) as progress:
        progress.update(5, ROW)
        progress.update(6, ROW | {"reward/mean": None})
        progress.update(10, {})
    assert stream.getvalue().splitlines() == [
        "step  5/10  reward 0.250  length 31.0  18.2k tokens/s  2:30 left",
        "step  6/10  length 31.0  18.2k tokens/s  2:00 left",
        "step 10/10",
    ]


def test_time_left_follows_the_recent_steps():
    seconds = [0.0]
    stream = io.StringIO()
    progress = Progress(100, stream=stream, clock=lambda: seconds[0])
    for step in range(1, 61):
        seconds[0] += 100.0 if step <= 30 else 1.0
        progress.update(step, {})
    assert stream.getvalue().splitlines()[-1] == "step  60/100  0:40 left"


def test_the_evaluation_of_the_base_is_no_step():
    stream = io.StringIO()
    row = {"eval/science/avg@16": 0.31, "eval/science/avg@16/low": 0.2, "eval/t/x": 1}
    Progress(10, stream=stream).update(0, row)
    assert stream.getvalue() == "evaluation after step 0: science avg@16 0.310\n"


def test_messages_are_lines():
    stream = io.StringIO()
    Progress(10, stream=stream).message("saved [a] checkpoint")
    assert stream.getvalue() == "saved [a] checkpoint\n"


def test_a_terminal_gets_a_bar_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        progress.update(0, {"eval/science/avg@1": 0.125})
        progress.message("note [not markup]")
        progress.update(3, ROW)
    text = stream.getvalue()
    assert "3/10" in text and "reward 0.250" in text and "18.2k tokens/s" in text
    assert "science avg@1 0.125" in text and "note [not markup]" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_without_a_terminal_rich_is_not_imported():
    code = (
        "import io, sys; from jaxrl_post.training.progress import Progress\n"
        "Progress(3, stream=io.StringIO()).update(1, {})\n"
        "assert not {'rich', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
