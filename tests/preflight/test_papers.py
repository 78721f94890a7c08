"""The committed rows of the papers' settings, and what is claimed of them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "preflight_papers.py"
spec = spec_from_file_location("preflight_papers", SCRIPT)
assert spec is not None and spec.loader is not None
script = module_from_spec(spec)
sys.modules[spec.name] = script  # where dataclasses look their annotations up
spec.loader.exec_module(script)

ROWS = script.read()


def test_rows_are_of_commands_that_the_script_still_runs():
    commands = {script.shown(s, p) for s in script.everything() for p in s.parts}
    assert {row["command"] for row in ROWS} <= commands


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "h100:1x4"])
def test_the_config_alone_fits(topology):
    """With 15 % to spare, at most 1.4 of the model's operations, never whole logits."""
    (row,) = [
        row
        for row in script.joined(ROWS)
        if (row["setting"], row["topology"]) == ("pgpo", topology)
    ]
    assert f"preflight {script.PGPO} --topology {topology}" in row["command"]
    assert row["verdict"] == "fits" and set(row["parts"]) == set(script.PARTS)
    programs = {k: v for part in row["parts"].values() for k, v in part.items()}
    for program in programs.values():
        assert program["bytes"]["peak"] <= 0.85 * row["chip"]["memory"]
        assert program["logits_rows"] < 8192 / 10  # of the tokens of one response
    assert 1 <= programs["update"]["flops"]["ratio"] <= 1.4
