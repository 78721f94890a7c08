"""What docs/evidence.md shows, made of the rows: the table of claims, tables and plots.

    python scripts/readme_tables.py              # the tables, with all others
    python -m scripts.experiments.page           # the plots

A verdict comes from the interval by `_statistics.verdict`; what was not run says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from . import (
    _runs,
    beyond,
    feedback,
    gates,
    hapo_vs_mixed,
    new_seed,
    pgpo_vs_sdpo,
    real_model,
    sdpo_claims,
    sequence_weights,
    stability,
)
from ._runs import EVIDENCE, VALIDATION, Claim, Row, Rows, Study, finals
from ._statistics import Interval, mean_interval, verdict

STUDIES = (
    pgpo_vs_sdpo.STUDY,
    hapo_vs_mixed.STUDY,
    stability.STUDY,
    beyond.STUDY,
    sequence_weights.STUDY,
    sdpo_claims.STUDY,
    gates.STUDY,
    feedback.STUDY,
    real_model.STUDY,
)
COVARIANCE = {
    "mean_multiplier": "mean ρ",
    "std_multiplier": "its standard deviation",
    "relative": "norm of Cov(ρ, g) over that of mean ρ x mean g",
    "relative_by_chance": "the same in random orders, median",
    "along_mean_gradient": "its part along mean g",
    "p": "share of orders with as much",
}
HEADS = ("claim", "paper's number", "ours", "seeds", "verdict", "command")


def estimate(claim: Claim, rows: Rows) -> Interval | None:
    """The claim's number over the seeds that both methods have; None without any.

    A run without such a number, NaN, does not count.
    """
    by_method = finals(rows)
    ours = by_method.get(claim.method, {})
    if claim.against is None:
        values = [claim.number(row) for row in ours.values()]
    else:
        theirs = by_method.get(claim.against, {})
        values = [
            claim.number(ours[seed]) - claim.number(theirs[seed])
            for seed in sorted(ours.keys() & theirs.keys())
        ]
    values = [value for value in values if not math.isnan(value)]
    return mean_interval(values) if values else None


def claims_table(studies: Sequence[Study] = STUDIES) -> str:
    """A line for every claim, in Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for study in studies:
        rows = _runs.read(study.path)
        for number, claim in enumerate(study.claims):
            found = estimate(claim, rows)
            says = ("", "", "not run")
            if found is not None:
                count = _runs.seeds(study, found.seeds)
                says = (str(found), count, verdict(found, claim.margin))
            mark = "**" if number < study.headline else ""
            lines.append(
                f"| {mark}{claim.text}{mark} | {claim.paper} | {says[0]} | {says[1]} "
                f"| {says[2]} | `{study.name}` |"
            )
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Of the page, by marker; nothing for what was not run."""
    found = {
        study.name: _runs.table(study, _runs.read(study.path)) for study in STUDIES
    }
    (row,) = _runs.read(EVIDENCE / "covariance.jsonl") or [{}]
    cells = {heading: f"{row[key]:.4f}" for key, heading in COVARIANCE.items() if row}
    lines = [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]
    lines.append(f"| {' | '.join(cells.values())} |")
    found["covariance"] = "\n".join(lines) if cells else ""
    return {"claims": claims_table(), "new_seed": new_seed.table(), **found}


def mean_line(
    rows: Mapping[int, Row], points: Callable[[Row], Mapping[int, float]]
) -> dict[str, list]:
    """Points and band of a `charts.Line`: the mean over seeds and its 95 % interval."""
    curves = [points(row) for row in rows.values()]
    found = {
        x: mean_interval([curve[x] for curve in curves if x in curve])
        for x in curves[0]
    }
    return {
        "points": [(x, at.mean) for x, at in found.items()],
        "band": [(x, at.low, at.high) for x, at in found.items() if at.seeds > 1],
    }


def plot(study: Study) -> None:
    """Validation accuracy over training, and every step's metrics, as SVG."""
    import matplotlib

    from jaxrl_post.report.charts import Chart, Line
    from jaxrl_post.report.pictures import figure

    by_method = finals(_runs.read(study.path))
    if not by_method:
        return

    def curve(row: Row) -> dict[int, float]:
        return {int(s): scores[VALIDATION] for s, scores in row["curve"].items()}

    def steps(name: str) -> Callable[[Row], dict[int, float]]:
        return lambda row: dict(enumerate(row["series"][name], 1))

    drawn = {"accuracy": ("validation avg@16", curve)}
    drawn |= {name.replace("/", "_"): (name, steps(name)) for name in study.plots}
    for short, (title, points) in drawn.items():
        lines = [
            Line(method, **mean_line(rows, points))
            for method, rows in by_method.items()
            if points(next(iter(rows.values())))
        ]
        path = EVIDENCE / f"{study.name}_{short}.svg"
        with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # same rows, same file
            figure(Chart(title, lines)).savefig(path, metadata={"Date": None})


def main() -> None:
    for study in STUDIES:
        plot(study)


if __name__ == "__main__":
    main()
