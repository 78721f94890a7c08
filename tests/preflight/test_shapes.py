"""Batches and states as shapes."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxrl_post import recipes
from jaxrl_post.models import split_adapter
from jaxrl_post.preflight.shapes import Shapes, batch_of, bytes_per_chip, find_model
from jaxrl_post.sharding import make_mesh
from jaxrl_post.training import load_config
from jaxrl_post.training.setup import open_model
from jaxrl_post.training.stages import make_stages
from jaxrl_post.training.state import init_state

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configs_longest_batch(path):
    told = ["training.group_size=4", "training.updates_per_step=2"]
    config = load_config(path, [*told, "training.prompts_per_step=8"])
    if config.stages:
        config = config.stage([*config.stages][-1])
    recipe = recipes.make(config.recipe.name, **config.recipe.arguments)
    batch = batch_of(config, recipe, make_mesh(devices=jax.devices()[:1]))
    groups = config.training.prompts_per_step // 2
    rows = groups * (4 if recipe.rollouts else 1)
    time = config.sampling.max_new_tokens
    assert batch.responses.shape == batch.old_logps.shape == (rows, time)
    assert batch.contexts.shape == (groups, config.task.max_prompt_length)
    if recipe.reprompt is not None:
        assert batch.teacher_contexts.shape[0] >= rows
        assert batch.teacher_contexts.shape[1] == recipe.reprompt.max_length
    if recipe.demonstrations:
        assert batch.is_teacher is not None


def test_a_chip_holds_its_part():
    mesh = make_mesh(2, 4, 1, jax.devices())
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.ShapeDtypeStruct((8, 3), "float32", sharding=sharding)
    host = jax.ShapeDtypeStruct(
        (8, 3), "bfloat16", sharding=sharding.with_memory_kind("pinned_host")
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert bytes_per_chip({"x": x, "host": host, "key": key}) == 2 * 3 * 4 + 8
    assert bytes_per_chip({"x": x, "host": host}, on_host=True) == 2 * 3 * 2


@pytest.mark.parametrize(
    "lora", ["null", "{rank: 2}", "{base_dtype: bfloat16}", "{base_dtype: int8}"]
)
def test_the_state_is_that_of_a_run(lora):
    """Leaf by leaf what training begins with, an adapter and its frozen base too."""
    told = [f"model.lora={lora}"]
    path = next(p for p in CONFIGS if p.stem == "quickstart")
    config = load_config(path, [*told, "recipe={name: grpo, kl_weight: 0.1}"])
    sizes, _ = find_model(config.model.path)
    found = Shapes.of(config, sizes, make_mesh(devices=jax.devices()[:1])).state
    trainable, frozen = split_adapter(open_model(config)[1])
    (stage,) = make_stages(config)
    state = init_state(
        trainable,
        stage.optimizer,
        stage.recipe,
        jax.random.key(0),
        frozen=frozen,
        reference={} if frozen else None,
    )

    def leaves(tree):
        paths = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p): (x.shape, x.dtype) for p, x in paths}

    assert leaves(found) == leaves(state)
