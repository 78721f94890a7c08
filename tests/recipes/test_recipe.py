"""Recipes by name and by hand."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.information import AdaptiveSensitivity
from jaxrl_post.recipes import Recipe, Teacher, Term


def test_unused_terms_are_left_out():
    assert [t.name for t in recipes.grpo().terms] == ["policy_gradient"]
    assert recipes.grpo().needs == frozenset()
    assert recipes.grpo(kl_weight=0.1).needs == {"reference"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("grop", {}, "did you mean 'grpo'"),
        ("grpo", {"clip_hihg": 1.0}, "did you mean 'clip_high'"),
        ("grpo", {"preset": "velr"}, "did you mean 'verl'"),
        ("grpo", {"importance": "words"}, "'token' or 'sequence' or 'clipped'"),
        ("grpo", {"importance": "sequence", "dual_clip": 3.0}, "dual_clip=3.0"),
        ("grpo", {"reduction": "constant"}, "need max_length"),
        ("no_such_module:recipe", {}, "no_such_module"),
        ("pgpo", {"adapt": {"tarket": 1.5}}, "adapt.tarket: did you mean 'target'"),
        ("pgpo", {"adapt": {"target": 3.0}}, "above its target"),
        ("pgpo", {"adapt": 1.5}, "a mapping of target, quantile, rate"),
        ("pgpo", {"weights": "tokens"}, "'none' or 'sequence' or 'token'"),
    ],
)
def test_bad_recipes_say_what_is_wrong(name, arguments, message):
    with pytest.raises(InputError, match=message):
        recipes.make(name, **arguments)


def test_presets_are_overridden_by_arguments():
    verl = recipes.make("grpo", preset="verl")
    mine = recipes.make("grpo", preset="verl", dual_clip=None)
    assert verl.terms[0].loss.keywords["clips"]["dual_clip"] == 3.0
    assert mine.terms[0].loss.keywords["clips"]["dual_clip"] is None
    rewards = np.array([[1.0, 0.0, 0.0, 1.0]])
    advantages = verl.advantages(rewards, where=np.ones((1, 4), bool))
    # verl: (1 - .5) / (std with ddof 1 + 1e-6) = .8660239
    np.testing.assert_allclose(advantages[0, 0], 0.8660239, rtol=1e-6)


def test_clipped_tokens_are_those_without_a_gradient():
    """Both sides, advantages of both signs, against the loss's own gradient."""
    ratios = jnp.array([[0.5, 0.9, 1.0, 1.1, 2.0]] * 2)
    rows = {"contexts": jnp.ones((2, 3), jnp.int32), "context_mask": jnp.ones((2, 3))}
    ones = jnp.ones((2, 5), bool)
    batch = recipes.Batch(
        **rows,
        responses=jnp.ones((2, 5), jnp.int32),
        token_mask=ones,
        loss_mask=ones,
        sequence_mask=jnp.ones(2, bool),
        advantages=jnp.array([1.0, -1.0]),
        old_logps=jnp.zeros((2, 5)),
    )
    (term,) = recipes.grpo(clip_low=0.2, clip_high=0.3).terms
    logps = jnp.log(ratios)
    metrics = term.metrics({"logps": logps}, batch)
    gradient = jax.grad(lambda x: term.loss({"logps": x}, batch).sum())(logps)
    clipped = metrics["policy/clipped_low"] + metrics["policy/clipped_high"]
    np.testing.assert_array_equal(clipped, gradient == 0)
    np.testing.assert_array_equal(metrics["policy/clipped_high"][0], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(metrics["policy/clipped_low"][1], [1, 0, 0, 0, 0])
    on_policy = batch.replace(old_logps=None)
    assert "policy/clipped_low" not in term.metrics({"logps": logps}, on_policy)
    (term,) = recipes.grpo(clip_low=None, clip_high=None).terms
    metrics = term.metrics({"logps": logps}, batch)
    assert not metrics["policy/clipped_low"].any()
    assert not metrics["policy/clipped_high"].any()


@pytest.mark.parametrize("preset", sorted(recipes.grpo_presets()))
def test_every_preset_makes_a_recipe(preset):
    recipe = recipes.make("grpo", preset=preset, max_length=8)
    assert recipe.name == "grpo"


def test_an_adaptation_from_a_config():
    recipe = recipes.make("pgpo", adapt={"target": 1.4, "quantile": 0.9})
    assert recipe.information.adapt == AdaptiveSensitivity(target=1.4, quantile=0.9)


def test_recipe_of_ones_own_by_module_name(tmp_path, monkeypatch):
    (tmp_path / "my_recipes.py").write_text(
        "from jaxrl_post import recipes\n"
        "def mine(width=0.1):\n"
        "    return recipes.grpo(clip_low=width)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = recipes.make("my_recipes:mine", width=0.3)
    assert recipe.terms[0].loss.keywords["clips"]["clip_low"] == 0.3
    sys.modules.pop("my_recipes")


def test_terms_that_need_a_teacher_demand_one():
    term = Term("t", lambda v: {}, lambda s, b: jnp.zeros(()), needs={"teacher"})
    with pytest.raises(ValueError, match="its teacher is 'none'"):
        Recipe("r", (term,))
    block = str(Recipe("r", (term,), teacher=Teacher("ema", rate=0.05)))
    assert block == "r\n  1 x t (token_mean, reads teacher)\n  teacher: ema, rate 0.05"


def test_unknown_view_is_refused():
    with pytest.raises(ValueError, match="critic"):
        Term("t", lambda v: {}, lambda s, b: jnp.zeros(()), needs={"critic"})
