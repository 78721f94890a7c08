"""Runs of several stages: one folder, one count of steps, each stage begun anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import PARAMS
from tiny_runs import StopAfter, assert_same_state, lasting

from jaxrl_post import recipes, training
from jaxrl_post.errors import ConfigError, InputError
from jaxrl_post.training.metrics import read_metrics
from jaxrl_post.training.run_folder import check_unchanged
from jaxrl_post.training.stages import make_stages, stage_of
from jaxrl_post.training.state import init_state

STAGES = {
    "warm": {"optimizer": {"name": "sgd"}, "training": {"steps": 2}},
    "rl": {"recipe": {"kl_weight": 0.5, "kl_estimator": "k3"}},
}


@pytest.fixture
def staged(tiny_config):
    """Makes a config of two stages, two and three steps long."""

    def make(dir=None, stages=STAGES, **training):
        training = {"steps": 3, "prompts_per_step": 2, "group_size": 2} | training
        return tiny_config(
            **({"run": {"dir": str(dir)}} if dir else {}),
            optimizer={"learning_rate": 0.06, "schedule": "linear"},
            training=training,
            sampling={"max_new_tokens": 4},
            stages=stages,
        )

    return make


def stopping_after(number):
    return type("StopAfterNumber", (StopAfter,), {"step": number})


def test_a_staged_run_resumes_to_the_same_end_from_anywhere(staged, tmp_path):
    """Stopped within each stage and where one ends, to the bit as never stopped."""
    whole = staged(tmp_path / "whole", evaluate_every=4)
    cut = staged(tmp_path / "cut", evaluate_every=4)
    result = training.run(whole)
    for step in (1, 2, 4):
        with pytest.raises(training.Interrupted):
            training.run(cut, progress=stopping_after(step))
        assert read_metrics(tmp_path / "cut")[-1]["step"] == step
    resumed = training.run(cut)
    rows = read_metrics(tmp_path / "whole")
    assert lasting(read_metrics(tmp_path / "cut")) == lasting(rows)
    assert_same_state(result.state, resumed.state)
    check_rows(rows)
    # The optimizer has been begun anew, the prompts have not.
    assert (int(result.state.update), int(result.state.cursor)) == (3, 10)
    assert training.run(whole).state is None


def check_rows(rows):
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.get("stage") for row in rows] == [None, 1, 1, 2, 2, 2]
    evaluated = [row["step"] for row in rows if "eval/held/avg@2" in row]
    assert evaluated == [0, 2, 4, 5]  # the base, every fourth, where a stage ends
    rates = [row["learning_rate"] for row in rows[1:]]
    np.testing.assert_allclose(rates, [0.06, 0.03, 0.06, 0.04, 0.02], rtol=1e-5)
    # The reference is the policy that the second stage began with.
    kl = [row.get("kl") for row in rows[1:]]
    assert kl[:2] == [None, None]
    assert abs(kl[2]) < 1e-6 < kl[4]


def test_a_stage_begins_with_the_parameters_of_the_one_before(staged):
    recipe = {"name": "sdpo", "max_length": 32}
    second = staged(stages={"a": {}, "b": {"recipe": recipe}, "c": {}})
    first, stage, third = make_stages(second)
    assert [(s.first, s.last) for s in (first, stage, third)] == [
        (0, 3),
        (3, 6),
        (6, 9),
    ]
    adam = optax.adam(0.1)
    before = init_state(
        jax.tree.map(jnp.copy, PARAMS), adam, recipes.grpo(), jax.random.key(3)
    )
    count = jnp.asarray(7, jnp.int32)
    before = before.replace(
        step=count + 1, update=count, skipped=count, cursor=count + 2, gate=count
    )
    state = stage.begin(before, optax.sgd(0.1))
    jax.tree.map(np.testing.assert_array_equal, state.teacher, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, PARAMS)
    assert int(state.step) == 8 and int(state.cursor) == 9
    assert (int(state.update), int(state.skipped), state.gate) == (0, 0, None)
    assert jax.random.key_data(state.rng).tolist() == [0, 3]
    assert jax.tree.structure(state.opt_state) != jax.tree.structure(before.opt_state)


def test_prompts_begin_anew_with_another_task(staged):
    split = {"b": {"task": {"split": "test"}}, "c": {"task": {"split": "test"}}}
    stages = make_stages(staged(stages={"a": {}, **split, "d": {}}))
    assert [stage.own_task for stage in stages] == [False, True, False, True]
    grpo = recipes.grpo()
    for stage, cursor in zip(stages[1:], (0, 5, 0), strict=True):
        state = init_state(PARAMS, optax.sgd(0.1), grpo, jax.random.key(0))
        state = state.replace(cursor=jnp.asarray(5, jnp.int32))
        assert int(stage.begin(state, optax.sgd(0.1)).cursor) == cursor


def test_a_checkpoint_at_a_boundary_is_of_the_stage_that_ends(staged):
    stages = make_stages(staged(stages={"a": {}, "none": {"training": {"steps": 0}}}))
    assert [stage_of(stages, step) for step in range(5)] == [0, 0, 0, 0, 1]
    stages = make_stages(staged())
    assert [stage_of(stages, step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 1]


def test_without_stages_a_run_is_one(tiny_config):
    config = tiny_config()
    (stage,) = make_stages(config)
    assert (stage.first, stage.last, stage.metrics) == (0, 4, {})
    assert stage.config is config and str(stage) == str(stage.recipe)
    assert make_stages(config, recipes.sdpo())[0].recipe.name == "sdpo"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {"recipe": {"name": "grop"}}}, "stages.a: recipe.name='grop': did you"),
        ({"a": {"recipe": {"clip_hgih": 1}}}, "stages.a: .*recipe.clip_hgih"),
        ({"a": {}, "b": {"task": {"name": "tiny_tsk:load"}}}, "stages.b.task: .*tiny_"),
        ({"a": {"task": {"cuont": 3}}}, "stages.a.task: .*cuont"),
    ],
)
def test_wrong_names_in_a_stage_are_one_error_before_anything_runs(
    staged, tmp_path, stages, message
):
    with pytest.raises(InputError, match=message) as error:
        training.run(staged(tmp_path / "run", stages=stages))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stages", "problems"),
    [
        ({"a": {"training": {"stpes": 1}}}, ["stages.a.training.stpes=1: no such"]),
        (
            {"a": {"training": {"steps": -1}}, "b": {"optimizer": {"b1": 1}}},
            ["stages.a.training.steps=-1: must be", "stages.b.optimizer.b1=1.0: must"],
        ),
        ({"a": {"run": {"seed": 1}}}, ["stages.a.run: no section of a stage"]),
        ({"a": {"recipe": 3}}, ["stages.a.recipe=3: expected a section"]),
        ({"a": {"training": {"updates_per_step": 3}}}, ["stages.a.training.updates_"]),
        ({"a": {"training": {"keep_checkpoints": 9}}}, ["stages.a.training.keep_"]),
        ({"a b": {}}, ["'stages.a b': name a stage by"]),
        ({"a": None}, ["stages.a=None: expected a section"]),
    ],
)
def test_every_problem_of_a_stage_is_named_by_its_key(staged, stages, problems):
    with pytest.raises(ConfigError) as error:
        staged(stages=stages)
    assert len(error.value.problems) == len(problems)
    for problem, start in zip(error.value.problems, problems, strict=True):
        assert problem.startswith(start)


def test_a_recipe_in_code_is_for_runs_without_stages(staged):
    with pytest.raises(InputError, match="stages.warm.recipe, stages.rl.recipe"):
        training.run(staged(), recipe=recipes.grpo())


@pytest.mark.parametrize(
    ("stages", "steps", "changed"),
    [
        ({"a": {}, "b": {"training": {"steps": 9}}}, 3, None),
        ({"a": {"training": {"steps": 3}}, "b": {}}, 9, None),
        ({"a": {"training": {"checkpoint_every": 1}}, "b": {}}, 3, None),
        ({"a": {}, "b": {}}, 9, "stages.a.training.steps: 3 -> 9"),
        ({"a": {"training": {"steps": 2}}, "b": {}}, 3, "a.training.steps: 3 -> 2"),
        ({"a": {}, "b": {"recipe": {"ddof": 1}}}, 3, "b.recipe.ddof: None -> 1"),
        ({"b": {}, "a": {}}, 3, "stages: ['a', 'b'] -> ['b', 'a']"),
        ({}, 3, "stages: ['a', 'b'] -> {}"),
        (
            {"a": {}, "b": {"optimizer": {"schedule": "linear"}}},
            3,
            "stages.b.optimizer.schedule: None -> 'linear'",
        ),
    ],
)
def test_what_may_change_when_a_staged_run_goes_on(
    tiny_config, tmp_path, stages, steps, changed
):
    def make(stages, steps):
        return tiny_config(training={"steps": steps}, stages=stages)

    (tmp_path / "config.yaml").write_text(make({"a": {}, "b": {}}, 3).to_yaml())
    (tmp_path / "metrics.jsonl").write_text("")
    config = make(stages, steps)
    if changed is None:
        check_unchanged(tmp_path, config)
    else:
        with pytest.raises(InputError) as error:
            check_unchanged(tmp_path, config)
        assert changed in str(error.value)


def test_a_schedule_that_ends_at_the_last_update_fixes_the_last_stage(staged, tmp_path):
    (tmp_path / "config.yaml").write_text(staged().to_yaml())
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="stages.rl.training.steps: 3 -> 4"):
        check_unchanged(tmp_path, staged(steps=4))
