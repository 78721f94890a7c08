"""Questions asked by how often they are solved."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_task
from tiny_groups import make_groups

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.recipes.transforms import CountSuccesses
from jaxrl_post.training import Config
from jaxrl_post.training.config import CurriculumConfig
from jaxrl_post.training.curriculum import chances, draw, remembering
from jaxrl_post.training.stages import make_stages
from jaxrl_post.types import Verdict

TASK = tiny_task.load(count=10)
ROWS = {name: i for i, name in enumerate(TASK.rows(range(10)).ids)}
NEW = np.ones((10, 2))


def ask(posterior, cursor, count, floor=0.1):
    place = {"seed": 3, "cursor": cursor, "count": count}
    return draw(TASK, ROWS, posterior, floor=floor, **place)


def test_questions_never_asked_come_in_the_tasks_own_order():
    prompts, cursor = ask(NEW, 4, 13)
    assert prompts == TASK.prompts(3, 4, 13) and cursor == 17


def test_how_often_a_question_is_asked_is_its_chance():
    """Of 400 turns each; a binomial share is within four deviations of its chance."""
    posterior = np.stack([np.arange(1, 11), np.arange(10, 0, -1) ** 2.0], axis=1)
    wanted = chances(posterior, 0.1)
    assert wanted.min() == 0.1 and wanted.max() > 0.9
    asked, cursor = Counter(), 0
    while cursor < 4000:
        prompts, cursor = ask(posterior, cursor, 7)
        asked.update(ROWS[name] for name in prompts.ids)
    shares = np.array([asked[row] for row in range(10)]) / 400
    np.testing.assert_array_less(
        abs(shares - wanted), 4 * np.sqrt(wanted * (1 - wanted) / 400) + 7 / 400
    )


def test_what_is_asked_depends_on_the_place_alone():
    posterior = NEW + np.arange(10)[:, None] * [5.0, 1.0]
    whole, end = ask(posterior, 2, 9)
    first, middle = ask(posterior, 2, 4)
    second, after = ask(posterior, middle, 5)
    assert (*first.ids, *second.ids) == whole.ids and after == end > 11


def test_successes_are_counted_before_groups_are_dropped():
    recipe = remembering(recipes.grpo(dynamic_sampling=True), CurriculumConfig())
    assert recipe.posterior_discount == 0.5
    count, drop = recipe.group_transforms
    groups = make_groups([[1, 1, 1, 1], [1, 0, 0, None]])
    groups = count(replace(groups, posterior=np.ones((2, 2))))
    np.testing.assert_array_equal(groups.posterior, [[5, 1], [2, 3]])
    assert drop(groups).prompts.ids == ("q1",)
    silent = ((Verdict(1.0), Verdict(0.0)),) * 2
    with pytest.raises(InputError, match="have it set Verdict.success"):
        count(replace(groups, verdicts=silent))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("sft", {}, "'sft' samples nothing"),
        ("hapo", {}, "say so by recipe.posterior_discount=0.5"),
    ],
)
def test_recipes_that_cannot_have_one(name, arguments, words):
    tree = {
        "model": {"path": "x"},
        "task": {"name": "science", "curriculum": {}},
        "recipe": {"name": name, **arguments},
        "training": {"steps": 1, "group_size": 1 if name == "sft" else 8},
    }
    with pytest.raises(InputError, match=words):
        make_stages(Config.from_dict(tree))
    if name == "hapo":
        tree["recipe"]["posterior_discount"] = 0.9
        (stage,) = make_stages(Config.from_dict(tree))
        assert not any(
            isinstance(t, CountSuccesses) for t in stage.recipe.group_transforms
        )
    with pytest.raises(InputError, match="run.replay takes the questions"):
        Config.from_dict({**tree, "run": {"replay": "runs/a"}})
