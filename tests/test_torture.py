"""Runs that are killed, resumed and compared: a few kills of scripts/torture.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_undisturbed_one(tmp_path, kills):
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "scripts/torture.py", "--kills", str(kills)]
    done = subprocess.run(
        [*command, "--out", str(log)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["kill"] for row in rows if "kill" in row] == [*range(1, kills + 1)]
    assert sum(row.get("kills", 0) for row in rows) == kills
    assert all(row.get("differences", []) == [] for row in rows)
    assert rows[1]["instant"] == "saving"
