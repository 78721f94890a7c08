from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post import losses
from jaxrl_post.losses import presets

clipped = losses.clipped_policy_gradient
gspo = losses.sequence_policy_gradient
cispo = losses.clipped_importance_policy_gradient
tis = losses.truncated_importance_weights


def at_ratio(ratio, advantage, **options):
    """Value and gradient w.r.t. log p of one token at a given importance ratio."""
    logp = jnp.log(jnp.asarray(ratio, jnp.float32)).reshape(1, 1)

    def loss(logp):
        return clipped(logp, jnp.zeros((1, 1)), jnp.array([advantage]), **options)[0, 0]

    value, gradient = jax.value_and_grad(loss)(logp)
    return float(value), float(gradient[0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside
        (1.1, -2.0, 2.2, 2.2),
        (1.5, 2.0, -2.56, 0.0),  # above, good: clipped at 1.28
        (1.5, -2.0, 3.0, 3.0),  # above, bad: the pessimistic side keeps the gradient
        (0.5, 2.0, -1.0, -1.0),  # below, good
        (0.5, -2.0, 1.6, 0.0),  # below, bad: clipped at 0.8
        (9.0, -2.0, 6.0, 0.0),  # far above, bad: the dual clip at 3
        (9.0, 0.0, 0.0, 0.0),
    ],
)
def test_every_region_of_the_clip(ratio, advantage, value, gradient):
    found = at_ratio(ratio, advantage, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    np.testing.assert_allclose(found, (value, gradient), rtol=1e-5)


def test_on_policy_is_reinforce_even_with_a_zero_width():
    """At the clip's own edge the plain side decides, as torch's max and clamp do."""
    for options in ({}, {"clip_low": 0.0, "clip_high": 0.0}):
        for advantage in (1.5, -1.5):
            found = at_ratio(1.0, advantage, **options)
            np.testing.assert_allclose(found, (-advantage, -advantage), rtol=1e-6)


def test_none_means_no_clip_on_that_side():
    assert at_ratio(9.0, 1.0, clip_high=None)[1] == pytest.approx(-9.0, rel=1e-5)
    assert at_ratio(0.1, -1.0, clip_high=None)[1] == 0.0
    assert at_ratio(0.1, -1.0, clip_low=None)[1] == pytest.approx(0.1, rel=1e-5)
    assert at_ratio(9.0, 1.0, clip_low=None)[1] == 0.0


def test_log_ratio_clamp_stops_the_gradient_outside_and_not_at_its_edge():
    edge = at_ratio(np.exp(2.0), -1.0, log_ratio_clamp=2.5)
    np.testing.assert_allclose(edge, (np.exp(2.0), np.exp(2.0)), rtol=1e-5)
    beyond = at_ratio(np.exp(3.0), -1.0, log_ratio_clamp=2.5)
    np.testing.assert_allclose(beyond, (np.exp(2.5), 0.0), rtol=1e-5)
    free = at_ratio(np.exp(25.0), -1.0, log_ratio_clamp=None)
    np.testing.assert_allclose(free, (np.exp(25.0), np.exp(25.0)), rtol=1e-4)


def test_advantages_per_sequence_and_per_token_agree():
    logps = jnp.log(jnp.array([[0.5, 0.9], [0.4, 0.1]]))
    old = jnp.log(jnp.array([[0.4, 0.9], [0.9, 0.1]]))
    per_sequence = clipped(logps, old, jnp.array([1.0, -1.0]))
    per_token = clipped(logps, old, jnp.array([[1.0, 1.0], [-1.0, -1.0]]))
    np.testing.assert_array_equal(per_sequence, per_token)
    with pytest.raises(AssertionError):
        clipped(logps, old, jnp.ones(3))


def test_gspo_token_form_is_the_sequence_form():
    """The same value and gradient as mean_b max(-A s, -A clip(s)), for any mask."""
    key = jax.random.key(0)
    logps, old = jax.random.normal(key, (2, 4, 5)) * 0.5
    advantages = jnp.array([1.0, -1.0, 0.5, -2.0])
    mask = jnp.arange(5)[None] < jnp.array([[5], [2], [0], [1]])

    def token_form(logps):
        loss = gspo(logps, old, advantages, mask, clip_low=0.1, clip_high=0.2)
        return losses.reduce(loss, mask, mode="sequence_mean").mean()

    def sequence_form(logps):
        count = mask.sum(-1)
        gaps = jnp.where(mask, logps - old, 0)
        s = jnp.exp(gaps.sum(-1) / jnp.maximum(count, 1))
        loss = jnp.maximum(-advantages * s, -advantages * jnp.clip(s, 0.9, 1.2))
        return jnp.where(count > 0, loss, 0).sum() / (count > 0).sum()

    ours, theirs = (jax.value_and_grad(f)(logps) for f in (token_form, sequence_form))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-7)


def test_gspo_bounds_the_sequence_ratio():
    loss = gspo(
        jnp.full((1, 2), 15.0), jnp.zeros((1, 2)), -jnp.ones(1), jnp.ones((1, 2))
    )
    np.testing.assert_allclose(loss, np.full((1, 2), np.exp(10.0)), rtol=1e-5)


def test_cispo_keeps_every_gradient_and_detaches_the_weight():
    logps = jnp.log(jnp.array([[4.0, 1.1, 0.2]]))

    def gradient(**options):
        loss = lambda x: cispo(x, jnp.zeros((1, 3)), jnp.ones(1), **options).sum()  # noqa: E731
        return -jax.grad(loss)(logps)[0]

    two_sided = gradient(clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(two_sided, [1.28, 1.1, 0.8], rtol=1e-6)
    one_sided = gradient(absolute_cap=3.0)
    np.testing.assert_allclose(one_sided, [3.0, 1.1, 0.2], rtol=1e-5)
    free_below = gradient(clip_low=None, clip_high=0.28)
    np.testing.assert_allclose(free_below, [1.28, 1.1, 0.2], rtol=1e-5)


def test_truncated_importance_weights():
    sampler = jnp.array([[-1.0, -3.0, jnp.nan], [-2.0, -1.0, -1.0]])
    old = jnp.array([[-1.5, -1.0, -1.0], [-1.8, -1.1, -1.3]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1]])
    token = [[np.exp(-0.5), 2.0, 0.0], np.exp([0.2, -0.1, -0.3])]
    np.testing.assert_allclose(tis(old, sampler, mask), np.array(token), rtol=1e-6)
    sequence = [[3.0, 3.0, 0.0], [np.exp(-0.2)] * 3]
    found = tis(old, sampler, mask, level="sequence", threshold=3.0)
    np.testing.assert_allclose(found, np.array(sequence), rtol=1e-6)
    with pytest.raises(ValueError, match="level='prompt' is not one of"):
        tis(old, sampler, mask, level="prompt")


def test_only_logps_carry_a_gradient():
    shape = (2, 3)
    x, y = jax.random.normal(jax.random.key(1), (2, *shape))
    mask, advantages = jnp.ones(shape), jnp.array([1.0, -1.0])
    functions = [
        lambda old, a: clipped(x, old, a, dual_clip=3.0),
        lambda old, a: gspo(x, old, a, mask, clip_low=0.5, clip_high=0.5),
        lambda old, a: cispo(x, old, a),
        lambda old, a: tis(x, old, mask) + tis(old, x, mask),
        lambda old, a: losses.importance_clip(x, old) + losses.importance_clip(old, x),
    ]
    for function in functions:
        gradients = jax.grad(lambda o, a, f=function: f(o, a).sum(), (0, 1))(
            y, advantages
        )
        assert all(not np.any(g) for g in gradients)


EXTREME = (-1e30, -1e4, -1.0, 0.0, 1e4, 3e38)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(EXTREME), min_size=4, max_size=4),
    st.lists(st.sampled_from(EXTREME), min_size=4, max_size=4),
    st.sampled_from([-2.0, 0.0, 2.0]),
)
def test_finite_in_finite_out(logps, old_logps, advantage):
    logps = jnp.array(logps, jnp.float32).reshape(2, 2)
    old = jnp.array(old_logps, jnp.float32).reshape(2, 2)
    # 3e38 is the largest float: only logps * advantage may use the last factor of 2.
    logps, advantages = jnp.minimum(logps, 1e4), jnp.full((2,), advantage)
    mask = jnp.array([[1, 0], [1, 1]])
    for values, gradients in EVERYTHING(logps, old, advantages, mask):
        assert np.all(np.isfinite(values)), (values, logps, old)
        assert np.all(np.isfinite(gradients)), (gradients, logps, old)


@jax.jit
def EVERYTHING(logps, old, advantages, mask):
    functions = [
        lambda x: clipped(x, old, advantages, dual_clip=3.0),
        lambda x: clipped(
            x, old, advantages, clip_low=None, clip_high=None, log_ratio_clamp=None
        ),
        lambda x: gspo(x, old, advantages, mask, clip_low=None, clip_high=None),
        lambda x: cispo(x, old, advantages),
        lambda x: cispo(x, old, advantages, absolute_cap=5.0),
        lambda x: losses.reference_kl(x, old, estimator="k1"),
        lambda x: losses.reference_kl(x, old, estimator="k2"),
        lambda x: losses.reference_kl(x, old, estimator="k3"),
        lambda x: losses.reference_kl(x, old, estimator="k3", clamp=(20.0, 10.0)),
        lambda x: losses.sampled_token_distillation(x, old),
        lambda x: losses.importance_clip(x, old),
        lambda x: losses.shaped_imitation(x),
        lambda x: losses.negative_log_likelihood(x),
        lambda x: losses.entropy(x),
        lambda x: losses.self_distillation(x, old),
        lambda x: losses.self_distillation(x, old, alpha=0.0),
        lambda x: losses.self_distillation(x, old, alpha=1.0, top_k=1),
        lambda x: tis(x, old, mask),
        lambda x: tis(x, old, mask, level="sequence"),
    ]
    return [(f(logps), jax.grad(lambda x, f=f: f(x).sum())(logps)) for f in functions]


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_promoted(half):
    x = jnp.full((1, 2), -0.5, half)
    one, mask = jnp.ones(1, half), jnp.ones((1, 2))
    results = [
        clipped(x, x, one, dual_clip=3.0),
        gspo(x, x, one, mask),
        cispo(x, x, one),
        tis(x, x, mask),
        losses.reference_kl(x, x),
        losses.importance_clip(x, x),
        losses.sampled_token_distillation(x, x),
        losses.shaped_imitation(x),
        losses.negative_log_likelihood(x),
        losses.entropy(x),
        losses.self_distillation(x, x, top_k=1),
    ]
    assert {str(r.dtype) for r in results} == {"float32"}


def test_thresholds_may_be_traced():
    x = jnp.log(jnp.array([[1.5, 0.5]]))
    zero, one = jnp.zeros((1, 2)), jnp.ones(1)

    def all_of_them(c):
        return (
            clipped(x, zero, one, clip_low=c, clip_high=c, dual_clip=1 + c)
            + gspo(x, zero, one, zero + 1, clip_low=c, clip_high=c)
            + cispo(x, zero, one, clip_low=c, clip_high=c)
            + cispo(x, zero, one, absolute_cap=c)
            + tis(x, zero, zero + 1, threshold=c)
            + losses.importance_clip(x, zero, clip=c)
            + losses.shaped_imitation(x, gamma=c)
        )

    np.testing.assert_allclose(jax.jit(all_of_them)(0.3), all_of_them(0.3), rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (clipped, {"clip_low": -0.1}, "clip_low=-0.1 is not in"),
        (clipped, {"clip_high": -0.1}, "clip_high=-0.1 is not in"),
        (clipped, {"dual_clip": 1.0}, "dual_clip=1.0 is not in"),
        (clipped, {"log_ratio_clamp": 0.0}, "log_ratio_clamp=0.0 is not in"),
        (cispo, {"absolute_cap": 0.0}, "absolute_cap=0.0 is not in"),
        (cispo, {"clip_low": float("nan")}, "clip_low=nan is not in"),
    ],
)
def test_bad_hyper_parameters(function, options, message):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        function(x, x, jnp.ones(1), **options)


def test_presets_name_real_arguments_and_the_known_disagreements():
    x = jnp.log(jnp.array([[9.0]]))
    zero, bad = jnp.zeros((1, 1)), -jnp.ones(1)
    for library, kwargs in presets.POLICY_GRADIENT.items():
        expected = 3.0 if library == "verl" else 9.0
        found = float(clipped(x, zero, bad, **kwargs)[0, 0])
        assert found == pytest.approx(expected, rel=1e-5), library
    weights = {
        library: float(-cispo(x, zero, jnp.ones(1), **kwargs)[0, 0] / x[0, 0])
        for library, kwargs in presets.CLIPPED_IMPORTANCE.items()
    }
    assert weights.pop("trl") == pytest.approx(5.0)
    assert set(np.round(list(weights.values()), 5)) == {1.2}
    for kwargs in presets.REFERENCE_KL.values():
        losses.reference_kl(x, zero, **kwargs)
