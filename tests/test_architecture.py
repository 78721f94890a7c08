"""What imports what, what an import costs, and what the package shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import jaxrl_post

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_imports_only_go_down():
    """The contracts are in pyproject.toml."""
    process = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    "module",
    [
        "jaxrl_post",
        "jaxrl_post.errors",
        "jaxrl_post.isolation",
        "jaxrl_post.tasks",
        "jaxrl_post.training.config",
        "jaxrl_post.types",
    ],
)
def test_starts_without_heavy_packages(module):
    heavy = {"jax", "jaxlib", "flax", "optax", "transformers", "datasets", "torch"}
    code = f"import sys, {module}; print(*(sys.modules.keys() & {heavy}))"
    assert run_python(code) == ""


def test_whole_package_imports_without_torch():
    code = """
import importlib, pkgutil, sys, jaxrl_post
sys.modules["torch"] = None  # importing it raises
for module in pkgutil.walk_packages(jaxrl_post.__path__, "jaxrl_post."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    run_python(code)


def test_import_time():
    """Importing the package, and what a composer uses of it, costs little more than
    importing what it stands on."""

    def seconds(modules: str) -> float:
        code = f"import time; import {modules}; print(time.process_time())"
        return float(run_python(code))

    base, ours = "jax, optax, flax", "jaxrl_post, jaxrl_post.losses"
    # Processor time, and the least of several: other work only ever adds to it.
    least = [min(seconds(m) for _ in range(3)) for m in (f"{base}, {ours}", base)]
    assert least[0] < 1.3 * least[1], least


def test_public_names():
    assert list(jaxrl_post.__all__) == sorted(jaxrl_post.__all__)
    for name in jaxrl_post.__all__:
        assert getattr(jaxrl_post, name) is not None, name
    assert dir(jaxrl_post) == list(jaxrl_post.__all__)
    with pytest.raises(AttributeError, match="no attribute 'grpo_trainer'"):
        _ = jaxrl_post.grpo_trainer


@pytest.mark.parametrize(
    "package", ["losses", "models", "generation", "tasks", "training", "recipes"]
)
def test_packages_name_what_is_public(package):
    module = getattr(jaxrl_post, package)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None, name
