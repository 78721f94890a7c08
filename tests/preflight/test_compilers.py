"""The whole command, by each compiler that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = {"v5e:2x2": "libtpu", "h100:1x2": "jax_cuda12_plugin", "cpu:2": "jax"}


@pytest.mark.slow
@pytest.mark.parametrize("topology", COMPILERS)
def test_a_small_config_fits(topology):
    if find_spec(COMPILERS[topology]) is None:
        pytest.skip(f"{COMPILERS[topology]}, which compiles it, is not installed")
    overrides = ["mesh.fsdp=2", "training.chunk_size=48"]
    command = ["preflight", "configs/quickstart.yaml", *overrides, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_post.cli", *command, "--topology", topology],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "fits" and report["mesh"]["fsdp"] == 2
    programs = report["programs"]
    assert list(programs) == ["update", "prepare", "prefill", "start", "decode"]
    for program in programs.values():
        sizes = program["bytes"]
        parts = ("arguments", "outputs", "temp", "code", "resident")
        assert sizes["peak"] == sum(sizes[p] for p in parts) - sizes["aliases"]
    update = programs["update"]
    # The state is donated: nearly all of it is aliased.
    state = sum(report["resident"].values())
    assert 0.9 * state < update["bytes"]["aliases"] <= update["bytes"]["arguments"]
    assert 1.0 <= update["flops"]["ratio"] < 1.4
    assert update["flops"]["unknown_loops"] == 0
    # Gradients of what is split over `fsdp` are summed over it.
    kinds = update["collectives"]
    assert kinds.keys() & {"all-reduce", "reduce-scatter"}
    # Whole logits would be those of all tokens of a chip, at least 16 x 8 x 32 / 4.
    assert 0 < update["logits_rows"] <= 48
