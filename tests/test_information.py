from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.information import (
    AdaptiveSensitivity,
    information_gain,
    local_multipliers,
    step_multiplier,
)
from jaxrl_post.reduction import Reduction

STUDENT = np.array([[2.0, 1.0, np.nan], [3.0, np.inf, 1.0], [9.0, 9.0, 9.0]])
TEACHER = np.array([[1.0, 0.5, 7.0], [1.0, np.nan, -np.inf], [1.0, 1.0, 1.0]])
ALPHA = {"sensitivity": 1.0, "max_multiplier": 9.0}
MASK = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("average", "gain"),
    [
        ("sequence", (0.75 + 2.0) / 2),
        ("token", 3.5 / 3),
        ("sum", (1.5 + 2.0) / 2),
    ],
)
def test_gain_by_hand(average, gain):
    """Samples without feedback are masked: they are not in the mean at all."""
    found = information_gain(STUDENT, TEACHER, MASK, average=average)
    assert isinstance(found, Reduction)
    np.testing.assert_allclose(found.mean(), gain, rtol=1e-6)
    halves = information_gain(STUDENT[:1], TEACHER[:1], MASK[:1], average=average)
    halves += information_gain(STUDENT[1:], TEACHER[1:], MASK[1:], average=average)
    np.testing.assert_allclose(halves.mean(), gain, rtol=1e-6)


def test_nothing_to_learn_from_gives_no_gain_and_multiplier_one():
    gain = information_gain(STUDENT, TEACHER, np.zeros((3, 3))).mean()
    assert float(gain) == 0.0
    assert float(step_multiplier(gain, sensitivity=1.5, max_multiplier=2.0)) == 1.0


def test_gain_carries_no_gradient():
    gradient = jax.grad(lambda s, t: information_gain(s, t, MASK).mean(), (0, 1))(
        jnp.ones((3, 3)), jnp.zeros((3, 3))
    )
    assert not np.any(gradient[0]) and not np.any(gradient[1])


@jax.jit
def traced(gains, sensitivity, cap, floor):
    return step_multiplier(
        gains, sensitivity=sensitivity, max_multiplier=cap, min_multiplier=floor
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=2),
    st.floats(0, 3),
    st.floats(1, 5),
    st.floats(0, 1),
)
def test_bounded_and_lipschitz(gains, sensitivity, cap, floor):
    with jax.enable_x64(True):
        low, high = jax.device_get(traced(np.array(gains), sensitivity, cap, floor))
    assert floor <= low <= cap and 0 < high <= cap
    slope = sensitivity * cap
    assert abs(high - low) <= slope * abs(gains[1] - gains[0]) + 1e-9


def test_multiplier_values():
    def rho(gain, **options):
        options = {"sensitivity": 1.5, "max_multiplier": 2.0} | options
        return float(step_multiplier(gain, **options))

    np.testing.assert_allclose(rho(0.2), np.exp(0.3), rtol=1e-6)
    np.testing.assert_allclose(rho(-1.0), np.exp(-1.5), rtol=1e-6)
    assert rho(1.0) == rho(1e30) == 2.0
    assert rho(-1.0, min_multiplier=1.0) == 1.0
    assert rho(-1e30) == 0.0
    assert rho(7.0, sensitivity=0.0) == 1.0
    assert [rho(bad) for bad in (jnp.nan, jnp.inf, -jnp.inf)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": -1.0}, "sensitivity=-1.0 is not in"),
        ({"max_multiplier": 0.5}, "max_multiplier=0.5 is not in"),
        ({"min_multiplier": 1.5}, "min_multiplier=1.5 is not in"),
    ],
)
def test_bad_hyper_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        step_multiplier(0.0, **({"sensitivity": 1.0, "max_multiplier": 2.0} | options))


def test_unknown_average():
    with pytest.raises(ValueError, match="average='prompt' is not one of"):
        information_gain(STUDENT, TEACHER, MASK, average="prompt")


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_local_multipliers_against_numpy(level):
    rng = np.random.default_rng(0)
    student, teacher = rng.uniform(0, 3, (2, 40, 7))
    mask = rng.random((40, 7)) < 0.6
    mask[0] = False
    gain = np.where(mask, student - teacher, 0.0)
    if level == "sequence":
        gain = gain.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
    expected = np.where(mask, np.clip(np.exp(1.3 * gain), 0.4, 2.5), 1.0)
    capped, floored = ((expected[mask] == bound).mean() for bound in (2.5, 0.4))
    assert 0 < capped < 0.5 and 0 < floored < 0.5
    garbage = rng.choice([np.nan, np.inf, -np.inf], mask.shape)
    with jax.enable_x64(True):
        found = local_multipliers(
            np.where(mask, student, garbage),
            np.where(mask, teacher, garbage.T.reshape(mask.shape)),
            mask,
            level=level,
            sensitivity=1.3,
            max_multiplier=2.5,
            min_multiplier=0.4,
        )
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_local_multipliers_of_gains_that_are_not_finite_are_one():
    """A token's own, or its whole sequence's; other sequences are not touched."""
    student = jnp.array([[1.0, jnp.nan, 1.0], [2.0, 1.0, jnp.inf]])
    mask = [[1, 1, 1], [1, 1, 0]]
    e = np.exp([1.0, 2.0, 1.5]).tolist()
    for level, expected in (
        ("token", [[e[0], 1.0, e[0]], [e[1], e[0], 1.0]]),
        ("sequence", [[1.0, 1.0, 1.0], [e[2], e[2], 1.0]]),
    ):
        found = local_multipliers(
            student, jnp.zeros((2, 3)), mask, level=level, **ALPHA
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_local_multipliers_carry_no_gradient():
    def total(student):
        return local_multipliers(
            student, jnp.zeros((1, 2)), [[1, 1]], level="token", **ALPHA
        ).sum()

    assert not np.any(jax.grad(total)(jnp.ones((1, 2))))
    with pytest.raises(ValueError, match="level='group' is not one of"):
        local_multipliers([[1.0]], [[1.0]], [[1]], level="group", **ALPHA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target=1.0 is not in"),
        ({"quantile": 1.0}, "quantile=1.0 is not in"),
        ({"rate": 0.0}, "rate=0.0 is not in"),
        ({"max_sensitivity": 0.0}, "max_sensitivity=0.0 is not in"),
    ],
)
def test_bad_adaptation(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSensitivity(**options)
