from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_post.reduction import MODES, Reduction, reduce, token_weights

VALUES = np.array([[1.0, 2.0, 6.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0], [5.0, 1.0, 9.0]])
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)

# Sums 9, 4, 0, 6 over 3, 1, 0, 2 tokens; groups of two: 13 over 4 and 6 over 2.
EXPECTED = {
    "token_mean": (19.0, 6.0),
    "sequence_mean": (3.0 + 4.0 + 3.0, 3.0),
    "sequence_mean_over_all": (10.0, 4.0),
    "sequence_sum_mean": (19.0, 3.0),
    "prompt_mean": (13 / 4 + 6 / 2, 2.0),
    "constant": (19.0, 12.0),
}


def options(mode):
    return {
        "prompt_mean": {"group_size": 2},
        "constant": {"denominator": 12.0},
    }.get(mode, {})


@pytest.mark.parametrize("mode", MODES)
def test_total_and_denominator_by_hand(mode):
    result = reduce(VALUES, MASK, mode=mode, **options(mode))
    total, denominator = EXPECTED[mode]
    np.testing.assert_allclose(result.total, total, rtol=1e-6)
    assert float(result.denominator) == denominator
    np.testing.assert_allclose(result.mean(), total / denominator, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_filler_rows_count_nowhere(mode):
    values = np.concatenate([VALUES, np.full((2, 3), np.nan)])
    mask = np.concatenate([MASK, np.ones((2, 3), bool)])
    real = np.array([1, 1, 1, 1, 0, 0])
    padded = reduce(values, mask, mode=mode, sequence_mask=real, **options(mode))
    total, denominator = EXPECTED[mode]
    np.testing.assert_allclose(padded.total, total, rtol=1e-6)
    assert float(padded.denominator) == denominator


@pytest.mark.parametrize("mode", MODES)
def test_padding_in_time_changes_nothing(mode):
    values = np.pad(VALUES, ((0, 0), (2, 3)), constant_values=np.inf)
    mask = np.pad(MASK, ((0, 0), (2, 3)))
    padded = reduce(values, mask, mode=mode, **options(mode))
    np.testing.assert_allclose(padded.total, EXPECTED[mode][0], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_add_up(mode, rows):
    """By Reduction.__add__ where whole groups stay together, by the whole batch's
    weights always, also with a group split over two micro-batches."""
    whole = reduce(VALUES, MASK, mode=mode, **options(mode))
    weights, denominator = token_weights(MASK, mode=mode, **options(mode))
    parts = [slice(i, i + rows) for i in range(0, 4, rows)]
    weighted = sum((weights[p] * VALUES[p]).sum() for p in parts)
    np.testing.assert_allclose(weighted / denominator, whole.mean(), rtol=1e-6)

    if mode == "prompt_mean" and rows == 1:
        return
    part_options = options(mode)
    if mode == "constant":
        part_options = {"denominator": 12.0 / len(parts)}
    summed = Reduction(jnp.zeros(()), jnp.zeros(()))
    for p in parts:
        summed = summed + reduce(VALUES[p], MASK[p], mode=mode, **part_options)
    np.testing.assert_allclose(summed.total, whole.total, rtol=1e-6)
    np.testing.assert_allclose(summed.denominator, whole.denominator, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_counted_gives_zero_and_zero_gradient(mode):
    def loss(values):
        empty = jnp.zeros_like(values, bool)
        return reduce(values, empty, mode=mode, **options(mode)).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.full((4, 3), jnp.nan))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((4, 3)))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_denominators_depend_on_masks_only(data):
    bits = data.draw(st.lists(st.booleans(), min_size=12, max_size=12))
    mask = np.array(bits).reshape(4, 3)
    numbers = st.floats(-1e3, 1e3, width=32)
    drawn = data.draw(st.lists(numbers, min_size=12, max_size=12))
    values = np.array(drawn, np.float32).reshape(4, 3)
    for mode in ("token_mean", "sequence_mean", "prompt_mean"):
        result = reduce(values, mask, mode=mode, **options(mode))
        assert float(result.denominator) == float(
            reduce(np.ones((4, 3)), mask, mode=mode, **options(mode)).denominator
        )
        inside = values[mask] if mask.any() else np.zeros(1)
        assert inside.min() - 1e-2 <= float(result.mean()) <= inside.max() + 1e-2


def test_dtypes():
    assert reduce(VALUES.astype(jnp.bfloat16), MASK).total.dtype == jnp.float32
    with jax.enable_x64(True):
        assert reduce(VALUES, MASK, mode="sequence_mean").total.dtype == jnp.float64
        kept = reduce(VALUES.astype(np.float32), MASK, mode="sequence_mean")
        assert kept.total.dtype == kept.denominator.dtype == jnp.float32
        third = reduce(np.ones((1, 3)), np.ones((1, 3)), mode="sequence_mean")
        np.testing.assert_allclose(third.mean(), 1.0, rtol=1e-15)


def test_works_under_jit_and_vmap_with_traced_masks():
    stacked = jax.jit(jax.vmap(lambda v, m: reduce(v, m, mode="sequence_mean").mean()))(
        np.stack([VALUES, VALUES]), np.stack([MASK, ~MASK])
    )
    alone = reduce(VALUES, ~MASK, mode="sequence_mean").mean()
    np.testing.assert_allclose(stacked, [10 / 3, alone], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, "mode='mean' is not one of token_mean"),
        ({"mode": "prompt_mean"}, "needs a group_size that divides the 4 rows"),
        ({"mode": "prompt_mean", "group_size": 3}, "got 3"),
        ({"mode": "constant"}, "needs one"),
        ({"mode": "constant", "denominator": 0.0}, "denominator=0.0 is not in"),
        ({"denominator": 3.0}, "belongs to mode='constant'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        reduce(VALUES, MASK, **arguments)


def test_shapes_are_checked_while_tracing():
    with pytest.raises(AssertionError, match="shape"):
        jax.eval_shape(reduce, np.zeros((2, 3)), np.zeros((2, 4)))
