from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.information import information_gain, step_multiplier
from jaxrl_post.reduction import Reduction

STUDENT = np.array([[2.0, 1.0, np.nan], [3.0, np.inf, 1.0], [9.0, 9.0, 9.0]])
TEACHER = np.array([[1.0, 0.5, 7.0], [1.0, np.nan, -np.inf], [1.0, 1.0, 1.0]])
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
