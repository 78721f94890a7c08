"""Writes the README's tables from the files that hold the figures.

python scripts/readme_tables.py          # rewrites README.md
python scripts/readme_tables.py --check  # fails where it would change something
"""

from __future__ import annotations

import json
import re
import sys

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
    tables = {
        "base": base_table(),
        "quickstart": table(rows),
    }
    path = ROOT / "README.md"
    text = old = path.read_text()
    for name, lines in tables.items():
        # A marker, then the table that was there, up to the next blank line.
        pattern = rf"(<!-- {name} -->\n)(?:\n(?:\|.*\n)+)?"
        text = re.sub(pattern, lambda m, t=lines: f"{m[1]}\n{t}\n", text)
    if "--check" in sys.argv:
        sys.exit("README.md is not up to date" if text != old else 0)
    path.write_text(text)


if __name__ == "__main__":
    main()
