"""Writes the tables of the README and the docs from the files that hold the figures.

python scripts/readme_tables.py          # rewrites them
python scripts/readme_tables.py --check  # fails where it would change something
"""

from __future__ import annotations

import json
import re
import sys

import bench_adapters
import bench_tables
import bench_turns
import compare
import discover
import mesh_table
import preflight_papers
import sandbox_table
from experiments import page
from quickstart_seeds import RESULTS, ROOT, WEIGHTS, table


def base_table() -> str:
    """The embedded base by level, in Markdown."""
    folder = WEIGHTS.parent
    figures = json.loads((folder / "figures.json").read_text())
    ceiling = json.loads((folder / "ceiling.json").read_text())
    names = {
        "t1": "T = 1",
        "t0.6": "T = 0.6",
        "greedy": "greedy",
        "pass@16": "pass@16",
        "pass@64": "pass@64",
        "parsed": "parsed",
        "with_demonstration": "with a solution",
        "with_feedback": "with feedback",
    }
    lines = [
        f"| level | {' | '.join(names.values())} | ceiling |",
        "|" + "---|" * (len(names) + 2),
    ]
    for level, row in figures["levels"].items():
        cells = [f"{row[name]:.3f}" if name in row else "" for name in names]
        best = ceiling["levels"][level]["t1"]
        lines.append(f"| {level} | {' | '.join(cells)} | {best:.3f} |")
    return "\n".join(lines)


def main() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    pages = {
        "README.md": {"base": base_table(), "quickstart": table(rows)},
        "docs/sdpo.md": {"distillation": study_table("distillation")},
        "docs/hapo.md": {"mixed": study_table("mixed")},
        "docs/evidence.md": page.tables(),
        "docs/rich_feedback.md": {
            "turns": bench_turns.table(bench_turns.read()),
            "discover": discover.table(discover.read()),
            "feedback": page.tables()["feedback"],
        },
        "docs/preflight.md": {
            "preflight": preflight_papers.table(preflight_papers.read()),
            "preflight-choice": preflight_papers.choice_table(preflight_papers.read()),
            "preflight-weak": preflight_papers.weak_table(preflight_papers.read()),
        },
        "docs/devices.md": {
            "meshes": mesh_table.table(mesh_table.read()),
            "mesh-training": mesh_table.training_table(mesh_table.read()),
        },
        "docs/sandbox.md": {
            "sandbox": sandbox_table.table(sandbox_table.read()),
            "escapes": sandbox_table.escapes(sandbox_table.read()),
        },
        "docs/performance.md": bench_tables.tables(),
        "docs/models.md": {"adapters": bench_adapters.table(bench_adapters.read())},
    }
    stale = [name for name, tables in pages.items() if rewrite(name, tables)]
    if "--check" in sys.argv:
        sys.exit(f"not up to date: {', '.join(stale)}" if stale else 0)


def study_table(study: str) -> str:
    """Of scripts/compare.py; nothing before the study has a result."""
    rows = compare.read(study)
    return compare.table(study, rows) if rows else ""


def rewrite(name: str, tables: dict[str, str]) -> bool:
    """Puts the tables at their markers, unless only asked; whether they were stale."""
    path = ROOT / name
    text = old = path.read_text()
    for marker, lines in tables.items():
        # A marker, then the table that was there, up to the next blank line.
        pattern = rf"(<!-- {marker} -->\n)(?:\n(?:\|.*\n)+)?"
        text = re.sub(pattern, lambda m, t=lines: f"{m[1]}\n{t}\n" if t else m[0], text)
    if text != old and "--check" not in sys.argv:
        path.write_text(text)
    return text != old


if __name__ == "__main__":
    main()
