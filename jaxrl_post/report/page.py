"""The page itself: ``report.html``, one file without links to anything outside."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_post.report import panels
from jaxrl_post.report.alerts import alerts
from jaxrl_post.report.evaluations import (
    Comparison,
    compare_evaluations,
    format_interval,
    format_score,
)
from jaxrl_post.report.panels import FURTHER, SECTIONS, Drawn, Section
from jaxrl_post.report.pictures import write_pictures
from jaxrl_post.report.run import Run, is_of_teacher, read_run
from jaxrl_post.report.tokens import LEGEND, colored
from jaxrl_post.training.metrics import replace_text
from jaxrl_post.training.progress import format_seconds
from jaxrl_post.training.statistics import Estimate

SAMPLES_PER_STEP = 6

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def build(run_dir: str | Path, *, pictures: bool = False) -> Path:
    """Writes a run's ``report.html``: curves, evaluations and sampled completions.

    It shows what there is: a run may be unfinished, or not have made its first step.

    Args:
      run_dir: the run's folder.
      pictures: whether every chart is written as PNG too, into the folder ``report``.

    Returns:
      The page's path. The file needs neither network nor other files.

    Raises:
      InputError: where the folder is missing, or is no run.
    """
    run = read_run(run_dir)
    # "." has no name of its own.
    name = html.escape(run.path.resolve().name)
    parts = [_header(run, name), _alerts(run), _evaluations(run)]
    charts = panels.sections(run)
    parts += [_section(section, charts.get(section.title)) for section in SECTIONS]
    parts.append(_samples(run))
    if further := charts.get(FURTHER):
        body = f'<div class="grid">{"".join(further.charts)}</div>'
        parts.append(f"<details><summary>{FURTHER}</summary>{body}</details>")
    if run.config_text:
        text = html.escape(run.config_text)
        parts.append(f"<details><summary>Config</summary><pre>{text}</pre></details>")
    path = run.path / "report.html"
    write_page(path, name, parts)
    if pictures:
        write_pictures(charts, run.path / "report")
    return path


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Writes a page with the style of all pages; title and parts are HTML."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "\n".join(filter(None, parts))
    replace_text(path, _PAGE.format(title=title, style=style, body=body))


def _header(run: Run, name: str) -> str:
    recipe, task, model = (
        html.escape(_in_turn(run.settings(key), ", then "))
        for key in ("recipe.name", "task.name", "model.path")
    )
    lead = " ".join(
        filter(
            None,
            (recipe, task and f"on {task},", model and f"starting from {model}"),
        )
    )
    items = "".join(
        f"<div><dt>{label}</dt><dd>{html.escape(str(value))}</dd></div>"
        for label, value in {**_facts(run), **_demonstrations(run)}.items()
        if value not in (None, "")
    )
    lead = f"<p>{lead}</p>" if lead else ""
    empty = "" if run.rows else "<p>No step has been finished yet.</p>"
    facts_list = f"<dl>{items}</dl>" if items else ""
    return f"<header><h1>{name}</h1>{lead}</header>{facts_list}{empty}"


def _facts(run: Run) -> dict[str, Any]:
    parts = [steps for steps in run.settings("training.steps") if steps]
    times = [y for p in panels.PHASES for _, y in run.series(f"time/{p}") if y]
    # A run that only imitates makes steps and samples nothing.
    samples = run.last_step == 0 or "time/generate" in run.keys()
    prompts, groups, temperatures = (
        run.settings(key)
        for key in (
            "training.prompts_per_step",
            "training.group_size",
            "sampling.temperature",
        )
    )
    batches = [
        f"{p} prompts" + (f" × {g}" if samples and g else "") if p else None
        for p, g in zip(prompts, groups, strict=True)
    ]
    # No line ends between a stage and its steps.
    stages = [f"{name}\N{NO-BREAK SPACE}{a}–{b}" for name, (a, b) in run.stages.items()]
    return {
        "Steps": f"{run.last_step} of {sum(parts)}" if parts else run.last_step,
        "Stages": ", ".join(stages),
        "Time": format_seconds(sum(times)) if times else None,
        "Batch": _in_turn(batches),
        "Learning rate": _in_turn(run.settings("optimizer.learning_rate")),
        "Temperature": _in_turn(temperatures) if samples else None,
        "Seed": run.setting("run.seed"),
    }


def _demonstrations(run: Run) -> dict[str, str]:
    """What became of the data set's demonstrations when it was loaded."""
    shares = {label: run.series(key) for key, label in panels.DEMONSTRATIONS.items()}
    known = {k: [y for _, y in s if y is not None] for k, s in shares.items()}
    return {k: f"{ys[-1]:.1%}" for k, ys in known.items() if ys}


def _in_turn(values: list[Any], then: str = ", ") -> str:
    """Values of the stages in words, neighbours' equal ones once.

    >>> _in_turn([0.1, 0.1, None, 0.01])
    '0.1, 0.01'
    """
    known = [str(value) for value in values if value is not None]
    return then.join(value for value, _ in itertools.groupby(known))


def _evaluations(run: Run) -> str:
    comparisons = compare_evaluations(run.rows)
    if not comparisons:
        return ""
    cards = "".join(_comparison(run, comparison) for comparison in comparisons)
    return (
        f"<section><h2>Evaluation</h2>{cards}"
        '<p class="note">avg@k: accuracy of one answer. pass@k: at least one of k is '
        "right. maj@k: the most frequent answer is right. Small figures are 95 % "
        "intervals over questions.</p></section>"
    )


def _comparison(run: Run, comparison: Comparison) -> str:
    """The scores of a block as a table, their curves beside it."""
    final = f"Step {comparison.final_step}"
    columns = {"Base": comparison.base, final: comparison.final}
    columns = {head: scores for head, scores in columns.items() if scores}
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        f"{''.join(_score(name, scores) for scores in columns.values())}"
        f"{_gain(name, comparison.gain(name)) if len(columns) > 1 else ''}</tr>"
        for name in comparison.names
    )
    heads = "".join(f"<th>{head}</th>" for head in columns)
    heads += "<th>Gain</th>" if len(columns) > 1 else ""
    note = ""
    if split := comparison.split:
        note = (
            f'<p class="note">Of the gain, {split.parsing:+.3f} comes from answers '
            f"that parse, {split.correctness:+.3f} from answers that are right.</p>"
        )
    chart = panels.evaluation_chart(run, comparison.block) if comparison.final else ""
    return (
        f'<article><div class="scroll"><table class="scores"><thead><tr>'
        f"<th>{html.escape(comparison.block)}</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{note}</div>{chart}</article>"
    )


def _score(name: str, scores: Mapping[str, Estimate]) -> str:
    if name not in scores:
        return "<td></td>"
    interval = format_interval(scores[name])
    small = f"<small>{interval}</small>" if interval else ""
    return f"<td>{format_score(name, scores[name].value)}{small}</td>"


def _gain(name: str, gain: float | None) -> str:
    # A longer answer is neither better nor worse.
    tone = "" if not gain or name == "length" else "good" if gain > 0 else "bad"
    words = "" if gain is None else format_score(name, gain, signed=True)
    return f'<td class="{tone}">{words}</td>'


def _section(section: Section, drawn: Drawn | None) -> str:
    if drawn is None:
        return ""
    style = "grid together" if section.together else "grid"
    notes = "".join(f'<p class="note">{note}</p>' for note in drawn.notes)
    return (
        f"<section><h2>{section.title}</h2>"
        f'<div class="{style}">{"".join(drawn.charts)}</div>{notes}</section>'
    )


def _alerts(run: Run) -> str:
    items = "".join(
        f"<li><b>{html.escape(alert.name)}.</b> {html.escape(alert.words)}</li>"
        for alert in alerts(run)
    )
    return f'<ul class="alerts">{items}</ul>' if items else ""


def _samples(run: Run) -> str:
    if not run.completion_files:
        return ""
    first, last = min(run.completion_files), max(run.completion_files)
    shown = {f"Step {s}": run.completions(s, SAMPLES_PER_STEP) for s in (first, last)}
    best, worst = run.extremes(last, SAMPLES_PER_STEP // 2)
    shown |= {f"Best of step {last}": best, f"Worst of step {last}": worst}
    asked = any("teacher_logps" in row for rows in shown.values() for row in rows)
    tables = "".join(_table(title, rows) for title, rows in shown.items() if rows)
    legend = LEGEND if asked else ""
    return f"<section><h2>Completions</h2>{legend}{tables}</section>"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        f'<h3>{title}</h3><div class="scroll"><table class="samples"><thead>'
        "<tr><th>Prompt</th><th>Response</th><th>Judgement</th></tr></thead>"
        f"<tbody>{''.join(map(_sample, rows))}</tbody></table></div>"
    )


def _sample(row: Mapping[str, Any]) -> str:
    reward, success = row.get("reward"), row.get("success")
    words, tone = "not judged" if reward is None else "", "muted"
    if success is not None:
        words, tone = ("right", "good") if success else ("wrong", "bad")
    judgement = [f'<span class="{tone}">{words}</span>'] if words else []
    if reward is not None:
        judgement.append(f"reward {reward:g}")
    if isinstance(row.get("advantage"), int | float):
        judgement.append(f"<small>advantage {row['advantage']:+.2f}</small>")
    if row.get("feedback"):
        judgement.append(f"<small>{html.escape(str(row['feedback']))}</small>")
    badge = ""
    if is_of_teacher(row):
        count = row.get("teacher_tokens")
        words = "teacher" if row.get("teacher") else f"first {count} tokens: teacher"
        badge = f'<span class="badge">{words}</span>'
    return (
        f'<tr><td><div class="text prompt">{_text(row.get("prompt"))}</div></td>'
        f'<td>{badge}<div class="text">{colored(row) or _text(row.get("response"))}'
        "</div></td>"
        f"<td>{'<br>'.join(judgement)}</td></tr>"
    )


def _text(value: Any) -> str:
    """Escaped text; a conversation as its turns."""
    if isinstance(value, list):
        turns = (m if isinstance(m, dict) else {"content": m} for m in value)
        value = "\n\n".join(str(turn.get("content", "")) for turn in turns)
    elif isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    return html.escape("" if value is None else str(value).strip())
