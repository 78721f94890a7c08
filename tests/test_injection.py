from __future__ import annotations

from fractions import Fraction
from math import ceil, comb, exp

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.advantages import group_relative
from jaxrl_post.injection import (
    confidence,
    inject,
    injection_probability,
    posterior_mean,
    sample_confidence,
    should_inject,
    update_posterior,
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


def test_bounds_over_a_grid():
    """Eq. 11, P <= exp(-2N (mu - gamma)^2), fails exactly where the gate never shuts.

    There, at gamma > (N + 1)/(N + 2), P is 1 and it fails at every mu > gamma. The
    provable form, with (k - 1)/N in the place of gamma, holds everywhere.
    """
    rates = np.linspace(0, 1, 81)
    for size in range(2, 65):
        for percent in range(5, 100, 5):
            closed = ceil(Fraction(percent, 100) * (2 + size) - 1)
            found = injection_probability(rates, size, threshold=percent / 100)

            def bound(centre, size=size):
                return np.exp(-2 * size * (rates - centre) ** 2)

            holds = found <= bound(percent / 100) + 1e-12
            above = rates > percent / 100 + 1e-9
            always_open = percent * (size + 2) > 100 * (size + 1)
            assert (~holds if always_open else holds)[above].all(), (size, percent)
            if closed >= 1:
                provable = found <= bound((closed - 1) / size) + 1e-12
                assert provable[rates >= (closed - 1) / size].all(), (size, percent)


def test_bounds_at_the_papers_settings():
    found = float(injection_probability(0.9, 8, threshold=0.8))
    printed, provable = exp(-2 * 8 * 0.1**2), exp(-2 * 8 * (0.9 - 6 / 8) ** 2)
    np.testing.assert_allclose(
        [found, printed, provable], [0.1869, 0.8521, 0.6977], atol=5.1e-5
    )


def test_thompson_probability_is_the_beta_integral():
    """Of the density, by Simpson's rule, and the specification's table."""
    rates, size, threshold = [0.5, 0.8, 0.9, 0.95, 1.0], 8, 0.8
    x = np.linspace(0, threshold, 2001)
    weights = np.where(np.arange(2001) % 2, 4.0, 2.0) * (x[1] / 3)
    weights[[0, -1]] = x[1] / 3
    expected = np.zeros(5)
    for s in range(size + 1):
        density = (size + 1) * comb(size, s) * x**s * (1 - x) ** (size - s)
        chance = [comb(size, s) * r**s * (1 - r) ** (size - s) for r in rates]
        expected += np.array(chance) * (weights @ density)
    found = injection_probability(rates, size, threshold=threshold, sampled=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(
        found, [0.9256, 0.5752, 0.3697, 0.2542, 0.1342], atol=5.1e-5
    )
    assert found[-1] == pytest.approx(threshold ** (size + 1))


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.0])
def test_thompson_sampling_opens_as_often(rate):
    rng, visits = np.random.default_rng(0), 200_000
    successes = rng.binomial(8, rate, visits)
    drawn = sample_confidence(update_posterior(np.ones((visits, 2)), successes, 8), rng)
    expected = float(injection_probability(rate, 8, threshold=0.8, sampled=True))
    error = np.sqrt(expected * (1 - expected) / visits)
    assert abs((drawn < 0.8).mean() - expected) < 4 * error


def test_thompson_draws_have_the_posteriors_mean_and_spread():
    posterior = np.array([[2.5, 7.0], [9.0, 1.0]])
    rows = np.repeat(posterior, 100_000, 0)
    drawn = sample_confidence(rows, np.random.default_rng(1)).reshape(2, -1)
    mean = posterior_mean(posterior)
    variance = mean * (1 - mean) / (posterior.sum(-1) + 1)
    np.testing.assert_allclose(drawn.mean(-1), mean, atol=2e-3)
    np.testing.assert_allclose(drawn.var(-1), variance, rtol=0.02)
    again = sample_confidence(rows, np.random.default_rng(1)).reshape(2, -1)
    np.testing.assert_array_equal(again, drawn)


def test_a_first_visit_gives_the_papers_confidence():
    successes = np.arange(9)
    for discount in (0.0, 0.5, 1.0):
        first = update_posterior(np.ones((9, 2)), successes, 8, discount=discount)
        np.testing.assert_array_equal(
            first, np.stack([1 + successes, 9 - successes], -1)
        )
    np.testing.assert_allclose(posterior_mean(first), confidence(successes, 8))
    for threshold, size, edge in EDGES:  # as exact on the host as the static gate
        around = np.arange(size + 1)
        posterior = update_posterior(np.ones((size + 1, 2)), around, size)
        gate = posterior_mean(posterior) < threshold
        assert gate.tolist() == (around < edge).tolist()


def test_discount_zero_forgets_and_one_adds_up():
    seen = np.array([[3.0, 15.0]])
    kept = update_posterior(seen, [5], 8)
    np.testing.assert_array_equal(kept, [[8.0, 18.0]])
    forgotten = update_posterior(seen, [5], 8, discount=0.0)
    np.testing.assert_array_equal(forgotten, [[6.0, 4.0]])
    faded = update_posterior(seen, [5], 8, discount=0.9)
    np.testing.assert_allclose(faded, [[1 + 0.9 * 2 + 5, 1 + 0.9 * 14 + 3]])
    assert faded.dtype == np.float64


def test_a_remembered_posterior_by_dynamic_programming():
    """Every reachable posterior and its chance, visit by visit, at mu = 0.9."""
    printed = {1: 0.1869, 2: 0.2108, 3: 0.0851, 4: 0.0944, 5: 0.0419}
    printed |= {10: 0.0053, 20: 0.0001}
    outcomes = np.arange(9)
    chances = np.array([comb(8, s) * 0.9**s * 0.1 ** (8 - s) for s in outcomes])
    states, weights = np.ones((1, 2)), np.ones(1)
    for visit in range(1, 21):
        states = update_posterior(
            np.repeat(states, 9, 0), np.tile(outcomes, len(states)), 8
        )
        states, index = np.unique(states, axis=0, return_inverse=True)
        weights = np.bincount(index.ravel(), np.outer(weights, chances).ravel())
        opens = weights[posterior_mean(states) < 0.8].sum()
        if visit in printed:
            assert opens == pytest.approx(printed[visit], abs=5.1e-5)
        # All visits together are one group of 8 times as many rollouts.
        together = injection_probability(0.9, 8 * visit, threshold=0.8)
        assert opens == pytest.approx(float(together), rel=1e-9)


@pytest.mark.parametrize(("discount", "level"), [(0.9, 4e-4), (0.5, 0.156)])
def test_a_discounted_posterior_levels_off(discount, level):
    """At mu = 0.9, after enough visits that the start is forgotten."""
    rng, paths = np.random.default_rng(0), 400_000
    posterior = np.ones((paths, 2))
    for _ in range(round(8 / (1 - discount))):
        posterior = update_posterior(
            posterior, rng.binomial(8, 0.9, paths), 8, discount=discount
        )
    found = (posterior_mean(posterior) < 0.8).mean()
    error = np.sqrt(level / paths)
    # Four standard errors, and the figure's own rounding.
    assert abs(found - level) < 4 * error + (5e-5 if discount == 0.9 else 5e-4)


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


def test_other_rows_stay_bitwise():
    """Odd bits included: NaN payloads, negative zeros, the smallest numbers."""
    bits = np.array([[0x7FC0_0123, 0x8000_0000, 1, 0xFF80_0000]], np.uint32)
    floats = jnp.asarray(bits.view(np.float32))
    new, is_teacher = inject(
        {"x": floats},
        {"x": jnp.ones(1)},
        gate=jnp.array([True]),
        available=jnp.array([True]),
        scores=jnp.array([[1.0, 0.0, 1.0, 1.0]]),
    )
    assert is_teacher.tolist() == [[False, True, False, False]]
    after = np.asarray(new["x"]).view(np.uint32)
    np.testing.assert_array_equal(after[0, [0, 2, 3]], bits[0, [0, 2, 3]])


def test_under_vmap_as_one_by_one():
    """Over seeds, say: an axis before the prompts'."""
    rewards = jnp.array([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]]])
    teacher = jnp.ones((3, 1))

    def one(rewards, teacher):
        gate = should_inject(rewards.sum(-1), 3, threshold=0.8)
        return inject(
            {"r": rewards},
            {"r": teacher},
            gate=gate,
            available=jnp.ones(1, bool),
            scores=rewards,
        )

    new, is_teacher = jax.jit(jax.vmap(one))(rewards, teacher)
    for i in range(3):
        alone, mask = one(rewards[i], teacher[i])
        np.testing.assert_array_equal(new["r"][i], alone["r"])
        np.testing.assert_array_equal(is_teacher[i], mask)
    assert is_teacher.sum((1, 2)).tolist() == [1, 1, 0]


# By successes before it, N = 8, gamma = 0.8: of the successes and of the failures.
AFTER_INJECTION = {
    "population": (
        {},
        [2.646, 1.732, 1.291, 1.0, 0.775, 0.577, 0.378],
        [-0.378, -0.577, -0.775, -1.0, -1.291, -1.732, -2.646],
    ),
    "sample": (
        {"ddof": 1},
        [2.475, 1.620, 1.208, 0.935, 0.725, 0.540, 0.354],
        [-0.354, -0.540, -0.725, -0.935, -1.208, -1.620, -2.475],
    ),
    "none": (
        {"scale": "none"},
        [1 - (s + 1) / 8 for s in range(7)],
        [-(s + 1) / 8 for s in range(7)],
    ),
}


@pytest.mark.parametrize("std", AFTER_INJECTION)
def test_advantages_after_injection(std):
    settings_of, successful, failed = AFTER_INJECTION[std]
    rewards = jnp.asarray((np.arange(8) < np.arange(9)[:, None]).astype(np.float32))
    gate = should_inject(rewards.sum(-1), 8, threshold=0.8)
    new, is_teacher = inject(
        {"rewards": rewards},
        {"rewards": jnp.ones(9)},
        gate=gate,
        available=jnp.ones(9, bool),
        scores=rewards,
    )
    assert is_teacher.sum(-1).tolist() == [1] * 7 + [0, 0]
    np.testing.assert_array_equal(new["rewards"][7:], rewards[7:])
    advantages = np.asarray(group_relative(new["rewards"], **settings_of))
    for s in range(7):
        won = np.arange(8) <= s  # the first failure, at s, is the teacher's now
        assert bool(is_teacher[s, s])
        np.testing.assert_allclose(advantages[s, won], successful[s], atol=6e-4)
        np.testing.assert_allclose(advantages[s, ~won], failed[s], atol=6e-4)


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
    with pytest.raises(ValueError, match="threshold=1.5 is not in"):
        injection_probability(0.5, 8, threshold=1.5, sampled=True)
    with pytest.raises(ValueError, match="discount=1.1 is not in"):
        update_posterior(np.ones((1, 2)), [1], 8, discount=1.1)
    with pytest.raises(ValueError, match=r"successes=\[9\] are not all in \[0, 8\]"):
        update_posterior(np.ones((1, 2)), [9], 8)
