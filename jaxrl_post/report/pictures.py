"""The charts of a page as PNG files, for slides and papers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_post.report.charts import Chart
from jaxrl_post.report.panels import Drawable, Drawn

COLORS = ("#2f6fde", "#d9730d", "#2a8f5b", "#8a4fd3", "#c23b6b", "#7a7a80")
"""Those of the page in the light."""


def write_pictures(sections: Mapping[str, Drawn], folder: Path) -> list[Path]:
    """One PNG for each chart, 1080 x 630 pixels, named after section and title.

    Args:
      sections: of `panels.sections`.
      folder: made if absent; pictures that it holds are replaced.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        for title, drawn in sections.items():
            for drawable in drawn.drawables:
                path = folder / f"{_slug(f'{title} {drawable.title}')}.png"
                figure(drawable).savefig(path, dpi=180)
                paths.append(path)
    return paths


def figure(drawable: Drawable) -> Any:
    """A chart or a histogram over steps as a matplotlib figure, 6 x 3.5 inches."""
    # Not pyplot: it would keep every figure, and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(drawable.title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.25)
    if isinstance(drawable, Chart):
        _lines(axes, drawable)
    else:
        _cells(axes, drawable)
    return figure


def _lines(axes: Any, chart: Chart) -> None:
    for index, line in enumerate(chart.lines):
        color = COLORS[index % len(COLORS)]
        xs = [x for x, _ in line.points]
        ys = [float("nan") if y is None else y for _, y in line.points]
        marker = "." if len(xs) < 25 else ""
        axes.plot(xs, ys, color=color, marker=marker, lw=1.4, label=line.label)
        if line.band:
            axes.fill_between(*zip(*line.band, strict=True), color=color, alpha=0.15)
    if chart.level:
        axes.axhline(chart.level[1], color="gray", ls="--", label=chart.level[0])
    for step, _ in chart.steps.marks:
        axes.axvline(step - 0.5, color="gray", ls=":", lw=1)
    if len(chart.lines) > 1 or chart.level:
        axes.legend(fontsize=8, frameon=False)


def _cells(axes: Any, chart: Any) -> None:
    for step, histogram in chart.by_step.items():
        for low, share in histogram.items():
            axes.bar(
                step, chart.width, bottom=low, width=1.0, color=COLORS[0], alpha=share
            )


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
