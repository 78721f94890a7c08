"""Cutting batches: nothing lost, nothing twice, contexts with their sequences."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxrl_post.recipes import Batch, split_batch

GROUPS, SIZE = 4, 2
ROWS = GROUPS * SIZE


def make_batch(**fields) -> Batch:
    """Row numbers everywhere, so that every value says where it came from."""
    rows = np.arange(ROWS, dtype=np.int32)
    ones = np.ones((ROWS, 1), bool)
    contexts = np.arange(GROUPS, dtype=np.int32)[:, None]
    defaults = {
        "contexts": contexts,
        "context_mask": np.ones((GROUPS, 1), bool),
        "responses": rows[:, None],
        "token_mask": ones,
        "loss_mask": ones,
        "sequence_mask": ones[:, 0],
        "advantages": rows.astype(np.float32),
    }
    return Batch(**{**defaults, **fields})


def context_of(batch: Batch, part: int, row: int) -> int:
    contexts = batch.contexts[part]
    return int(contexts[row // (batch.responses.shape[1] // len(contexts)), 0])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_each_sequence_once_behind_its_own_context(parts):
    cut = split_batch(make_batch(), parts)
    assert sorted(np.asarray(cut.responses).ravel()) == list(range(ROWS))
    for part in range(parts):
        for row in range(ROWS // parts):
            number = int(cut.responses[part, row, 0])
            assert context_of(cut, part, row) == number // SIZE
            assert int(cut.advantages[part, row]) == number


def test_whole_groups_keep_shared_contexts():
    assert split_batch(make_batch(), 2).contexts.shape == (2, 2, 1)
    assert split_batch(make_batch(), 8).contexts.shape == (8, 1, 1)


def test_no_part_of_a_group_stays_on_a_shard_without_its_context():
    """Four groups in two parts on two shards: one for each; on four they are cut."""
    assert split_batch(make_batch(), 2, shards=2).contexts.shape == (2, 2, 1)
    cut = split_batch(make_batch(), 2, shards=4)
    assert cut.contexts.shape == (2, 4, 1)
    assert [context_of(cut, 1, row) for row in range(4)] == [0, 1, 2, 3]


def test_index_decides_the_context():
    index = np.array([3, 1, 0, 0, 2, 2, 1, 3], np.int32)
    cut = split_batch(make_batch(context_index=index), 4)
    assert cut.context_index is None
    for part in range(4):
        for row in range(2):
            number = int(cut.responses[part, row, 0])
            assert context_of(cut, part, row) == index[number]


def test_teacher_contexts_go_along():
    teacher = {
        "teacher_contexts": 10 + np.arange(3, dtype=np.int32)[:, None],
        "teacher_context_mask": np.ones((3, 1), bool),
        "teacher_index": np.array([2, 1, 0, 0, 2, 2, 1, 1], np.int32),
    }
    cut = split_batch(make_batch(**teacher), 2)
    for part in range(2):
        for row in range(4):
            number = int(cut.responses[part, row, 0])
            seen = int(cut.teacher_contexts[part, row, 0])
            assert seen == 10 + teacher["teacher_index"][number]


def test_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match="8 sequences cannot be cut into 3"):
        split_batch(make_batch(), 3)


def test_extras_are_cut_too():
    batch = make_batch(extras={"weight": np.arange(ROWS, dtype=np.float32)})
    cut = split_batch(batch, 4)
    np.testing.assert_array_equal(cut.extras["weight"], cut.advantages)
    assert jax.tree.leaves(cut)[0].shape[0] == 4
