"""Every config in the repository: read, checked, its recipe made, its task known."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from jaxrl_post import recipes, tasks
from jaxrl_post.training import load_config

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))


def test_there_are_configs():
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_usable(path):
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert str(recipes.make(config.recipe.name, **config.recipe.arguments))
    blocks = [config.task, *config.evaluation.values()]
    for name, options in [
        (getattr(b, "task", None) or config.task.name, b.options) for b in blocks
    ]:
        assert name in tasks.BUILT_IN
        load = import_module(f"jaxrl_post.tasks.{name}").load
        assert options.keys() <= inspect.signature(load).parameters.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_means_the_same(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config
