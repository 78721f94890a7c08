"""PGPO's theory: the orders of its SDE, and what rho of the own batch does to them."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "weak_approximation.py"
spec = spec_from_file_location("weak_approximation", SCRIPT)
assert spec is not None and spec.loader is not None
weak = module_from_spec(spec)
spec.loader.exec_module(weak)

DIFFUSION = {row.setting: row for row in weak.diffusion_rows()}
GAINS = {row.setting: row for row in weak.gain_rows()}


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("theta_0 = 1, max over k, s = sqrt(eta)", (0.035237, 0.003649)),
        ("theta_0 = 1, max over k, s = rho sqrt(eta)", (0.023426, 0.003387)),
        ("theta_0 = 1, at T only, s = rho sqrt(eta)", (0.004355, 0.001300)),
        ("theta_0 = 1, max over k, s = 1", (0.249827, 0.309130)),
        ("theta_0 = 1, max over k, s = 0", (0.066911, 0.007608)),
        ("theta_0 = 0, max over k, s = sqrt(eta)", (0.046265, 0.005047)),
        ("theta_0 = 0, max over k, s = rho sqrt(eta)", (0.006945, 0.000101)),
    ],
)
def test_errors_of_an_independent_calculation(setting, expected):
    errors = DIFFUSION[setting].errors
    np.testing.assert_allclose((errors[0], errors[-1]), expected, atol=1e-6)


@pytest.mark.parametrize("diffusion", ["sqrt(eta)", "rho sqrt(eta)"])
def test_order_one_with_and_without_rho_in_the_diffusion(diffusion):
    row = DIFFUSION[f"theta_0 = 1, max over k, s = {diffusion}"]
    assert row.slope == pytest.approx(1, abs=0.15)


def test_the_theorem_as_printed_does_not_converge():
    row = DIFFUSION["theta_0 = 1, max over k, s = 1"]
    assert abs(row.slope) < 0.15
    assert min(row.errors) > 0.2


def test_from_the_minimum_the_right_diffusion_is_order_two():
    row = DIFFUSION["theta_0 = 0, max over k, s = rho sqrt(eta)"]
    assert row.slope == pytest.approx(2, abs=0.15)


def test_rho_of_the_own_batch_leaves_an_error():
    errors = GAINS["theta, rho of the own batch"].errors
    np.testing.assert_allclose(errors, [0.240, 0.223, 0.215, 0.211], atol=5e-4)
    assert pytest.approx(0.2066, abs=1e-4) == weak.LIMIT
    assert min(errors) > weak.LIMIT


@pytest.mark.parametrize(
    "setting",
    [
        "theta, rho of the previous step",
        "theta, rho of the independent batch",
        "theta^2, the same, s = sqrt(eta)",
    ],
)
def test_rho_of_another_batch_keeps_order_one(setting):
    assert GAINS[setting].slope == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("gains_from", ["own batch", "previous step", "constant"])
def test_the_transform_follows_the_closed_form(gains_from):
    """Through optax, at every step of the largest eta, to five standard errors."""
    eta, paths = weak.ETAS[0], 8192
    run = jax.jit(partial(weak.simulate, gains_from=gains_from, paths=paths))
    first, second = np.array(run(jax.random.key(0), eta))[:, : len(weak.times(eta))]
    if gains_from == "constant":
        sampled, exact = second, weak.second_moments(eta, 1)
        # theta is Gaussian: Var theta^2 = 2 v (v + 2 m^2).
        variance = second - first**2
        variance = 2 * variance * (variance + 2 * first**2)
    else:
        sampled, exact = first, weak.first_moments(eta, gains_from)
        variance = second - first**2
    tolerance = 5 * np.sqrt(np.maximum(variance, 0) / paths) + 1e-5
    assert np.all(np.abs(sampled - exact) < tolerance)
    assert tolerance.max() < 0.04


def test_closed_forms_as_json_lines(tmp_path, capsys):
    weak.main(["--seeds", "0", "--out", str(tmp_path / "rows.jsonl")])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len(DIFFUSION) + len(GAINS)
    assert rows[1]["slope"] == pytest.approx(0.931, abs=1e-3)
    assert "rho of the own batch" in capsys.readouterr().out
