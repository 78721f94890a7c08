"""How a run shows itself while it runs: a live bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

_RECENT_STEPS = 20


class Progress:
    """Reward, length, speed and time left of a run, step by step.

    On a terminal a bar that redraws itself; elsewhere one line per step. Use it as a
    context manager, so that the terminal is left as it was found.

    Args:
      total_steps: steps of the whole run.
      start_step: steps done before; the time left is judged by the others alone.
      stream: where to write.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS + 1)
        self._times.append((start_step, clock()))
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = _live_bar(self._stream)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows a finished step.

        Args:
          step: its number, counted from 1; 0 for the evaluation of the base.
          row: its metrics, as in ``metrics.jsonl``.
        """
        if step > self._times[-1][0]:
            self._times.append((step, self._clock()))
        if self._bar:
            left = self._time_left(step)
            text = describe(row) + (f"  {left} left" if left else "")
            self._bar.update(self._task, completed=step, description=text)
        elif step:
            width = len(str(self._total))
            parts = [f"step {step:{width}d}/{self._total}", describe(row)]
            if left := self._time_left(step):
                parts.append(f"{left} left")
            self._print("  ".join(filter(None, parts)))
        if scores := _evaluation(row):
            self._print(f"evaluation after step {step}: {scores}")

    def message(self, text: str) -> None:
        """Writes a line of its own, above the bar."""
        self._print(text)

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _time_left(self, step: int) -> str:
        (first, start), (last, now) = self._times[0], self._times[-1]
        if last == first or step >= self._total:
            return ""
        return format_seconds((now - start) / (last - first) * (self._total - step))


def describe(row: Mapping[str, Any]) -> str:
    """The few numbers of a row that one watches.

    >>> describe({"reward/mean": 0.5, "length/mean": 23.25, "time/judge": 1.0})
    'reward 0.500  length 23.2'

    A step without rollouts has its loss:

    >>> describe({"loss": 0.25, "throughput/trained_tokens_per_second": 18_200.0})
    'loss 0.250  18.2k tokens/s'
    """
    samples = "reward/mean" in row
    parts = [("loss", lambda x: f"loss {x:.3f}")]
    if samples:
        parts = [
            ("reward/mean", lambda x: f"reward {x:.3f}"),
            ("length/mean", lambda x: f"length {x:.1f}"),
        ]
    speed = f"throughput/{'generated' if samples else 'trained'}_tokens_per_second"
    parts.append((speed, lambda x: f"{format_count(x)} tokens/s"))
    return "  ".join(form(row[key]) for key, form in parts if row.get(key) is not None)


def format_count(value: float) -> str:
    """A count in at most four signs and a unit.

    >>> [format_count(x) for x in (7.26, 912, 18_240, 2_500_000)]
    ['7.3', '912', '18.2k', '2.5M']
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def format_seconds(seconds: float) -> str:
    """A duration as minutes and seconds, or with hours.

    >>> format_seconds(75), format_seconds(3 * 3600 + 5 * 60 + 2)
    ('1:15', '3:05:02')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}"


def _evaluation(row: Mapping[str, Any]) -> str:
    scores = []
    for key, value in row.items():
        prefix, _, rest = key.partition("/")
        block, _, name = rest.partition("/")
        if prefix == "eval" and name.startswith("avg@") and "/" not in name:
            scores.append(f"{block} {name} {value:.3f}" if value is not None else block)
    return ", ".join(scores)


def _live_bar(stream: TextIO) -> Any:
    # rich costs a tenth of a second, which a run without a terminal can keep.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
        TextColumn("{task.description}", markup=False),
        console=Console(file=stream),
    )
