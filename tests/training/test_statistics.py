"""avg@k, pass@k, maj@k and their intervals, against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_post.training import statistics


def test_avg_leaves_out_what_was_not_judged():
    successes = [[1, 0, None, None], [None] * 4, [0, 0, 0, 1]]
    np.testing.assert_array_equal(statistics.avg_at_k(successes), [0.5, np.nan, 0.25])


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_the_subsets_that_hold_a_right_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [i < c for i in range(n)]
    subsets = list(itertools.combinations(right, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert statistics.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_where_binomials_overflow():
    n, c, k = 5000, 3, 1000
    log_all_wrong = sum(math.log1p(-k / i) for i in range(n - c + 1, n + 1))
    expected = -math.expm1(log_all_wrong)
    assert statistics.pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)
    assert statistics.pass_at_k(n, n, 4000) == 1


def test_pass_at_k_is_unbiased():
    n, k, p = 8, 4, 0.15
    c = np.arange(n + 1)
    binomial = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in c]
    mean = np.dot(binomial, statistics.pass_at_k(n, c, k))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="0 <= c <= n and 1 <= k <= n"):
        statistics.pass_at_k(n, c, k)


@given(st.lists(st.sampled_from("abc") | st.none(), min_size=1, max_size=6))
def test_majority_is_the_expected_value_of_a_random_tie_break(answers):
    values = {"a": 1.0, "b": 0.0, "c": 0.0, None: 0.0}
    correct = [[values[answer] for answer in answers]]
    given_answers = [answer for answer in answers if answer is not None]
    expected = 0.0
    if given_answers:
        most = max(given_answers.count(answer) for answer in given_answers)
        tied = {a for a in given_answers if given_answers.count(a) == most}
        expected = sum(values[a] for a in tied) / len(tied)
    assert statistics.maj_at_k([answers], correct)[0] == pytest.approx(expected)


def test_majority_gives_no_vote_to_unjudged_answers():
    answers = [["a", "a", "b"], ["a", "a", "b"]]
    correct = [[None, None, 1], [None, None, None]]
    np.testing.assert_array_equal(statistics.maj_at_k(answers, correct), [1.0, np.nan])


def test_majority_of_an_answer_that_was_judged_both_ways_is_its_share():
    assert statistics.maj_at_k([["a", "a", "b"]], [[1, 0, 1]])[0] == 0.5


def test_majority_names_a_mismatch_of_shapes():
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        statistics.maj_at_k([["a", "b"]], [[1, 0, 1]])


@pytest.mark.parametrize("p, n", [(0.0, 5), (0.3, 20), (1.0, 128)])
def test_wilson_ends_are_where_the_score_test_rejects(p, n):
    low, high = statistics.wilson_interval(p, n)
    for end in {low, high} - {0.0, 1.0}:
        # Source: scipy.stats.norm.ppf(0.975).
        assert abs(p - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(
            1.959963984540054
        )
    assert low < high and low <= p <= high
    assert (low == 0) == (p == 0) and (high == 1) == (p == 1)


def test_wilson_refuses_no_trials():
    with pytest.raises(ValueError, match="positive count"):
        statistics.wilson_interval(0.5, 0)


@pytest.mark.parametrize("a, b", [(0.5, 2.0), (3.0, 3.0), (4.0, 0.4)])
def test_interval_over_questions_holds_the_truth_as_often_as_it_says(a, b):
    rng = np.random.default_rng(0)
    questions, samples, trials = 40, 8, 600
    hits = 0
    for _ in range(trials):
        skill = rng.beta(a, b, questions)
        values = rng.binomial(samples, skill) / samples
        _, low, high = statistics.over_questions(values, samples=samples)
        hits += low <= a / (a + b) <= high
    assert 0.925 <= hits / trials <= 0.99


def test_interval_treats_answers_to_one_question_as_one_cluster():
    clustered = statistics.over_questions([0.0, 1.0] * 50, samples=16)
    spread = statistics.over_questions([0.5] * 100, samples=16)
    assert clustered.high - clustered.low > 2.5 * (spread.high - spread.low)
    # 1600 independent answers at most, 100 questions at least.
    expected = statistics.wilson_interval(0.5, 1600)
    assert spread[1:] == pytest.approx(expected)


def test_interval_of_single_answers_is_wilsons_but_for_one_trial():
    estimate = statistics.over_questions([0.0, 1.0] * 5)
    assert estimate[1:] == pytest.approx(statistics.wilson_interval(0.5, 9))


def test_interval_of_no_success_has_a_width():
    value, low, high = statistics.over_questions(np.zeros(100), samples=16)
    assert value == low == 0
    assert high == pytest.approx(statistics.wilson_interval(0.0, 100)[1])


def test_interval_without_data_is_nan():
    assert all(map(math.isnan, statistics.over_questions([np.nan])))


def test_metrics_of_a_block():
    successes = [[1, 1, 0, 0], [0, 0, 0, 0], [None, 1, 0, None], [None] * 4]
    answers = [["x", "x", "y", "z"], [None] * 4, ["x", "y", "z", "z"], [None] * 4]
    metrics = statistics.evaluation_metrics(successes, answers)
    assert metrics["avg@4"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert metrics["maj@4"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["unjudged"] == pytest.approx(6 / 16)
    for name in ("avg@4", "pass@4", "maj@4"):
        assert metrics[f"{name}/low"] < metrics[name] < metrics[f"{name}/high"]


def test_metrics_of_one_sample_have_only_an_average():
    metrics = statistics.evaluation_metrics([[1], [0]], [["a"], ["b"]])
    assert set(metrics) == {"avg@1", "avg@1/low", "avg@1/high", "unjudged"}


def test_confidence_reaches_every_interval():
    successes, answers = [[1, 0], [0, 0]], [["a", "b"], ["a", "a"]]
    wide = statistics.evaluation_metrics(successes, answers, confidence=0.99)
    narrow = statistics.evaluation_metrics(successes, answers, confidence=0.5)
    for name in ("avg@2/high", "pass@2/high", "maj@2/high"):
        assert wide[name] > narrow[name]


@pytest.mark.parametrize("successes", [[0, 1], [[0.5]], [[]]])
def test_successes_of_the_wrong_kind_are_named(successes):
    with pytest.raises(ValueError, match="successes"):
        statistics.evaluation_metrics(successes)
