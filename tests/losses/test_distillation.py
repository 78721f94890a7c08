from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post import losses

V = 5
ALPHAS = (0.0, 0.3, 0.5, 1.0)
logits = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V)


FORMS = [
    (alpha, top_k, tail)
    for alpha in ALPHAS
    for top_k, tail in ((None, True), (2, True), (2, False), (V, False), (99, False))
]


@jax.jit
def evaluate(student, teacher):
    def form(alpha, top_k, tail):
        def loss(s, t):
            return losses.self_distillation(s, t, alpha=alpha, top_k=top_k, tail=tail)

        return jax.value_and_grad(loss, (0, 1))(student, teacher)

    return [form(*options) for options in FORMS]


def results(student, teacher):
    with jax.enable_x64(True):
        arrays = jnp.array(student, jnp.float64), jnp.array(teacher, jnp.float64)
        return dict(zip(FORMS, jax.device_get(evaluate(*arrays)), strict=True))


@settings(max_examples=25, deadline=None)
@given(logits, logits)
def test_invariants(student, teacher):
    found = results(student, teacher)
    for (alpha, top_k, tail), (value, (_, teacher_gradient)) in found.items():
        assert not np.any(teacher_gradient)
        assert value >= -1e-9
        if 0 < alpha < 1:
            assert value <= np.log(2) + 1e-9
        full = found[alpha, None, True]
        if top_k == 2 and tail:  # merging tokens into one bucket loses information
            assert value <= full[0] + 1e-6
        if top_k in (V, 99):
            np.testing.assert_allclose(value, full[0], atol=1e-9)
            np.testing.assert_allclose(
                found[alpha, top_k, tail][1][0], full[1][0], atol=1e-9
            )


@settings(max_examples=10, deadline=None)
@given(logits)
def test_same_context_gives_no_loss_and_no_gradient(student):
    for value, (gradient, _) in results(student, student).values():
        np.testing.assert_allclose(value, 0, atol=1e-12)
        np.testing.assert_allclose(gradient, np.zeros(V), atol=1e-12)
    logps = jax.nn.log_softmax(jnp.array(student))
    assert not np.any(losses.sampled_token_distillation(logps, logps))


@jax.jit
def sampled_and_exact(student, teacher):
    p, teacher_logps = jax.nn.softmax(student), jax.nn.log_softmax(teacher)

    def average(z):
        logps = jax.nn.log_softmax(z)
        return (p * losses.sampled_token_distillation(logps, teacher_logps)).sum()

    def exact(z):
        return losses.self_distillation(z, teacher, alpha=1.0)

    return jax.grad(average)(student), jax.grad(exact)(student)


@settings(max_examples=25, deadline=None)
@given(logits, logits)
def test_sampled_token_gradient_is_the_reverse_kl_gradient_on_average(student, teacher):
    with jax.enable_x64(True):
        sampled, exact = sampled_and_exact(
            jnp.array(student, jnp.float64), jnp.array(teacher, jnp.float64)
        )
    np.testing.assert_allclose(sampled, exact, atol=1e-12)


def test_divergence_by_hand():
    s, t = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])

    def kl(p, q):
        return (p * np.log(p / q)).sum()

    m = 0.75 * s + 0.25 * t
    for alpha, value in (
        (0.0, kl(t, s)),
        (1.0, kl(s, t)),
        (0.25, 0.75 * kl(s, m) + 0.25 * kl(t, m)),
    ):
        found = losses.divergence(jnp.log(s), jnp.log(t), alpha=alpha)
        np.testing.assert_allclose(found, value, rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_impossible_entries(alpha):
    """-inf on both sides is as if the entry were absent, in value and gradient."""

    def loss(z, teacher):
        return losses.divergence(
            jax.nn.log_softmax(z), jax.nn.log_softmax(teacher), alpha=alpha
        )

    z, teacher = jnp.array([0.5, -1.0, 1.0]), jnp.array([1.0, 0.0, -1.0])
    hole = jnp.array([-jnp.inf])
    value, gradient = jax.value_and_grad(loss)(z, teacher)
    padded = jnp.concatenate([z, hole]), jnp.concatenate([teacher, hole])
    value_padded, gradient_padded = jax.value_and_grad(loss)(*padded)
    np.testing.assert_allclose(value_padded, value, rtol=1e-6)
    np.testing.assert_allclose(gradient_padded[:3], gradient, rtol=1e-5, atol=1e-7)
    assert float(gradient_padded[3]) == 0.0


def test_entries_that_one_side_lacks():
    certain, even = jnp.array([0.0, -jnp.inf]), jnp.log(jnp.array([0.5, 0.5]))
    grad = jax.value_and_grad(losses.divergence)
    assert float(losses.divergence(certain, even, alpha=0.0)) == np.inf
    assert float(losses.divergence(even, certain, alpha=1.0)) == np.inf
    # Of (1, 0), (1/2, 1/2) and their mixture (3/4, 1/4).
    shannon = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    for student, teacher, alpha, value in (
        (certain, even, 1.0, np.log(2)),
        (even, certain, 0.0, np.log(2)),
        (certain, even, 0.5, shannon),
        (even, certain, 0.5, shannon),
    ):
        found, gradient = grad(student, teacher, alpha=alpha)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        assert np.all(np.isfinite(gradient))


def test_tail_holds_the_rest_and_its_bound_stops_the_gradient():
    logps = jnp.log(jnp.array([0.5, 0.2]))
    np.testing.assert_allclose(
        jnp.exp(losses.append_tail(logps)), [0.5, 0.2, 0.3], rtol=1e-5
    )
    gradient = jax.grad(lambda x: losses.append_tail(x)[-1])(logps)
    np.testing.assert_allclose(gradient, [-0.5 / 0.3, -0.2 / 0.3], rtol=1e-5)

    everything = jnp.log(jnp.array([0.5, 0.5]))
    tail, gradient = jax.value_and_grad(lambda x: losses.append_tail(x)[-1])(everything)
    np.testing.assert_allclose(tail, np.log(1e-7), rtol=1e-3)
    np.testing.assert_array_equal(gradient, np.zeros(2))


def test_support_is_of_the_side_asked_for():
    student, teacher = jnp.array([3.0, 2.0, 0.0, 0.0]), jnp.array([0.0, 0.5, 1.0, 3.0])
    by_hand = {}
    for side, ids in (("student", [0, 1]), ("teacher", [3, 2])):
        pair = (
            losses.renormalize(jax.nn.log_softmax(x)[jnp.array(ids)])
            for x in (student, teacher)
        )
        by_hand[side] = losses.divergence(*pair, alpha=0.5)
    for side, value in by_hand.items():
        found = losses.self_distillation(
            student, teacher, top_k=2, tail=False, support=side
        )
        np.testing.assert_allclose(found, value, rtol=1e-6)


def test_importance_clip_is_one_sided_and_one_on_policy():
    logps = jnp.array([[0.0, -5.0, -1.0, 0.0]])
    old = jnp.array([[-3.0, -1.0, -1.0, -900.0]])
    factor = losses.importance_clip(logps, old, clip=1.5)
    np.testing.assert_allclose(factor, [[1.5, np.exp(-4.0), 1.0, 1.5]], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.importance_clip(x, old).sum())(logps)
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is not in"),
        ({"top_k": 0}, "top_k=0 is not in"),
        ({"support": "both"}, "support='both' is not one of student, teacher"),
    ],
)
def test_bad_hyper_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        losses.self_distillation(jnp.zeros(3), jnp.zeros(3), **options)


def test_alpha_chooses_the_program_and_cannot_be_traced():
    x = jnp.log(jnp.array([0.5, 0.5]))
    with pytest.raises(TypeError, match="alpha chooses the program"):
        jax.jit(lambda a: losses.divergence(x, x, alpha=a))(0.5)
