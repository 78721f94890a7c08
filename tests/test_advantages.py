from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.advantages import group_relative, overlong_penalty
from jaxrl_post.losses import presets


def first(rewards, **options):
    return float(group_relative(jnp.array([rewards], jnp.float32), **options)[0, 0])


@pytest.mark.parametrize(
    ("library", "value"), [("verl", 0.8660239), ("trl", 0.8658754)]
)
def test_what_the_libraries_give_for_two_of_four(library, value):
    options = presets.ADVANTAGES[library]
    with jax.enable_x64(True):
        found = group_relative(np.array([[1, 0, 0, 1]]), **options)[0]
    assert found.dtype == np.float64  # whole numbers have the default precision
    np.testing.assert_allclose(found, np.array([1, -1, -1, 1]) * value, atol=5e-8)


def test_measured_values_of_other_estimators():
    """The first advantage of [1, 0, .5, 1], as measured in verl."""
    rewards = [1.0, 0.0, 0.5, 1.0]
    verl = first(rewards, **presets.ADVANTAGES["verl"])
    assert verl == pytest.approx(0.7833, abs=5e-5)
    assert first(rewards, scale="none") == pytest.approx(0.375)
    assert first(rewards, scale="none", leave_one_out=True) == pytest.approx(0.5)


@pytest.mark.parametrize("library", presets.ADVANTAGES)
def test_presets_by_their_own_formula(library):
    options = presets.ADVANTAGES[library]
    rewards = np.array([1.0, 0.25, 0.5, 1.0])
    ddof, eps = options.get("ddof", 0), options.get("eps", 0)
    expected = []
    for i, reward in enumerate(rewards):
        base = np.delete(rewards, i) if "leave_one_out" in options else rewards
        scale = base.std(ddof=ddof) + eps if options["scale"] == "std" else 1.0
        expected.append((reward - base.mean()) / scale)
    with jax.enable_x64(True):
        found = group_relative(rewards[None], **options)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8, -0.7])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_give_exactly_zero(value, size):
    rewards = jnp.full((2, size), value).at[1, 0].add(1.0)
    for scale in ("std", "none", "batch"):
        for leave_one_out in (False, True):
            for eps in (0.0, 1e-6):
                found = group_relative(
                    rewards, scale=scale, leave_one_out=leave_one_out, eps=eps
                )
                assert np.all(np.asarray(found[0]) == 0.0)
                assert np.all(np.isfinite(found))


def test_one_different_reward_under_leave_one_out_stays_undivided():
    found = group_relative([[1.0, 0.1, 0.1, 0.1]], leave_one_out=True)[0]
    np.testing.assert_allclose(found[0], 0.9, rtol=1e-6)
    others = np.array([1.0, 0.1, 0.1])
    expected = (0.1 - others.mean()) / (others.std() + 1e-6)
    np.testing.assert_allclose(found[1:], [expected] * 3, rtol=1e-5)


def test_batch_scale_uses_every_valid_reward():
    rewards = np.array([[1.0, 0.0, 0.5], [1.0, 1.0, np.nan]])
    where = ~np.isnan(rewards)
    std = rewards[where].std(ddof=1)
    found = group_relative(rewards, scale="batch", ddof=1, eps=0.0, where=where)
    np.testing.assert_allclose(found[0], (rewards[0] - 0.5) / std, atol=1e-6)
    np.testing.assert_array_equal(found[1], np.zeros(3))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_unjudged_rollouts_are_as_if_absent(leave_one_out):
    rewards = np.array([[1.0, np.nan, 0.0, 0.25], [np.nan, 0.1, np.nan, np.nan]])
    where = ~np.isnan(rewards)
    found = group_relative(rewards, where=where, leave_one_out=leave_one_out)
    alone = group_relative(rewards[:1, [0, 2, 3]], leave_one_out=leave_one_out)
    np.testing.assert_allclose(found[0, [0, 2, 3]], alone[0], rtol=1e-6)
    assert float(found[0, 1]) == 0.0
    np.testing.assert_array_equal(found[1], np.zeros(4))


def test_advantages_after_an_injection():
    """S successes before it, the worst replaced by a success; population std."""
    plus = [2.646, 1.732, 1.291, 1.0, 0.775, 0.577, 0.378]
    minus = [-0.378, -0.577, -0.775, -1.0, -1.291, -1.732, -2.646]
    for successes, (up, down) in enumerate(zip(plus, minus, strict=True)):
        rewards = (np.arange(8) <= successes)[None].astype(np.float32)
        found = group_relative(rewards)[0]
        np.testing.assert_allclose((found[0], found[7]), (up, down), atol=6e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=4, max_size=4), st.permutations(range(4)))
def test_invariants(numbers, order):
    rewards = np.array([numbers], np.float32) / 4
    found = np.asarray(group_relative(rewards))
    np.testing.assert_allclose(found.sum(), 0.0, atol=1e-5)
    permuted = group_relative(rewards[:, order])
    np.testing.assert_allclose(permuted, found[:, order], atol=1e-5)
    scaled = group_relative(4 * rewards + 2, eps=0.0)
    np.testing.assert_allclose(scaled, group_relative(rewards, eps=0.0), atol=1e-5)


def test_jit_half_precision_and_no_gradient():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    half = jax.jit(group_relative)(rewards.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    gradient = jax.grad(lambda r: (group_relative(r) * r).sum())(rewards)
    np.testing.assert_allclose(gradient, group_relative(rewards))


def test_bad_arguments():
    rewards = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="scale='group' is not one of"):
        group_relative(rewards, scale="group")
    with pytest.raises(ValueError, match="ddof=-1 is not in"):
        group_relative(rewards, ddof=-1)
    with pytest.raises(AssertionError, match="rank"):
        group_relative(jnp.zeros(4))


def test_overlong_penalty():
    lengths = [0, 16384, 18432, 20480, 30000]
    found = overlong_penalty(lengths, max_length=20480, buffer=4096)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])
    doubled = overlong_penalty(lengths, max_length=20480, buffer=4096, penalty=2.0)
    np.testing.assert_allclose(doubled, 2 * found)
    with pytest.raises(ValueError, match="buffer=30 is not in"):
        overlong_penalty(lengths, max_length=20, buffer=30)
