"""A page that compares runs: those that differ in their seed alone are one line."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jaxrl_post.errors import InputError
from jaxrl_post.report.axes import Steps
from jaxrl_post.report.charts import Chart, Line
from jaxrl_post.report.evaluations import format_score, in_order, scores_of
from jaxrl_post.report.page import write_page
from jaxrl_post.report.panels import FURTHER, SECTIONS, Drawn
from jaxrl_post.report.pictures import write_pictures
from jaxrl_post.report.run import Run, read_run
from jaxrl_post.training.configfile import flat_keys

Group = Sequence[Run]

_NOT_COMPARED = ("run.", "tracking.")
"""Sections that change nothing that is measured, but for the seed."""


def build_comparison(
    run_dirs: Sequence[str | Path], path: str | Path, *, pictures: bool = False
) -> Path:
    """Writes a page with a line for each group of runs, and where several seeds ran,
    the mean over them in a band from the lowest to the highest.

    Args:
      run_dirs: the runs' folders; two at least.
      path: of the page.
      pictures: whether every chart is written as PNG too, beside the page.

    Raises:
      InputError: a folder is missing or no run, one is named twice, or there is only
        one.
    """
    places = [Path(run_dir).resolve() for run_dir in run_dirs]
    if len(set(places)) < max(2, len(places)):
        raise InputError("A comparison needs two runs or more, each named once.")
    groups = group_runs([read_run(run_dir) for run_dir in run_dirs])
    charts = compare_sections(groups)
    path = Path(path)
    parts = [
        "<header><h1>Comparison</h1><p>Lines are means over seeds, bands reach from "
        "the lowest run to the highest.</p></header>",
        _runs_table(groups),
        _scores_table(groups),
        *(
            f'<section><h2>{title}</h2><div class="grid">{"".join(drawn.charts)}'
            "</div></section>"
            for title, drawn in charts.items()
            if title != FURTHER
        ),
    ]
    if further := charts.get(FURTHER):
        body = f'<div class="grid">{"".join(further.charts)}</div>'
        parts.append(f"<details><summary>{FURTHER}</summary>{body}</details>")
    write_page(path, "Comparison", parts)
    if pictures:
        write_pictures(charts, path.with_suffix(""))
    return path


def group_runs(runs: Sequence[Run]) -> dict[str, Group]:
    """Runs of equal config but for folder and seed, by what tells the groups apart.

    The name is the settings that differ between the groups, or the runs' own names
    where none does (or no config is left).
    """
    settings = [_settings(run) for run in runs]
    by_config: dict[str, list[int]] = {}
    for index, own in enumerate(settings):
        by_config.setdefault(json.dumps(own, sort_keys=True), []).append(index)
    groups = list(by_config.values())
    firsts = [settings[group[0]] for group in groups]
    keys = sorted({key for own in firsts for key in own})
    differ = [k for k in keys if len({repr(own.get(k)) for own in firsts}) > 1]
    named: dict[str, Group] = {}
    for group, own in zip(groups, firsts, strict=True):
        shown = [f"{k.rpartition('.')[2]}={own.get(k)}" for k in differ[:4]]
        name = " ".join(shown) or runs[group[0]].path.resolve().name
        if name in named:  # more keys differ than are shown
            name = runs[group[0]].path.resolve().name
        named[name] = [runs[i] for i in group]
    return named


def compare_sections(groups: dict[str, Group]) -> dict[str, Drawn]:
    """The sections of a run's page, each metric a chart with a line for each group."""
    runs = [run for group in groups.values() for run in group]
    keys = {key for run in runs for key in run.keys()} - {"step", "stage"}
    left = sorted(k for k in keys if "/low" not in k and "/high" not in k)
    last = max((run.last_step for run in runs), default=0)
    steps = Steps(span=(1, last) if last else ())
    found: dict[str, Drawn] = {}

    def add(title: str, name: str, key: str) -> None:
        lines = [Line(label, *_mean(group, key)) for label, group in groups.items()]
        lines = [line for line in lines if line.points]
        # As often as a metric stands on a page, its title says which one it is.
        chart = Chart(name, lines, steps, smooth=not key.startswith("eval/"))
        found.setdefault(title, Drawn([], [], [])).add(chart)

    for key in [k for k in left if k.startswith("eval/")]:
        add("Evaluation", key.removeprefix("eval/"), key)
        left.remove(key)
    for section in SECTIONS:
        if section.together:  # the same metrics stand in other sections
            continue
        for panel in section.panels:
            matching = [k for p in panel.patterns for k in left if fnmatchcase(k, p)]
            for key in dict.fromkeys(matching):
                several = len(set(matching)) > 1
                add(section.title, key if several else panel.title, key)
                left.remove(key)
    for key in left:
        add(FURTHER, key, key)
    return {title: drawn for title, drawn in found.items() if drawn.charts}


def _mean(
    group: Group, key: str
) -> tuple[list[tuple[float, float | None]], list[tuple[float, float, float]]]:
    """Mean and range over the runs of every step that all of the group's runs that have
    the metric have made."""
    series = [dict(run.series(key)) for run in group]
    series = [own for own in series if own]
    shared = sorted(set.intersection(*map(set, series))) if series else []
    points: list[tuple[float, float | None]] = []
    band: list[tuple[float, float, float]] = []
    for step in shared:
        values = [own[step] for own in series]
        known = [y for y in values if y is not None and math.isfinite(y)]
        whole = len(known) == len(values)
        points.append((step, statistics.mean(known) if whole else None))
        if whole and len(known) > 1:
            band.append((step, min(known), max(known)))
    return points, band


def _runs_table(groups: dict[str, Group]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{len(group)}</td>"
        f"<td>{_seeds(group)}</td><td>{_steps(group)}</td></tr>"
        for name, group in groups.items()
    )
    return _table(("Settings", "Runs", "Seeds", "Steps"), rows)


def _scores_table(groups: dict[str, Group]) -> str:
    """The last evaluations: means over seeds, and the lowest and highest run."""
    final: dict[tuple[str, str], dict[str, list[float]]] = {}
    for label, group in groups.items():
        for run in group:
            evaluated = [blocks for row in run.rows if (blocks := scores_of(row))]
            for block, scores in (evaluated[-1] if evaluated else {}).items():
                for name, score in scores.items():
                    by_group = final.setdefault((block, name), {})
                    by_group.setdefault(label, []).append(score.value)
    if not final:
        return ""
    rows = ""
    for block in dict.fromkeys(block for block, _ in final):
        for name in in_order([n for b, n in final if b == block]):
            cells = "".join(
                f"<td>{_cell(name, final[block, name].get(label, []))}</td>"
                for label in groups
            )
            rows += f"<tr><th>{html.escape(f'{block} {name}')}</th>{cells}</tr>"
    table = _table(("Last evaluation", *groups), rows)
    return f"<section><h2>Scores</h2>{table}</section>"


def _cell(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    words = format_score(name, statistics.mean(values))
    if len(values) == 1:
        return words
    ends = (format_score(name, x) for x in (min(values), max(values)))
    return f"{words}<small> {'–'.join(ends)}</small>"


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return (
        f'<div class="scroll"><table class="compared"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _seeds(group: Group) -> str:
    return html.escape(", ".join(str(run.setting("run.seed")) for run in group))


def _steps(group: Group) -> str:
    return ", ".join(str(n) for n in sorted({run.last_step for run in group}))


def _settings(run: Run) -> dict[str, Any]:
    flat = flat_keys(run.config)
    return {k: v for k, v in flat.items() if not k.startswith(_NOT_COMPARED)}
