"""What PGPO's transform promises inside optax's own wrappers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post.information import AdaptiveSensitivity, information_gain
from jaxrl_post.reduction import Reduction
from jaxrl_post.transforms import (
    ScaleByInformationState,
    pgpo_adamw,
    scale_by_information,
)

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}
GAINS = (0.5, -0.3, 9.0, 0.1)


def grads_at(k):
    return jax.tree.map(lambda p: jnp.sin(3 * p + k), PARAMS)


def steps(optimizer, gains=GAINS, information=True):
    """Updates and states of a few steps at fixed parameters."""
    state, history = optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for k, gain in enumerate(gains):
        extra = {"information": jnp.asarray(gain)} if information else {}
        updates, state = update(grads_at(k), state, PARAMS, **extra)
        history.append((updates, state))
    return history


def find(state):
    """The transform's own state, wherever it is nested."""

    def is_ours(node):
        return isinstance(node, ScaleByInformationState)

    return next(s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s))


def rho(gain, sensitivity=1.0, cap=2.0):
    return min(np.exp(sensitivity * gain), cap)


def assert_scaled(updates, reference, factor, rtol=2e-6):
    for ours, plain in zip(
        jax.tree.leaves(updates), jax.tree.leaves(reference), strict=True
    ):
        np.testing.assert_allclose(ours, factor * np.asarray(plain), rtol=rtol)


def test_update_is_rho_times_adamw_and_its_moments_are_bitwise_the_same():
    modulated = steps(pgpo_adamw(0.1, sensitivity=1.0))
    plain = steps(
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.01)
        ),
        information=False,
    )
    for gain, (updates, state), (reference, reference_state) in zip(
        GAINS, modulated, plain, strict=True
    ):
        assert_scaled(updates, reference, rho(gain))
        ours = optax.tree.get(state, "ScaleByAdamState")
        theirs = optax.tree.get(reference_state, "ScaleByAdamState")
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        np.testing.assert_allclose(find(state).multiplier, rho(gain), rtol=1e-6)
        np.testing.assert_allclose(find(state).gain, gain, rtol=1e-6)


def test_scaling_the_loss_instead_is_nearly_undone_by_adam():
    """With a gain that stays, Adam divides the factor out again: the updates differ
    from the plain ones by 1e-6, not by a factor of 1.65."""
    gain = 0.5
    adamw = pgpo_adamw(0.1, sensitivity=1.0, weight_decay=0.0, max_norm=None)
    plain, scaled_loss = adamw.init(PARAMS), adamw.init(PARAMS)
    for k in range(5):
        grads = grads_at(k)
        scaled = jax.tree.map(lambda g: rho(gain) * g, grads)
        right, _ = adamw.update(grads, plain, PARAMS, information=gain)
        reference, plain = adamw.update(grads, plain, PARAMS, information=0.0)
        undone, scaled_loss = adamw.update(scaled, scaled_loss, PARAMS, information=0.0)
        for leaf, plain_leaf in zip(
            jax.tree.leaves(undone), jax.tree.leaves(reference), strict=True
        ):
            np.testing.assert_allclose(leaf, plain_leaf, rtol=1e-5)
        assert_scaled(right, reference, rho(gain))


@pytest.mark.parametrize("scale_decay", [True, False])
def test_whether_the_decay_is_scaled(scale_decay):
    """At zero gradient only the decay is left: it is rho times itself, or itself."""
    optimizer = pgpo_adamw(
        0.1, sensitivity=1.0, weight_decay=0.5, scale_decay=scale_decay
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(
        zeros, optimizer.init(PARAMS), PARAMS, information=0.5
    )
    decay = jax.tree.map(lambda p: -0.1 * 0.5 * p, PARAMS)
    assert_scaled(updates, decay, rho(0.5) if scale_decay else 1.0)


def test_takes_a_reduction():
    gain = information_gain([[1.0, 0.4]], [[0.5, 0.1]], [[1, 1]])
    optimizer = scale_by_information(1.0)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), information=gain)
    assert_scaled(updates, PARAMS, rho(0.4))
    empty = Reduction(jnp.zeros(()), jnp.zeros(()))
    updates, state = optimizer.update(PARAMS, optimizer.init(PARAMS), information=empty)
    assert_scaled(updates, PARAMS, 1.0)
    assert int(state.nonfinite) == 0


def test_non_finite_gain_gives_one_and_is_counted():
    history = steps(scale_by_information(1.0), gains=(0.5, jnp.nan, jnp.inf, 0.2))
    assert_scaled(history[1][0], grads_at(1), 1.0)
    assert_scaled(history[2][0], grads_at(2), 1.0)
    assert [int(s.nonfinite) for _, s in history] == [0, 1, 2, 2]
    assert [int(s.finite) for _, s in history] == [1, 1, 1, 2]
    assert float(history[2][1].gain) == 0.5
    for _, state in history:
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_smoothing_is_a_bias_corrected_average_that_skips_non_finite_gains():
    gains = (0.4, np.nan, 0.1, -0.2)
    history = steps(scale_by_information(1.0, smoothing=0.9), gains=gains)
    average, seen = 0.0, 0
    for gain, (_, state) in zip(gains, history, strict=True):
        if np.isfinite(gain):
            average, seen = 0.9 * average + 0.1 * gain, seen + 1
            expected = average / (1 - 0.9**seen)
            np.testing.assert_allclose(state.gain, expected, rtol=1e-5)
            np.testing.assert_allclose(state.multiplier, rho(expected), rtol=1e-5)
        else:
            assert float(state.multiplier) == 1.0


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_delay(delay):
    history = steps(scale_by_information(1.0, delay=delay), gains=(0.5, -0.3, 0.2, 0.1))
    expected = [1.0] * delay + [rho(g) for g in (0.5, -0.3, 0.2, 0.1)]
    for k, (updates, state) in enumerate(history):
        np.testing.assert_allclose(state.multiplier, expected[k], rtol=1e-6)
        assert_scaled(updates, grads_at(k), expected[k])


def test_delay_removes_the_bias_of_using_the_batch_twice():
    """Gain and gradient of the same batch share noise z: E[rho g] != E[rho] E[g]."""
    z = jax.random.normal(jax.random.key(0), (4000,))

    def run(delay):
        transform = scale_by_information(1.0, max_multiplier=2.0, delay=delay)

        def step(state, noise):
            update, state = transform.update(noise, state, information=jnp.sign(noise))
            return state, update

        return jax.jit(lambda z: jax.lax.scan(step, transform.init(z[0]), z)[1])(z)

    # E[rho z] with rho in {2, 1/e} by the sign of z: (2 - 1/e) / sqrt(2 pi).
    np.testing.assert_allclose(
        run(0).mean(), (2 - np.exp(-1)) / np.sqrt(2 * np.pi), atol=0.06
    )
    np.testing.assert_allclose(run(1).mean(), 0.0, atol=0.08)


def adapted(gains, adapt, sensitivity=1.0, **options):
    """Multipliers and the alphas behind the next ones, over a series of gains."""
    transform = scale_by_information(sensitivity, adapt=adapt, **options)

    def step(state, gain):
        _, state = transform.update(gain, state, information=gain)
        return state, (state.multiplier, state.sensitivity)

    scan = jax.jit(lambda gains: jax.lax.scan(step, transform.init(gains[0]), gains)[1])
    return jax.tree.map(np.asarray, scan(jnp.asarray(gains, jnp.float32)))


def test_adaptive_sensitivity_step_by_step():
    gains = (0.5, np.nan, 0.2, -0.1, 0.9)
    adapt = AdaptiveSensitivity(target=1.4, quantile=0.8, rate=0.3)
    alpha, expected = 1.0, []
    for gain in gains:
        multiplier = 1.0
        if np.isfinite(gain):
            multiplier = rho(gain, alpha)
            alpha *= np.exp(0.3 * (float(multiplier <= 1.4) - 0.8))
        expected.append((multiplier, alpha))
    found = np.stack(adapted(gains, adapt), 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The multiplier of a delayed update is that of its gain's own alpha.
    late, alphas = adapted(gains, adapt, delay=1)
    np.testing.assert_allclose(late, [1.0, *found[:-1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(alphas, found[:, 1].astype(np.float32))


@pytest.mark.parametrize("start", [0.05, 8.0])
def test_adaptive_sensitivity_rests_at_the_quantile(start):
    """Gains ~ N(0.3, 0.2) have the quantile 0.8 at 0.4683: alpha = log 1.5 / 0.4683."""
    gains = 0.3 + 0.2 * np.random.default_rng(1).standard_normal(8000)
    adapt = AdaptiveSensitivity(target=1.5, quantile=0.8, rate=0.02)
    multipliers, alphas = adapted(gains, adapt, start)
    # It telescopes: the share is the quantile up to what alpha has moved.
    moved = np.log(alphas[-1] / start) / (0.02 * len(gains))
    np.testing.assert_allclose((multipliers <= 1.5).mean(), 0.8 + moved, atol=1e-3)
    settled = slice(4000, None)
    assert abs((multipliers[settled] <= 1.5).mean() - 0.8) < 0.01
    resting = np.log(alphas[settled]).mean()
    np.testing.assert_allclose(resting, np.log(np.log(1.5) / 0.4683), atol=0.05)


def test_adaptive_sensitivity_has_a_bound():
    adapt = AdaptiveSensitivity(rate=1.0, max_sensitivity=3.0)
    _, alphas = adapted([-0.1] * 9, adapt)
    assert alphas[-1] == 3.0 and np.all(np.diff(alphas) >= 0)


def test_adaptive_sensitivity_inside_wrappers():
    """Injected, in a chain, with donated state, as in a chain of one's own."""
    adapt = AdaptiveSensitivity(target=1.3, quantile=0.8, rate=0.2)
    options = {"sensitivity": 1.0, "adapt": adapt}
    reference = [find(state) for _, state in steps(pgpo_adamw(0.1, **options))]
    injected = optax.inject_hyperparams(pgpo_adamw, static_args=("delay",))
    for optimizer in (
        injected(0.1, **options),
        optax.chain(optax.adam(0.1), scale_by_information(**options)),
    ):
        update = jax.jit(optimizer.update, donate_argnums=1)
        state = jax.jit(optimizer.init)(PARAMS)
        for k, gain in enumerate(GAINS):
            _, state = update(grads_at(k), state, PARAMS, information=jnp.array(gain))
            ours = find(state)
            np.testing.assert_allclose(ours.sensitivity, reference[k].sensitivity)
            np.testing.assert_allclose(ours.multiplier, reference[k].multiplier)
        assert float(ours.sensitivity) != 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_multiplier": 1.5}, "above its target"),
        ({"sensitivity": 0.0}, "sensitivity=0.0 is not in"),
        ({"sensitivity": 11.0}, "sensitivity=11.0 is not in"),
    ],
)
def test_an_adaptation_that_could_not_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_information(
            **({"sensitivity": 1.0, "adapt": AdaptiveSensitivity()} | arguments)
        )


def test_inject_hyperparams_with_a_schedule_for_the_sensitivity():
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    optimizer = optax.inject_hyperparams(scale_by_information)(schedule)
    history = steps(optimizer, gains=(0.5, 0.5, 0.5))
    for (updates, _), alpha, k in zip(history, (0.0, 0.5, 1.0), range(3), strict=True):
        assert_scaled(updates, grads_at(k), rho(0.5, alpha))


def test_inject_hyperparams_with_delay_and_smoothing():
    factory = optax.inject_hyperparams(scale_by_information, static_args=("delay",))
    history = steps(factory(1.0, delay=1, smoothing=0.5), gains=(0.4, 0.1))
    assert_scaled(history[0][0], grads_at(0), 1.0)
    assert_scaled(history[1][0], grads_at(1), rho(0.4))
    injected = optax.inject_hyperparams(scale_by_information)(1.0)
    jax.jit(injected.init)(PARAMS)  # the default delay needs no static_args


def test_inject_hyperparams_on_the_ready_made_chain():
    factory = optax.inject_hyperparams(pgpo_adamw, static_args=("delay",))
    ours = steps(factory(0.1, sensitivity=1.0))
    reference = steps(pgpo_adamw(0.1, sensitivity=1.0))
    for (a, _), (b, _) in zip(ours, reference, strict=True):
        assert_scaled(a, b, 1.0, rtol=1e-4)  # its float32 betas round differently


def test_multi_steps_uses_the_running_reduction_of_the_last_mini_step():
    optimizer = optax.MultiSteps(pgpo_adamw(0.1, sensitivity=1.0), every_k_schedule=2)
    whole = pgpo_adamw(0.1, sensitivity=1.0)
    parts = [Reduction(jnp.array(0.9), jnp.array(1.0)), Reduction(jnp.array(0.3), 2.0)]
    state, running = optimizer.init(PARAMS), Reduction(0.0, 0.0)
    update = jax.jit(optimizer.update)
    for k, part in enumerate(parts):
        running = running + part
        updates, state = update(grads_at(k), state, PARAMS, information=running)
        if k == 0:
            assert_scaled(updates, PARAMS, 0.0)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, grads_at(0), grads_at(1))
    reference, _ = whole.update(mean, whole.init(PARAMS), PARAMS, information=0.4)
    assert_scaled(updates, reference, 1.0)
    assert int(find(state).finite) == 1


def test_multi_steps_with_information_missing_until_the_last_mini_step():
    optimizer = optax.MultiSteps(scale_by_information(1.0), every_k_schedule=2)
    state = optimizer.init(PARAMS)
    updates, state = optimizer.update(PARAMS, state, information=jnp.nan)
    assert_scaled(updates, PARAMS, 0.0)
    updates, state = optimizer.update(PARAMS, state, information=0.5)
    assert_scaled(updates, PARAMS, rho(0.5))
    assert int(find(state).nonfinite) == 0


def test_masked_scales_only_its_part():
    optimizer = optax.masked(scale_by_information(1.0), {"w": True, "b": False})
    updates, _ = steps(optimizer, gains=(0.5,))[0]
    assert_scaled(updates["w"], grads_at(0)["w"], rho(0.5))
    assert_scaled(updates["b"], grads_at(0)["b"], 1.0)


def test_partition():
    optimizer = optax.partition(
        {"modulated": pgpo_adamw(0.1, sensitivity=1.0), "frozen": optax.set_to_zero()},
        {"w": "modulated", "b": "frozen"},
    )
    updates, state = steps(optimizer, gains=(0.5,))[0]
    alone = pgpo_adamw(0.1, sensitivity=1.0)
    only_w = {"w": PARAMS["w"]}
    reference, _ = alone.update(
        {"w": grads_at(0)["w"]}, alone.init(only_w), only_w, information=0.5
    )
    assert_scaled(updates["w"], reference["w"], 1.0)
    assert not np.any(updates["b"])
    assert int(find(state).finite) == 1


def test_flatten():
    flat = optax.flatten(scale_by_information(1.0))
    updates, _ = steps(flat, gains=(0.5,))[0]
    assert_scaled(updates, grads_at(0), rho(0.5))


def test_jit_with_donated_state_and_half_precision_updates():
    optimizer = scale_by_information(1.0, delay=1, smoothing=0.9)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(updates, state, information):
        return optimizer.update(updates, state, information=information)

    state = optimizer.init(PARAMS)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(3):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        updates, state = update(half, state, jnp.array(0.5, jnp.bfloat16))
    assert {str(u.dtype) for u in jax.tree.leaves(updates)} == {"bfloat16"}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert update._cache_size() == 1


def test_float64_stays_float64():
    with jax.enable_x64(True):
        optimizer = scale_by_information(1.0)
        params = np.ones(2)
        updates, state = optimizer.update(
            params, optimizer.init(params), information=np.float64(0.1)
        )
        assert updates.dtype == state.multiplier.dtype == jnp.float64
        np.testing.assert_allclose(updates, np.exp(0.1) * params, rtol=1e-15)


def test_missing_or_misshapen_information():
    optimizer = pgpo_adamw(0.1, sensitivity=1.0)
    state = optimizer.init(PARAMS)
    with pytest.raises(TypeError, match="information=gain"):
        optimizer.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"shape \(3,\); it is one scalar"):
        optimizer.update(PARAMS, state, PARAMS, information=jnp.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sensitivity": -1.0}, "sensitivity=-1.0 is not in"),
        ({"max_multiplier": 0.9}, "max_multiplier=0.9 is not in"),
        ({"min_multiplier": 2.0}, "min_multiplier=2.0 is not in"),
        ({"smoothing": 1.0}, "smoothing=1.0 is not in"),
        ({"delay": -1}, "delay=-1 is not in"),
    ],
)
def test_bad_hyper_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_information(**({"sensitivity": 1.0} | arguments))


def test_a_traced_delay_is_a_clear_error():
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda d: scale_by_information(1.0, delay=d).init(PARAMS))(1)
