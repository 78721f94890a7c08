"""The script that compares searches: what it does next, and what it makes of rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("discover")
    sys.path.remove(str(SCRIPTS))


def candidate(question, share):
    return {"kind": "candidate", "question": question, "pass@64": share}


def search(question, method, seed, first, attempts=8):
    return {
        "kind": "search",
        "question": question,
        "method": method,
        "seed": seed,
        "attempts": attempts,
        "first": first,
    }


def test_candidates_come_first_and_nothing_twice(script):
    rows = [candidate(0, 0.03), candidate(1, 0.0), candidate(2, 0.029)]
    assert script.hard(rows) == [1, 2]
    assert next(script.left(rows, 3, [0], 8)) == (3,)
    rows.append(search(1, "sdpo", 0, None))
    jobs = list(script.left(rows, 2, [0, 1], 8))
    assert jobs[:2] == [(1, "best_of_k", 0, 8), (1, "multi_turn", 0, 8)]
    assert len(jobs) == 2 * 2 * 3 - 1 == len(set(jobs))
    # Another budget is another search.
    assert len(list(script.left(rows, 2, [0, 1], 16))) == 12


def test_table_takes_a_questions_seeds_together(script):
    rows = [search(1, "sdpo", seed, first) for seed, first in ((0, 2), (1, None))]
    rows += [search(2, "sdpo", 0, None), search(2, "sdpo", 1, 8)]
    lines = script.table(rows).splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")]
    cells = dict(zip(heads, map(str.strip, lines[2].split("|")), strict=True))
    assert (cells["method"], cells["questions"], cells["searches"]) == (
        "sdpo",
        "2",
        "4",
    )
    means = {k: cells[f"discovery@{k}"].split()[0] for k in (1, 2, 4, 8)}
    assert means == {1: "0.00", 2: "0.25", 4: "0.25", 8: "0.50"}
