"""Does a new seed fall where the intervals of the page expect it?

    python -m scripts.experiments.new_seed    # some minutes of one core

Checked from outside: seed 100, which no row of a study has, for the methods of the
headline claims, run as their final rows were. The score after the last step is held
against the 99 % prediction interval of those rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import _runs, hapo_vs_mixed, pgpo_vs_sdpo
from ._runs import Row, Rows, Study, finals
from ._statistics import prediction_interval

SEED = 100
STUDIES = (hapo_vs_mixed.STUDY, pgpo_vs_sdpo.STUDY)
SCORE = "test, last step"
HEADS = ("method", "seeds", "99 % prediction interval", "new seed", "inside")


def methods(study: Study) -> list[str]:
    """Those of its headline claims, each once."""
    claims = study.claims[: study.headline]
    names = [name for claim in claims for name in (claim.method, claim.against)]
    return list(dict.fromkeys(filter(None, names)))


def checked(rows: Rows, method: str) -> Row | None:
    """The new seed's row, if it is there."""
    found = (r for r in rows if (r["phase"], r["method"]) == ("check", method))
    return next(found, None)


def jobs(study: Study) -> Iterator[_runs.Job]:
    """What is to be run: methods with final rows and without the new seed."""
    rows = _runs.read(study.path)
    for method in methods(study):
        of_method = list(finals(rows).get(method, {}).values())
        if of_method and checked(rows, method) is None:
            rate = of_method[0]["learning_rate"]
            yield _runs.Job(method, "check", SEED, rate)


def table() -> str:
    """A line for every method that was checked, in Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for study in STUDIES:
        rows = _runs.read(study.path)
        number = study.columns[SCORE]
        for method in methods(study):
            row = checked(rows, method)
            if row is None:
                continue
            values = [number(r) for r in finals(rows)[method].values()]
            expected, new = prediction_interval(values), number(row)
            inside = expected.low <= new <= expected.high
            cells = [
                method,
                str(len(values)),
                f"{expected.low:.3f} to {expected.high:.3f}",
                f"{new:.3f}",
                "yes" if inside else "no",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def main() -> None:
    for study in STUDIES:
        for job in jobs(study):
            _runs.append(study.path, _runs.run(study, "default", job))
    print(table())


if __name__ == "__main__":
    main()
