"""Which demonstration and which feedback a sample's teacher is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.recipes import Groups, Privileged, Reprompt
from jaxrl_post.tasks.reprompt import Templates
from jaxrl_post.types import Prompts, Verdict

RNG = np.random.default_rng(0)


def make_groups(successes, feedback=None, lengths=None) -> Groups:
    """One group; completion ``g`` is the text ``"g"``."""
    size = len(successes)
    lengths = np.array(lengths or [3] * size)
    verdicts = tuple(
        Verdict(float(right), right, None if feedback is None else feedback[g])
        for g, right in enumerate(successes)
    )
    shape = (1, size)
    return Groups(
        prompts=Prompts(
            ("q",), (({"role": "user", "content": "?"},),), ({},), ("ref",)
        ),
        contexts=np.zeros((1, 1), np.int32),
        context_mask=np.ones((1, 1), bool),
        tokens=np.zeros((*shape, 9), np.int32),
        mask=(np.arange(9) < lengths[:, None])[None],
        sampler_logps=np.zeros((*shape, 9), np.float32),
        stopped=np.ones(shape, bool),
        completions=(tuple(str(g) for g in range(size)),),
        verdicts=(verdicts,),
        rewards=np.array([successes], np.float32),
        judged=np.ones(shape, bool),
    )


def shown(reprompt, groups):
    return [c.demonstration for c in reprompt.choose(groups, RNG)[0]]


def test_first_sibling_and_never_oneself():
    groups = make_groups([False, True, True, False])
    assert shown(Reprompt(), groups) == ["1", "2", "1", "1"]
    assert shown(Reprompt(exclude_self=False), groups) == ["1", "1", "1", "1"]


def test_a_lone_success_has_no_demonstration():
    groups = make_groups([False, True, False])
    assert shown(Reprompt(), groups) == ["1", None, "1"]
    assert not Reprompt().choose(groups, RNG)[0][1]


def test_other_choices():
    groups = make_groups([False, True, True], lengths=[3, 7, 2])
    assert shown(Reprompt(demonstration="shortest"), groups) == ["2", "2", "1"]
    assert shown(Reprompt(demonstration="reference"), groups) == ["ref"] * 3
    many = make_groups([True] * 6)
    drawn = {tuple(shown(Reprompt(demonstration="random"), many)) for _ in range(9)}
    assert len(drawn) > 1
    assert all(row[g] != str(g) for row in drawn for g in range(6))


def test_leave_out_correct():
    groups = make_groups([False, True, True])
    assert shown(Reprompt(leave_out_correct=True), groups) == ["1", None, None]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("never", [Privileged("1"), Privileged()]),
        ("without_demonstration", [Privileged("1"), Privileged(None, "b")]),
        ("always", [Privileged("1", "a"), Privileged(None, "b")]),
    ],
)
def test_feedback(mode, expected):
    groups = make_groups([False, True], feedback=["a", "b"])
    assert Reprompt(feedback=mode).choose(groups, RNG)[0] == expected


def test_blank_feedback_is_none():
    groups = make_groups([False, False], feedback=[" \n", "b"])
    chosen = Reprompt(feedback="always").choose(groups, RNG)[0]
    assert [bool(c) for c in chosen] == [False, True]


def test_thoughts_are_taken_out_before_anything_is_cut():
    groups = make_groups([False, True, False], feedback=["a", "b", "c"])
    mode = {"feedback": "without_demonstration"}
    for text, wanted in (
        ("<think>7 7</think> 49", "49"),
        ("<think>7 7</think>\n", None),
    ):
        thought = replace(groups, completions=(("0", text, "2"),))
        chosen = Reprompt(**mode).choose(thought, RNG)[0]
        assert chosen[0] == Privileged(wanted, None if wanted else "a")
        kept = Reprompt(remove_thinking=False, **mode).choose(thought, RNG)[0]
        assert kept[0] == Privileged(text)


def test_threshold_counts_rewards_not_successes():
    groups = make_groups([False, False])
    half = tuple(Verdict(r, False) for r in (0.6, 0.4))
    groups = replace(groups, verdicts=(half,))
    assert shown(Reprompt(success_threshold=0.5), groups) == [None, "0"]


def test_balanced_groups():
    groups = make_groups([True, False, False, False])
    weights = Reprompt(balance_groups=True).weights(groups)
    np.testing.assert_allclose(weights, np.sqrt(0.25 * 0.75), rtol=1e-6)
    np.testing.assert_array_equal(Reprompt().weights(groups), 1)


def test_wording_comes_from_the_config():
    recipe = recipes.make("sdpo", templates={"feedback": "\nbut: {feedback}"})
    assert recipe.reprompt.templates == Templates(feedback="\nbut: {feedback}")
    with pytest.raises(InputError, match="fedback"):
        recipes.make("sdpo", templates={"fedback": ""})


@pytest.mark.parametrize(
    "arguments",
    [
        {"demonstration": "best"},
        {"feedback": "sometimes"},
        {"demonstration": "none", "feedback": "never"},
    ],
)
def test_wrong_settings(arguments):
    with pytest.raises(ValueError, match="demonstration|feedback"):
        Reprompt(**arguments)
