"""HAPO's group transform on judged groups: who gives way, when, and what is said."""

from __future__ import annotations

import warnings
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from tiny_groups import make_demonstrations, make_groups

from jaxrl_post.injection import update_posterior
from jaxrl_post.recipes import Injection, recipe, with_injection
from jaxrl_post.recipes.grpo import grpo
from jaxrl_post.thresholds import ThresholdSchedule
from jaxrl_post.training.assembly import demonstrated_groups, make_batch

N = 8
ARRAYS = ("tokens", "mask", "sampler_logps", "stopped", "rewards", "judged")


def group_of(successes, size=N):
    return [1.0] * successes + [0.0] * (size - successes)


def inject(rewards, available=None, *, groups=None, **fields):
    groups = groups or make_groups(rewards)
    available = [True] * len(groups) if available is None else available
    groups = replace(groups, demonstrations=make_demonstrations(available))
    return Injection(**fields)(groups), groups


def replaced(new):
    """For each group, the rollouts whose text is the demonstration's."""
    return [
        [g for g, text in enumerate(row) if text == f"demonstration {p}"]
        for p, row in enumerate(new.completions)
    ]


@pytest.mark.parametrize(
    ("threshold", "fewest"), [(0.8, 7), (0.5, 4), (0.1 + 1e-9, 1), (0.9, 8)]
)
def test_the_gate_of_eq_6_for_every_number_of_successes(threshold, fewest):
    """Open iff (1 + S)/(2 + N) < gamma, strictly; the first failure gives way."""
    new, _ = inject([group_of(s) for s in range(N + 1)], threshold=threshold)
    due = [Fraction(1 + s, 2 + N) < Fraction(str(threshold)) for s in range(N + 1)]
    assert due == [s < fewest for s in range(N + 1)]
    assert replaced(new) == [[s] if due[s] else [] for s in range(N + 1)]
    np.testing.assert_array_equal(new.metrics["injection/rate"], due)


def test_everything_of_the_rollout_is_replaced_and_nothing_else():
    new, old = inject([group_of(2, 4), group_of(4, 4)])
    given = old.demonstrations
    for name in ARRAYS:
        ours, own = getattr(new, name), getattr(old, name)
        source = given.available if name == "judged" else getattr(given, name)
        np.testing.assert_array_equal(ours[0, 2], source[0], err_msg=name)
        for p, g in np.ndindex(2, 4):
            if (p, g) != (0, 2):
                np.testing.assert_array_equal(ours[p, g], own[p, g], err_msg=name)
        assert ours.dtype == own.dtype
    assert new.is_teacher.sum() == 3 and new.is_teacher[0, 2, :3].all()
    assert new.completions[0] == ("0", "1", "demonstration 0", "3")
    assert new.verdicts[0][2] is given.verdicts[0]
    assert new.verdicts[0][3] is old.verdicts[0][3]
    assert new.completions[1] == old.completions[1]
    assert old.is_teacher is None and old.rewards[0, 2] == 0  # not in place


def test_without_a_demonstration_a_group_stays_as_it_is():
    rng = np.random.default_rng(0)
    groups = make_groups([group_of(0), group_of(1)])
    logps = rng.normal(size=groups.sampler_logps.shape).astype(np.float32)
    groups = replace(groups, sampler_logps=logps)
    new, old = inject(None, [False, True], groups=groups)
    for name in ARRAYS:
        ours, own = getattr(new, name)[0], getattr(old, name)[0]
        assert ours.tobytes() == own.tobytes(), name
    assert not new.is_teacher[0].any()
    assert (new.completions[0], new.verdicts[0]) == (
        old.completions[0],
        old.verdicts[0],
    )
    assert new.metrics["injection/rate"].tolist() == [0, 1]


def test_successes_are_the_judges_and_those_before_injection():
    """Shaped rewards count nothing, and neither does the demonstration's own."""
    groups = make_groups([group_of(6), group_of(7)])
    shaped = replace(groups, rewards=groups.rewards - 5.0)
    new, _ = inject(None, groups=shaped)
    np.testing.assert_allclose(new.metrics["injection/confidence"], [0.7, 0.8])
    assert replaced(new) == [[6], []]
    assert new.extras["confidence"].dtype == np.float32
    np.testing.assert_allclose(
        new.extras["confidence"], np.repeat([[0.7], [0.8]], N, 1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("threshold", "successes"), [(1.0, 2), (0.5, 4), (0.25, 5), (0.0, 8)]
)
def test_partial_credit_counts_from_a_threshold_on(threshold, successes):
    rewards = [1.0, 1.0, 0.5, 0.5, 0.25, 0.0, 0.0, 0.0]
    new, _ = inject([rewards], success_threshold=threshold)
    confidence = (1 + successes) / (2 + N)
    np.testing.assert_allclose(new.metrics["injection/confidence"], confidence)
    # Whatever counts as a success: the lowest reward gives way, unless all do.
    assert replaced(new) == [[5] if successes < 7 else []]


def test_what_could_not_be_judged_is_a_failure_and_goes_first():
    new, _ = inject([[0.0, 1.0, None, 0.0], [None, None, None, None]])
    assert replaced(new) == [[2], [0]]
    assert new.judged.tolist() == [[True] * 4, [True, False, False, False]]
    np.testing.assert_allclose(new.metrics["injection/confidence"], [2 / 6, 1 / 6])
    # A judged failure is not worse than an unjudged one that a penalty has shaped.
    groups = make_groups([[0.0, None]])
    shaped = replace(groups, rewards=np.array([[-9.0, 0.0]], np.float32))
    assert replaced(inject(None, groups=shaped, threshold=0.7)[0]) == [[1]]


def test_ties():
    groups = make_groups([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]] * 200)
    first, _ = inject(None, groups=groups)
    assert replaced(first) == [[1]] * 200
    one, again, other = (
        replaced(inject(None, groups=replace(groups, seed=s), tie="random")[0])
        for s in (2**32 - 1, 2**32 - 1, 4)
    )
    assert one == again != other
    counts = np.bincount(np.ravel(one), minlength=6)
    assert counts[[0, 2]].tolist() == [0, 0]
    # 200 draws among four: 50 each, standard deviation 6.1.
    assert counts.sum() == 200 and (np.abs(counts[[1, 3, 4, 5]] - 50) < 25).all()


@pytest.mark.parametrize("gate", ["mean", "thompson"])
def test_a_group_of_successes_is_touched_only_if_told_to(gate):
    """True Thompson sampling opens the gate at any number: gamma^(N + 1) = 0.87^9."""
    groups = replace(make_groups([group_of(N)] * 300), seed=1)
    new, _ = inject(None, groups=groups, gate=gate, threshold=0.87)
    assert not new.is_teacher.any() and not new.metrics["injection/rate"].any()
    allowed = {"gate": gate, "replace_successes": True}
    high = {"threshold": 0.87 if gate == "thompson" else 0.95}
    new, _ = inject(None, groups=groups, **allowed, **high)
    rate = new.metrics["injection/rate"].mean()
    if gate == "mean":
        assert rate == 1 and replaced(new) == [[0]] * 300
    else:  # four standard errors
        assert abs(rate - 0.87 ** (N + 1)) < 4 * np.sqrt(0.29 * 0.71 / 300)


def test_the_draw_of_thompson_sampling():
    """P(Beta(1 + S, 1 + N - S) < gamma) = P(Binomial(N + 1, gamma) > S)."""
    count, gamma = 2000, 0.8
    for s in (2, 6):
        groups = replace(make_groups([group_of(s)] * count), seed=s)
        new, _ = inject(None, groups=groups, gate="thompson", threshold=gamma)
        chance = sum(
            comb(N + 1, k) * gamma**k * (1 - gamma) ** (N + 1 - k)
            for k in range(s + 1, N + 2)
        )
        rate = new.metrics["injection/rate"].mean()
        error = np.sqrt(chance * (1 - chance) / count)
        assert abs(rate - chance) < 4 * error + 1e-9
        same, _ = inject(None, groups=groups, gate="thompson", threshold=gamma)
        assert replaced(same) == replaced(new)


def test_luffys_takes_the_last_of_each_group_whatever_it_earned():
    always = {"gate": "always", "position": "last", "replace_successes": True}
    rewards = [group_of(0), group_of(N), [None] * N, group_of(3)]
    new, _ = inject(rewards, [True, True, True, False], **always)
    assert replaced(new) == [[7], [7], [7], []]
    assert "injection/probability" not in new.metrics  # no gate, no formula
    # Without the permission a group of successes stays, as everywhere.
    del always["replace_successes"]
    assert replaced(inject(rewards, **always)[0])[1] == []


def test_a_schedule_follows_the_progress():
    groups = make_groups([group_of(3)])  # c = 0.4
    schedule = ThresholdSchedule("annealed", 0.8)
    for progress, opens in ((0.0, True), (0.49, True), (0.5, False), (0.9, False)):
        here = replace(groups, progress=progress)
        new, _ = inject(None, groups=here, threshold=schedule)
        assert bool(new.metrics["injection/rate"][0]) == opens


def test_thresholds_that_contradict_the_group_size():
    with pytest.raises(ValueError, match="replace_successes=true") as error:
        inject([group_of(2)], threshold=0.95)
    assert "(N + 2) = 0.9 for group_size=8" in str(error.value)
    with pytest.warns(UserWarning, match="nothing will ever be injected"):
        new, _ = inject([group_of(0)], threshold=0.1)
    assert replaced(new) == [[]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Injection(threshold=0.9).check_group_size(8)
        Injection(threshold=0.95).check_group_size(18)
        Injection(threshold=0.95, replace_successes=True).check_group_size(8)
        Injection(threshold=0.95, gate="thompson").check_group_size(8)
        Injection(threshold={"kind": "annealed"}).check_group_size(8)


def test_what_earlier_visits_showed_moves_the_gate_and_comes_out():
    """Ten past successes: c = (1 + 10 + 4)/(2 + 10 + 8), above 0.7."""
    groups = make_groups([group_of(4), group_of(4)])
    prior = np.array([[11.0, 1.0], [1.0, 1.0]])
    new, _ = inject(None, groups=replace(groups, posterior=prior), threshold=0.7)
    assert new.posterior.dtype == np.float64
    np.testing.assert_array_equal(new.posterior, [[15.0, 5.0], [5.0, 5.0]])
    np.testing.assert_array_equal(
        new.posterior, update_posterior(prior, [4, 4], N, discount=1.0)
    )
    np.testing.assert_allclose(new.metrics["injection/confidence"], [0.75, 0.5])
    assert replaced(new) == [[], [4]]
    assert prior.tolist() == [[11.0, 1.0], [1.0, 1.0]]
    forgetful, _ = inject(None, groups=groups, threshold=0.7)
    assert forgetful.posterior is None and replaced(forgetful) == [[4], [4]]


def test_metrics():
    rewards = [group_of(s) for s in (0, 0, 3, 7, 8, 0)]
    new, _ = inject(rewards, [True, True, True, True, True, False])
    metrics = {name: x.mean() for name, x in new.metrics.items()}
    confidence = np.array([1, 1, 4, 8, 9, 1]) / 10
    np.testing.assert_allclose(metrics["injection/rate"], 3 / 6)
    np.testing.assert_allclose(metrics["injection/confidence"], confidence.mean())
    # After injection only the solved group and the one left alone are without spread.
    np.testing.assert_allclose(metrics["injection/zero_std_groups"], 2 / 6)
    # The formula at the rate that was measured, 18 of 48.
    mu = 18 / 48
    chance = sum(comb(N, s) * mu**s * (1 - mu) ** (N - s) for s in range(7))
    np.testing.assert_allclose(metrics["injection/probability"], chance, rtol=1e-12)
    bins = [metrics[f"injection/confidence_bins/{i / 10:.1f}"] for i in range(10)]
    expected = [0, 3 / 6, 0, 0, 1 / 6, 0, 0, 0, 1 / 6, 1 / 6]
    np.testing.assert_allclose(bins, expected)


def test_other_transforms_metrics_and_extras_stay():
    groups = make_groups([group_of(1)])
    mine = {"extras": {"x": np.ones((1, N))}, "metrics": {"y": np.ones(1)}}
    new, _ = inject(None, groups=replace(groups, **mine))
    assert {"x", "confidence"} == new.extras.keys() and "y" in new.metrics


@pytest.mark.parametrize("successes", range(8))
@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_are_of_the_group_after_injection(successes, ddof):
    """(R - mean)/std with S + 1 successes; at S = 7 the gate is closed."""
    new, _ = inject([group_of(successes)])
    wins = successes + (successes < 7)
    mean = wins / N
    std = np.sqrt(mean * (1 - mean) * N / (N - ddof))
    behind = with_injection(grpo(ddof=ddof))
    batch = make_batch(new, behind, count=1, context_limit=8)
    expected = (new.rewards[0] - mean) / std
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4)
    table = {0: 2.646, 1: 1.732, 2: 1.291, 3: 1.0, 4: 0.775, 5: 0.577, 6: 0.378}
    if ddof == 0 and successes < 7:
        assert round(float(batch.advantages[successes]), 3) == table[successes]
    assert batch.is_teacher.any(1).tolist() == [
        g == successes and successes < 7 for g in range(N)
    ]
    np.testing.assert_allclose(batch.extras["confidence"], (1 + successes) / (2 + N))


def test_a_demonstration_alone_is_a_group():
    given = make_demonstrations([True, False], length=4)
    prompts = make_groups([[0.0]] * 2).prompts
    context = np.ones((2, 4), np.int32)
    groups = demonstrated_groups(prompts, context, context > 0, given)
    assert groups.rewards.tolist() == [[1.0], [0.25]]
    assert groups.judged.tolist() == [[True], [False]]
    assert groups.completions == (("demonstration 0",), ("demonstration 1",))
    assert groups.verdicts[1][0].reward is None
    sft = recipe.Recipe("x", grpo().terms)
    batch = make_batch(groups, sft, count=3, context_limit=8)
    # What is not available and what fills up are attended to, and trained on nowhere.
    assert batch.loss_mask.sum(1).tolist() == [4, 0, 0]
    assert batch.is_teacher.sum() == 4 and batch.sequence_mask.tolist() == [1, 1, 0]


def test_demonstrations_must_be_there():
    with pytest.raises(ValueError, match="demonstrations=True"):
        Injection()(make_groups([group_of(1)]))
