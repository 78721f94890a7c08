from __future__ import annotations

import numpy as np
import pytest

from jaxrl_post.tasks.base import Row, RowsTask, Task, epoch_order
from jaxrl_post.types import Prompts, Verdict


def judge(prompts: Prompts, completions) -> list[Verdict]:
    return [Verdict(0.0) for _ in completions]


def make(count: int = 5) -> RowsTask:
    rows = [
        Row(
            f"r{i}",
            ({"role": "user", "content": f"{i}?"},),
            {"answer": i},
            f"it is {i}",
        )
        for i in range(count)
    ]
    return RowsTask("numbers", rows, judge)


def test_it_is_a_task():
    task = make()
    assert isinstance(task, Task)
    assert (task.name, len(task), task.judge) == ("numbers", 5, judge)


def test_rows_keep_their_four_parts_together():
    prompts = make().rows([3, 1, 3])
    assert prompts.ids == ("r3", "r1", "r3")
    assert prompts.messages[1] == ({"role": "user", "content": "1?"},)
    assert [row["answer"] for row in prompts.columns] == [3, 1, 3]
    assert prompts.demonstrations == ("it is 3", "it is 1", "it is 3")


def test_an_epoch_visits_every_row_once_and_epochs_differ():
    ids = make(50).prompts(seed=1, cursor=0, count=150).ids
    epochs = [ids[i : i + 50] for i in (0, 50, 100)]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 13])
def test_the_order_does_not_depend_on_the_batch_size(size):
    task = make()
    whole = task.prompts(seed=3, cursor=0, count=26).ids
    parts = [task.prompts(seed=3, cursor=c, count=size).ids for c in range(0, 26, size)]
    assert sum(parts, ())[:26] == whole


def test_another_seed_another_order():
    assert not np.array_equal(epoch_order(100, 0, 0), epoch_order(100, 1, 0))
    # Seed and epoch are two words of the key: none is added to the other.
    assert not np.array_equal(epoch_order(100, 0, 1), epoch_order(100, 1, 0))


def test_the_order_is_fixed_forever():
    # Checkpoints hold a cursor only: a changed order would break every old run.
    assert epoch_order(8, seed=42, epoch=3).tolist() == [1, 6, 3, 4, 5, 2, 0, 7]


def test_orders_are_uniform():
    first = [epoch_order(4, seed, 0)[0] for seed in range(4000)]
    assert np.abs(np.bincount(first) / 4000 - 0.25).max() < 0.03


def test_bad_input():
    with pytest.raises(ValueError, match="'numbers' has no rows"):
        make(0)
    row = Row("same", ())
    with pytest.raises(ValueError, match="two rows with the id 'same'"):
        RowsTask("twice", [row, row], judge)
    with pytest.raises(ValueError, match="cursor"):
        make().prompts(0, -1, 2)
    with pytest.raises(ValueError, match="seed is -1"):
        make().prompts(-1, 0, 2)
