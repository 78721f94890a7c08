"""A run's numbers as text for a terminal: the charts of the page as sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxrl_post.report.alerts import alerts
from jaxrl_post.report.charts import Chart, format_value
from jaxrl_post.report.evaluations import compare_evaluations, format_score
from jaxrl_post.report.panels import FURTHER, sections
from jaxrl_post.report.run import Run
from jaxrl_post.training.progress import format_seconds

_BARS = "▁▂▃▄▅▆▇█"


def summary(run: Run, width: int = 80, *, color: bool = False) -> str:
    """What the page shows, a line for each line of its charts.

    Args:
      run: as far as it has come.
      width: characters of a line at most; 40 at least.
      color: whether headings and alerts stand out by ANSI codes.
    """
    width = max(width, 40)
    bold, warn, plain = ("\x1b[1m", "\x1b[33m", "\x1b[0m") if color else ("", "", "")
    recipe = ", then ".join(dict.fromkeys(map(str, run.settings("recipe.name"))))
    title = run.path.resolve().name + (f"  {recipe}" if recipe != "None" else "")
    lines = [f"{bold}{_cut(title, width)}{plain}", _cut(_progress(run), width)]
    for alert in alerts(run):
        lines.append(f"{warn}{_cut(f'! {alert.name}: {alert.words}', width)}{plain}")
    if scores := _scores(run):
        lines += ["", f"{bold}Evaluation{plain}", *(_cut(x, width) for x in scores)]
    for name, drawn in sections(run).items():
        if name == FURTHER:
            continue
        if rows := [row for x in drawn.drawables for row in _rows(x, width)]:
            lines += ["", f"{bold}{_cut(name, width)}{plain}", *rows]
    return "\n".join(lines)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Values between their lowest and highest as bars, means where they are many.

    >>> sparkline([0, 1, 2, 3, None, 7], 10)
    '▁▂▃▄ █'
    >>> sparkline([0, 2, 7, 7], 2)
    '▁█'
    """
    count = min(len(values), width)
    cells: list[float | None] = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        known = [x for x in part if x is not None and math.isfinite(x)]
        cells.append(sum(known) / len(known) if known else None)
    seen = [x for x in cells if x is not None]
    low, high = min(seen, default=0.0), max(seen, default=0.0)
    size = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(" " if x is None else _BARS[round((x - low) / size)] for x in cells)


def _progress(run: Run) -> str:
    parts = [steps for steps in run.settings("training.steps") if steps]
    total = sum(parts)
    seconds = [y for _, y in run.series("time/step") if y is not None]
    words = [f"step {run.last_step}" + (f" of {total}" if total else "")]
    if seconds:
        recent = seconds[-20:]
        each = sum(recent) / len(recent)
        words.append(f"{format_seconds(sum(seconds))} in steps, {each:.1f} s each")
        if left := max(0, total - run.last_step):
            words.append(f"{format_seconds(each * left)} left")
    return "  ".join(words)


def _scores(run: Run) -> list[str]:
    lines = []
    for found in compare_evaluations(run.rows):
        name = found.names[0] if found.names else ""
        ends = [s[name].value for s in (found.base, found.final) if name in s]
        if ends:
            words = " -> ".join(format_score(name, x) for x in ends)
            lines.append(f"  {found.block} {name}  {words}")
    return lines


def _rows(chart: object, width: int) -> list[str]:
    """A line for each of a chart's; histograms have none."""
    if not isinstance(chart, Chart):
        return []
    names = width * 45 // 100
    rows = []
    for line in chart.lines:
        values = [y for _, y in line.points]
        known = [y for y in values if y is not None]
        if not known:
            continue
        several = len(chart.lines) > 1
        name = f"{chart.title}: {line.label}" if several else chart.title
        figure = line.figure or format_value(known[-1])
        bars = sparkline(values, width - names - 14)
        rows.append(f"  {_cut(name, names):{names}} {figure:>9}  {bars}")
    return rows


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
