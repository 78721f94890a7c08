from __future__ import annotations

from fractions import Fraction
from math import ceil, comb, exp

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.injection import (
    confidence,
    inject,
    injection_probability,
    should_inject,
)

# Thresholds that some S hits exactly, where S < gamma (2 + N) - 1 in floating point
# gives the wrong answer.
EDGES = [(0.8, 8, 7), (0.14, 48, 6), (0.28, 23, 6), (0.56, 23, 13), (0.1, 8, 0)]


def test_confidence_is_the_posterior_mean():
    found = confidence(jnp.arange(9), 8)
    np.testing.assert_allclose(found, np.arange(1, 10) / 10, rtol=1e-7)
    assert float(confidence(jnp.array(7.0), 8)) == np.float32(0.8)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("threshold", "size", "successes"), EDGES)
def test_gate_is_strict_at_its_edge(threshold, size, successes, x64):
    around = np.maximum([successes - 1, successes, successes + 1], 0)
    expected = [successes > 0, False, False]
    with jax.enable_x64(x64):
        static = should_inject(around, size, threshold=threshold)
        traced = jax.jit(lambda s, t: should_inject(s, size, threshold=t))(
            around, threshold
        )
    assert static.tolist() == traced.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 999))
def test_static_gate_equals_exact_arithmetic(size, thousandths):
    successes = np.arange(size + 1)
    exact = [
        Fraction(int(s) + 1, size + 2) < Fraction(thousandths, 1000) for s in successes
    ]
    found = should_inject(successes, size, threshold=thousandths / 1000)
    assert np.asarray(found).tolist() == exact


def test_limits_of_the_threshold():
    successes = np.arange(9)
    assert should_inject(successes, 8, threshold=0.91).all()  # all-success groups too
    assert not should_inject(successes, 8, threshold=0.1).any()
    assert not should_inject(successes, 8, threshold=-1).any()


def test_injection_probability_table():
    rates = [0, 0.25, 0.5, 0.7, 0.8, 0.875, 0.9, 0.95, 0.99]
    printed = [1, 0.9996, 0.9648, 0.7447, 0.4967, 0.2637, 0.1869, 0.0572, 0.0027]
    found = injection_probability(rates, 8, threshold=0.8)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, printed, atol=5.1e-5)
    assert injection_probability(1.0, 8, threshold=0.8) == 0.0
    assert injection_probability(0.5, 8, threshold=0.95) == pytest.approx(1.0)
    assert injection_probability(0.5, 8, threshold=0.1) == 0.0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(5, 95), st.floats(0, 1))
def test_probability_is_exact_and_bounded(size, percent, rate):
    threshold = percent / 100
    closed = ceil(Fraction(percent, 100) * (2 + size) - 1)
    p = Fraction(rate)
    exact = sum(
        comb(size, s) * p**s * (1 - p) ** (size - s)
        for s in range(min(max(closed, 0), size + 1))
    )
    found = float(injection_probability(rate, size, threshold=threshold))
    assert found == pytest.approx(float(exact), rel=1e-11, abs=1e-300)
    if closed >= 1 and rate >= (closed - 1) / size:  # the provable Hoeffding form
        assert found <= exp(-2 * size * (rate - (closed - 1) / size) ** 2) + 1e-12


def test_the_papers_bound_fails_where_the_gate_is_always_open():
    """Eq. 11 claims P <= exp(-2N (mu - gamma)^2); at gamma > (N+1)/(N+2), P is 1."""
    found = float(injection_probability(1.0, 2, threshold=0.9))
    assert found == 1.0 > np.exp(-2 * 2 * (1.0 - 0.9) ** 2)


def group_of(rewards):
    rewards = jnp.asarray(rewards, jnp.float32)
    tokens = jnp.arange(rewards.size * 3).reshape(*rewards.shape, 3)
    return {"rewards": rewards, "response": (tokens, tokens > 4)}


def teacher_of(prompts):
    tokens = -1 - jnp.arange(prompts * 3).reshape(prompts, 3)
    return {"rewards": jnp.ones(prompts), "response": (tokens, tokens < -1)}


def test_replaces_the_first_worst_where_open_and_available():
    rewards = [[1.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.0, 1.0, 1.0], [1.0, 0.5, 1.0]]
    group, teacher = group_of(rewards), teacher_of(4)
    gate, available = jnp.array([1, 0, 1, 1], bool), jnp.array([1, 1, 0, 1], bool)
    new, is_teacher = jax.jit(inject)(
        group, teacher, gate=gate, available=available, scores=group["rewards"]
    )
    expected = np.zeros((4, 3), bool)
    expected[0, 1] = expected[3, 1] = True
    np.testing.assert_array_equal(is_teacher, expected)
    for i in range(4):
        for j in range(3):
            source = jax.tree.map(
                lambda g, t, i=i, j=j: t[i] if expected[i, j] else g[i, j],
                group,
                teacher,
            )
            jax.tree.map(
                lambda leaf, s, i=i, j=j: np.testing.assert_array_equal(leaf[i, j], s),
                new,
                source,
            )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), group
    )


def test_rows_without_a_teacher_may_hold_anything():
    group = {"rewards": jnp.zeros((1, 2))}
    new, is_teacher = inject(
        group,
        {"rewards": jnp.array([jnp.nan])},
        gate=jnp.array([True]),
        available=jnp.array([False]),
        scores=group["rewards"],
    )
    np.testing.assert_array_equal(new["rewards"], group["rewards"])
    assert not is_teacher.any()


def test_equation_to_the_letter_replaces_a_success_of_a_solved_group():
    group = {"rewards": jnp.ones((1, 3))}
    _, is_teacher = inject(
        group,
        {"rewards": jnp.ones(1)},
        gate=jnp.array([True]),
        available=jnp.array([True]),
        scores=group["rewards"],
    )
    assert is_teacher.tolist() == [[True, False, False]]


def test_unjudged_rollouts_go_first():
    scores = jnp.array([[0.0, -jnp.inf, 0.0]])
    _, is_teacher = inject(
        {"x": jnp.zeros((1, 3))},
        {"x": jnp.ones(1)},
        gate=jnp.array([True]),
        available=jnp.array([True]),
        scores=scores,
    )
    assert is_teacher.tolist() == [[False, True, False]]


def test_random_ties_are_uniform_over_the_worst_only():
    scores = jnp.tile(jnp.array([[0.0, 1.0, 0.0, 0.0]]), (600, 1))
    everywhere = jnp.ones(600, bool)
    _, is_teacher = inject(
        {"x": scores},
        {"x": jnp.ones(600)},
        gate=everywhere,
        available=everywhere,
        scores=scores,
        tie="random",
        key=jax.random.key(0),
    )
    assert (is_teacher.sum(-1) == 1).all()
    shares = is_teacher.mean(0)
    assert float(shares[1]) == 0.0
    np.testing.assert_allclose(shares[jnp.array([0, 2, 3])], [1 / 3] * 3, atol=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie": "last"}, "tie='last' is not one of first, random"),
        ({"tie": "random"}, "needs a PRNG key"),
        ({"teacher": {"x": jnp.ones((1, 2))}}, r"leaf \['x'\] has shape \(1, 3\)"),
        ({"teacher": {"y": jnp.ones(1)}}, "x"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {
        "group": {"x": jnp.zeros((1, 3))},
        "teacher": {"x": jnp.ones(1)},
        "gate": jnp.array([True]),
        "available": jnp.array([True]),
        "scores": jnp.zeros((1, 3)),
    } | changes
    with pytest.raises(ValueError, match=message):
        inject(**arguments)


def test_bad_numbers():
    with pytest.raises(ValueError, match="group_size=0"):
        confidence(jnp.array([0]), 0)
    with pytest.raises(ValueError, match="success_rate=1.5 is not in"):
        injection_probability(1.5, 8, threshold=0.8)
