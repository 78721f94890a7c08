"""Tasks whose rows are streamed."""

from __future__ import annotations

import itertools
import json

import pytest

from jaxrl_post import tasks
from jaxrl_post.errors import InputError
from jaxrl_post.tasks import Row, StreamTask

PROMPTS = [{"prompt": f"{i} + 1", "answer": i + 1, "level": i % 3} for i in range(11)]
VERL = [
    {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"{i} + 1"}],
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
    }
    for i in range(11)
]


def nothing(prompts, completions):
    return []


@pytest.fixture
def small():
    def rows():
        return (Row(str(i), ()) for i in range(10))

    return StreamTask("digits", rows, nothing, block=4)


def test_what_comes_depends_on_seed_and_cursor_alone(small):
    whole = small.prompts(3, 0, 35).ids
    for cursor, count in itertools.product(range(0, 25, 3), (1, 4, 10)):
        assert small.prompts(3, cursor, count).ids == whole[cursor : cursor + count]
    assert small.prompts(4, 0, 35).ids != whole
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    for epoch in epochs:
        blocks = [set(map(int, epoch[i : i + 4])) for i in (0, 4, 8)]
        assert blocks == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}]
    assert len(set(epochs)) == 3 and len({e[:4] for e in epochs}) > 1


def test_a_stream_is_read_once_an_epoch_and_no_further_than_needed():
    read = []

    def rows():
        for i in range(10):
            read.append(i)
            yield Row(str(i), ())

    task = StreamTask("digits", rows, nothing, block=4)
    for cursor in (0, 2, 4):
        task.prompts(0, cursor, 2)
    assert read == list(range(8))
    task.prompts(0, 6, 14)
    assert len(read) == 20


def test_what_needs_all_rows_says_so(small):
    for use in (len, lambda task: task.rows([0]), lambda task: tasks.select(task, [1])):
        with pytest.raises(InputError, match="task 'digits' is streamed.*curriculum"):
            use(small)
    assert small.rows([]).ids == ()
    empty = StreamTask("none", lambda: [], nothing)
    with pytest.raises(InputError, match="'none' has no rows"):
        empty.prompts(0, 0, 1)


@pytest.mark.parametrize("records", [PROMPTS, VERL], ids=["rows", "verl"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "hub"])
def test_a_streamed_table_has_the_rows_of_one_that_is_held(
    records, kind, tmp_path, monkeypatch
):
    import datasets

    data = datasets.Dataset.from_list(records)
    source = tmp_path / f"data.{'parquet' if kind == 'parquet' else 'jsonl'}"
    if kind == "parquet":
        data.to_parquet(source)
    else:
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
    held = tasks.load("rows", source=str(source))
    if kind == "folder":
        source = source.rename(tmp_path / "train.jsonl").parent
    elif kind == "hub":

        def load_dataset(name, subset, *, split, streaming):
            assert streaming and (name, subset, split) == ("data", None, "train")
            return data.to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = "data"
    streamed = tasks.load("rows", source=str(source), streaming=True)
    found, order = streamed.prompts(0, 0, 11), list(held.rows(range(11)).messages)
    indices = [order.index(messages) for messages in found.messages]
    assert sorted(indices) == [*range(11)] != indices
    columns = held.rows(indices).columns
    assert [{**row, "repeats": 1} for row in found.columns] == list(columns)
    assert type(streamed.judge) is type(held.judge)


def test_a_broken_line_is_met_when_it_is_its_turn(tmp_path):
    path = tmp_path / "data.jsonl"
    good = '{"prompt": "q", "answer": "a"}\n' * 1000
    path.write_text(good + "{")
    task = tasks.load("rows", source=str(path), streaming=True)
    assert len(task.prompts(0, 0, 1000)) == 1000
    with pytest.raises(InputError, match="line 1001 is not JSON"):
        task.prompts(0, 1000, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "data.json"}, "cannot be streamed.*streaming: false"),
        ({"source": "empty.jsonl"}, "has no rows"),
        ({"source": "data.jsonl", "prompt": "promt"}, "did you mean 'prompt'"),
        ({"source": "data.jsonl", "data_source": "x"}, "no column 'data_source'"),
        ({"source": "data.jsonl", "answer": None}, "Name a reward function"),
    ],
)
def test_bad_input_is_found_when_the_task_is_opened(
    options, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "data.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
    with pytest.raises(InputError, match=words):
        tasks.load("rows", streaming=True, **options)
