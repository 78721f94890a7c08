"""Which variants of HAPO's gate stop injecting: the script against exact values."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from math import comb
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "injection_simulation.py"
spec = spec_from_file_location("injection_simulation", SCRIPT)
assert spec is not None and spec.loader is not None
simulation = module_from_spec(spec)
spec.loader.exec_module(simulation)

EXACT = {
    (r.gate, r.setting): r.probabilities
    for r in simulation.steady_rows(seeds=0, paths=0)
}


def test_every_gate_at_every_rate():
    exact = [g for g, gate in simulation.GATES.items() if gate.discount in (0, 1)]
    assert len(EXACT) == len(exact) * len(simulation.RATES) == 25


@pytest.mark.parametrize(
    ("gate", "rate", "expected"),
    [
        ("mean (the paper)", 0.9, {1: 0.1869, 50: 0.1869}),
        ("Thompson", 0.9, {1: 0.3697, 50: 0.3697}),
        ("Thompson", 1, {1: 0.1342, 50: 0.1342}),
        ("mean, posterior kept", 0.9, {2: 0.2108, 3: 0.0851, 10: 0.0053, 20: 0.0001}),
    ],
)
def test_the_specifications_values(gate, rate, expected):
    found = EXACT[gate, f"mu = {rate:g}"]
    for visit, value in expected.items():
        assert found[visit - 1] == pytest.approx(value, abs=5.1e-5)


def test_annealed_gate_by_hand():
    """At visit 26 of 50 gamma is 0.8 * 24/49 = .392: open below three successes."""
    chance = sum(comb(8, s) * 0.8**s * 0.2 ** (8 - s) for s in range(3))
    assert EXACT["mean, annealed threshold", "mu = 0.8"][25] == pytest.approx(chance)
    for rate in simulation.RATES:  # below the threshold, too
        assert EXACT["mean, annealed threshold", f"mu = {rate:g}"][-1] == 0


def test_what_vanishes_above_the_threshold():
    for rate in (0.9, 0.95):
        last = {
            gate: p[-1] for (gate, mu), p in EXACT.items() if mu == f"mu = {rate:g}"
        }
        remembering = {g for g, p in last.items() if p < 1e-4}
        assert remembering == {
            "mean, annealed threshold",
            "mean, posterior kept",
            "Thompson, posterior kept",
        }


@pytest.mark.parametrize(
    "name", ["mean (the paper)", "Thompson", "mean, posterior kept"]
)
def test_simulated_as_exact(name):
    gate, paths = simulation.GATES[name], 20_000
    found, errors = simulation.simulate(gate, lambda _: 0.9, seeds=2, paths=paths)
    exact = np.array(EXACT[name, "mu = 0.9"])
    tolerance = 5 * np.sqrt(exact * (1 - exact) / (2 * paths)) + 2e-4
    assert np.all(np.abs(found - exact) < tolerance)
    assert len(errors) == simulation.VISITS


def test_a_gate_that_remembers_notices_late():
    rows = simulation.learning_rows(seeds=2, paths=500)
    at_20 = {row.gate: row.probabilities[19] for row in rows}
    assert at_20["mean, posterior kept"] > at_20["mean, posterior x 0.9"] > 0.9
    assert at_20["mean, posterior x 0.5"] < 0.1 and at_20["mean (the paper)"] < 0.1


def test_json_lines_and_the_committed_ones(tmp_path, capsys):
    simulation.main(["--seeds", "0", "--out", str(tmp_path / "rows.jsonl")])
    assert "Thompson" in capsys.readouterr().out

    def read(path):
        head, *rows = map(json.loads, path.read_text().splitlines())
        return head, {(r["table"], r["gate"], r["setting"]): r for r in rows}

    head, rows = read(tmp_path / "rows.jsonl")
    assert head["command"].endswith("--seeds 0 --paths 20000")
    committed, evidence = read(ROOT / "docs" / "evidence" / "injection.jsonl")
    assert committed["command"].endswith("--seeds 8 --paths 20000")
    assert {key: evidence[key] for key in rows} == rows
