"""Groups on the host, and what transforms do to them."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrl_post.recipes import DynamicSampling, Groups, OverlongPenalty
from jaxrl_post.recipes.groups import concatenate
from jaxrl_post.types import Prompts, Verdict


def make_groups(rewards, width=3) -> Groups:
    """Groups whose completions are `g + 1` tokens long."""
    count, size = len(rewards), len(rewards[0])
    lengths = np.broadcast_to(np.arange(size) + 1, (count, size))
    mask = np.arange(size)[None, None] < lengths[..., None]
    values = np.array(
        [[np.nan if r is None else r for r in row] for row in rewards], np.float32
    )
    return Groups(
        prompts=Prompts(
            tuple(f"q{p}" for p in range(count)),
            ((),) * count,
            ({},) * count,
            (None,) * count,
        ),
        contexts=np.arange(count * width, dtype=np.int32).reshape(count, width),
        context_mask=np.ones((count, width), bool),
        tokens=np.zeros((count, size, size), np.int32),
        mask=mask,
        sampler_logps=np.zeros((count, size, size), np.float32),
        stopped=np.ones((count, size), bool),
        completions=(("",) * size,) * count,
        verdicts=tuple(tuple(Verdict(r) for r in row) for row in rewards),
        rewards=np.nan_to_num(values),
        judged=~np.isnan(values),
    )


def test_take_keeps_fields_together():
    groups = make_groups([[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]]).take([2, 0])
    assert groups.prompts.ids == ("q2", "q0")
    np.testing.assert_array_equal(groups.rewards, [[0.5, 0.0], [0.0, 1.0]])
    assert groups.verdicts[0][0].reward == 0.5
    np.testing.assert_array_equal(groups.contexts[1], [0, 1, 2])


def test_concatenate_pads_contexts_on_the_left():
    both = concatenate([make_groups([[0.0, 1.0]], 2), make_groups([[1.0, 0.0]], 4)])
    assert len(both) == 2 and both.contexts.shape == (2, 4)
    np.testing.assert_array_equal(both.contexts[0], [0, 0, 0, 1])
    np.testing.assert_array_equal(both.context_mask[0], [False, False, True, True])


def test_dynamic_sampling_keeps_groups_with_two_rewards():
    groups = make_groups([[1.0, 1.0], [0.0, 1.0], [None, 1.0], [None, None]])
    assert DynamicSampling()(groups).prompts.ids == ("q1",)


def test_dynamic_sampling_looks_past_shaping():
    """A length penalty alone does not make a group of failures informative."""
    groups = make_groups([[0.0, 0.0, 0.0]])
    shaped = OverlongPenalty(max_length=3, buffer=2)(groups)
    assert np.ptp(shaped.rewards) > 0
    assert len(DynamicSampling()(shaped)) == 0


def test_overlong_penalty_shapes_judged_rewards_only():
    groups = make_groups([[1.0, None, 1.0]])
    shaped = OverlongPenalty(max_length=3, buffer=2, penalty=0.5)(groups)
    np.testing.assert_allclose(shaped.rewards, [[1.0, 0.0, 0.5]])


def test_take_of_nothing_is_legal():
    assert len(make_groups([[0.0, 1.0]]).take([])) == 0


@pytest.mark.parametrize("indices", [[1, 1], [0]])
def test_lengths(indices):
    groups = make_groups([[0.0, 1.0], [1.0, 1.0]]).take(indices)
    np.testing.assert_array_equal(groups.lengths, [[1, 2]] * len(indices))
